"""The paper's tables: rows, published figures, and the report that sets runs beside them."""

"""The paper's tables: rows, published figures, and the report that puts runs next to them."""

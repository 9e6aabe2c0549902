"""Reads what models and trainings do at each level, without changing them."""

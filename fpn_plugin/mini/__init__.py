"""The mini dataset and its weights, made on the user's machine in seconds."""

from .dataset import MINI_NAMES, ensure_mini, ensure_mini_datasets, register_mini
from .weights import MINI_WEIGHTS, ensure_mini_weights, register_mini_weights

__all__ = [
    "MINI_NAMES", "MINI_WEIGHTS", "ensure_mini", "ensure_mini_datasets", "ensure_mini_weights",
    "register_mini", "register_mini_weights",
]  # fmt: skip

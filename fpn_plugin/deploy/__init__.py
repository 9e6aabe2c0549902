"""A trained model made fast, and exported."""

from .folding import fold_batch_norms
from .optimize import Step, optimize_for_inference, steps_of

__all__ = ["Step", "fold_batch_norms", "optimize_for_inference", "steps_of"]

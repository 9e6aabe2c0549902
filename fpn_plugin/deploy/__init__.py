"""A trained model made fast, and exported."""

from .optimize import Step, optimize_for_inference, steps_of

__all__ = ["Step", "optimize_for_inference", "steps_of"]

"""A recommendation, and what several of them go by."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["LEAST_CELLS", "MANY", "UNTRIED", "Recommendation"]

MANY = 0.05  # of boxes that are too small
LEAST_CELLS = 2.0  # shorter side, in cells of the finest level, under which a box is too small
UNTRIED = "not tried by training"


@dataclass(frozen=True)
class Recommendation:
    """A change of a config for a dataset, or none.

    Attributes:
        subject: the part of the config: "input size", "flips", "anchors", ...
        changes: config keys to their new values; empty to keep the config.
        reason: why, in one sentence.
        effect: the expected effect, in figures.
        figures: the same figures, for JSON.
        untried: config keys to values that may help, and that no training has shown to help. They
            are reported, not set.
    """

    subject: str
    changes: dict[str, Any]
    reason: str
    effect: str
    figures: dict[str, Any] = field(default_factory=dict)
    untried: dict[str, Any] = field(default_factory=dict)

    @property
    def keep(self) -> bool:
        """Whether it changes nothing."""
        return not self.changes

"""One recommendation, and configs with recommendations applied."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from detectron2.config import CfgNode

__all__ = ["UNTRIED", "Recommendation", "applied"]

UNTRIED = "not tried by training"  # of an effect that docs/fitting.md has no run of


@dataclass(frozen=True)
class Recommendation:
    """What to change in a config for a dataset, or that nothing needs to be.

    Attributes:
        subject: what it is about: "levels", "canonical size", "anchors", ...
        changes: config keys to their new values; empty: keep what there is.
        reason: why, in one sentence.
        effect: what to expect of it, in figures.
        figures: the same figures, for JSON.
    """

    subject: str
    changes: dict[str, Any]
    reason: str
    effect: str
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def keep(self) -> bool:
        """Whether it is to change nothing."""
        return not self.changes


def applied(cfg: CfgNode, recommendations: Iterable[Recommendation]) -> CfgNode:
    """A copy of a config with the changes of recommendations made, in their order."""
    cfg = cfg.clone()
    cfg.defrost()
    for recommendation in recommendations:
        for key, value in recommendation.changes.items():
            cfg.merge_from_list([key, value])
    return cfg

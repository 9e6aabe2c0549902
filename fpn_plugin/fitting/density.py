"""The number of objects per image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from fpn_plugin.errors import UserError

from .ground_truth import GroundTruth

__all__ = ["Density", "check_sampling", "samplers"]


@dataclass(frozen=True)
class Density:
    """Objects per image, over images that have any.

    Attributes:
        counts: objects of each such image.
        empty: images without any.
    """

    counts: np.ndarray
    empty: int

    @classmethod
    def of(cls, truth: GroundTruth) -> Density:
        """The density of a dataset."""
        counts = np.bincount(truth.image, minlength=len(truth.shapes))
        return cls(counts[counts > 0], int((counts == 0).sum()))

    @property
    def crowded(self) -> int:
        """The 99th percentile of objects per image, rounded up."""
        return int(np.ceil(np.percentile(self.counts, 99)))

    def without_room(self, room: float) -> float:
        """Share of objects beyond ``room`` per image."""
        return float(np.clip(self.counts - room, 0, None).sum() / self.counts.sum())

    def as_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return {
            "images": len(self.counts),
            "images_without_objects": self.empty,
            "mean": float(self.counts.mean()),
            "median": float(np.median(self.counts)),
            "percentile_99": self.crowded,
            "most": int(self.counts.max()),
        }


def samplers(cfg: CfgNode) -> tuple[str, ...]:
    """The nodes of a config's model that sample objects in training: RPN, ROI_HEADS or none."""
    given = {"RetinaNet": (), "ProposalNetwork": ("RPN",)}
    return given.get(cfg.MODEL.META_ARCHITECTURE, ("RPN", "ROI_HEADS"))


def check_sampling(cfg: CfgNode) -> None:
    """Refuses a config that never samples an object.

    Raises:
        UserError: a share of foreground samples that is not above 0.
    """
    for part in samplers(cfg):
        given = cfg.MODEL[part].POSITIVE_FRACTION
        if not given > 0:
            raise UserError(
                f"MODEL.{part}.POSITIVE_FRACTION is {given}, with which no object is ever "
                "sampled; expected a share above 0 and up to 1, as 0.25"
            )

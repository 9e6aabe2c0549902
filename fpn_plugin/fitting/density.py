"""How many objects an image holds, and whether proposals and detections have room for them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from fpn_plugin.config import value_at
from fpn_plugin.errors import UserError

from .ground_truth import GroundTruth
from .recommendation import UNTRIED, Recommendation

__all__ = ["Density", "check_sampling", "recommend_room"]

_PROPOSALS_PER_OBJECT = 5  # most proposals of an object are near copies of each other
_CANDIDATES_PER_OBJECT = 10  # before NMS
_SPARE = 1.5  # detections and samples over the objects there are
_COCO_DETECTIONS = 100  # that COCO's AP looks at in an image


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
        """Counts them."""
        counts = np.bincount(truth.image, minlength=len(truth.shapes))
        return cls(counts[counts > 0], int((counts == 0).sum()))

    @property
    def crowded(self) -> int:
        """Objects in an image more crowded than 99 of 100."""
        return int(np.ceil(np.percentile(self.counts, 99)))

    def without_room(self, room: float) -> float:
        """Share of objects that are one too many where an image has room for so many."""
        return float(np.clip(self.counts - room, 0, None).sum() / self.counts.sum())

    def as_dict(self) -> dict[str, Any]:
        """In figures, for JSON."""
        return {
            "images": len(self.counts),
            "images_without_objects": self.empty,
            "mean": float(self.counts.mean()),
            "median": float(np.median(self.counts)),
            "percentile_99": self.crowded,
            "most": int(self.counts.max()),
        }


def check_sampling(cfg: CfgNode) -> None:
    """Refuses a config that never samples an object.

    Args:
        cfg: the config.

    Raises:
        UserError: a share of foreground samples that is not above 0.
    """
    if cfg.MODEL.META_ARCHITECTURE == "RetinaNet":
        return
    heads = () if cfg.MODEL.META_ARCHITECTURE == "ProposalNetwork" else ("ROI_HEADS",)
    for part in ("RPN", *heads):
        given = cfg.MODEL[part].POSITIVE_FRACTION
        if not given > 0:
            raise UserError(
                f"MODEL.{part}.POSITIVE_FRACTION is {given}, with which no object is ever "
                "sampled; expected a share above 0 and up to 1, as 0.25"
            )


def recommend_room(cfg: CfgNode, density: Density) -> Iterator[Recommendation]:
    """Proposals, samples and detections per image for data this dense.

    Args:
        cfg: the config.
        density: of its training data.

    Raises:
        UserError: see :func:`check_sampling`.
    """
    check_sampling(cfg)
    crowded = density.crowded
    model = cfg.MODEL
    if model.META_ARCHITECTURE == "RetinaNet":
        keys = {"MODEL.RETINANET.TOPK_CANDIDATES_TEST": _CANDIDATES_PER_OBJECT * crowded}
        yield _room(cfg, "proposals", keys, 50, crowded)
    else:
        proposals = {}
        for split in ("TRAIN", "TEST"):
            proposals[f"MODEL.RPN.PRE_NMS_TOPK_{split}"] = _CANDIDATES_PER_OBJECT * crowded
            proposals[f"MODEL.RPN.POST_NMS_TOPK_{split}"] = _PROPOSALS_PER_OBJECT * crowded
        yield _room(cfg, "proposals", proposals, 100, crowded)
        samples = {"MODEL.RPN.BATCH_SIZE_PER_IMAGE": _SPARE * crowded / model.RPN.POSITIVE_FRACTION}
        if model.META_ARCHITECTURE != "ProposalNetwork":
            foreground = _SPARE * crowded / model.ROI_HEADS.POSITIVE_FRACTION
            samples["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE"] = foreground
        yield _room(cfg, "samples", samples, 64, crowded)
    if model.META_ARCHITECTURE != "ProposalNetwork":
        keys = {"TEST.DETECTIONS_PER_IMAGE": _SPARE * crowded}
        yield _room(cfg, "detections", keys, 50, crowded, density)


_WANTED = {
    "proposals": f"{_PROPOSALS_PER_OBJECT} proposals and {_CANDIDATES_PER_OBJECT} candidates a "
    "level before NMS for each of them",
    "samples": "a foreground sample for each of them, and half as many to spare",
    "detections": "a detection for each of them, and half as many to spare",
}


def _short(key: str) -> str:
    return key.removeprefix("MODEL.")


def _room(
    cfg: CfgNode,
    subject: str,
    wanted: dict[str, float],
    multiple: int,
    crowded: int,
    density: Density | None = None,
) -> Recommendation:
    has = {key: value_at(cfg, key) for key in wanted}
    changes = {
        key: int(-(-value // multiple) * multiple)
        for key, value in wanted.items()
        if has[key] < value
    }
    parts = " and ".join(key.split(".")[1] for key in wanted)
    where = f", in {parts}" if subject == "samples" else ""
    reason = (
        f"99 of 100 images hold at most {crowded} objects; there should be "
        f"{_WANTED[subject]}{where}, and there {'is not' if changes else 'is'}."
    )
    if not changes:
        told = ", ".join(f"{_short(key)} {value}" for key, value in has.items())
        return Recommendation(subject, {}, reason, f"Room enough: {told}.")
    if density is not None:
        [key] = wanted
        before, after = density.without_room(has[key]), density.without_room(changes[key])
        effect = f"Objects that no detection is left for: {before:.1%} before, {after:.1%} after."
        if crowded > _COCO_DETECTIONS:
            effect += (
                f" COCO's AP looks at {_COCO_DETECTIONS} detections an image, and does not show it."
            )
    else:
        effect = "For each crowded object, before and after: " + ", ".join(
            f"{_short(key)} {has[key] / crowded:.1f} and {value / crowded:.1f}"
            for key, value in changes.items()
        )
        effect += ". Costs time and memory in proportion in the part that it feeds."
    effect += f" What becomes of AP is {UNTRIED}."
    return Recommendation(subject, changes, reason, effect)

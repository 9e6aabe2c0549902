"""How far two models' detections are from each other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from detectron2.structures import Instances, pairwise_iou
from torch import Tensor

__all__ = ["Agreement"]


@dataclass
class Agreement:
    """How far one model's detections are another's, over images.

    Attributes:
        matched: pairs of detections of one class, one of each model, of IoU above 0.5.
        missing: detections of the first model without a partner.
        extra: those of the second.
        box_px: largest difference of a coordinate between partners, in pixels of the image.
        score: largest difference of scores between partners.
    """

    matched: int = 0
    missing: int = 0
    extra: int = 0
    box_px: float = 0.0
    score: float = 0.0

    def add(self, expected: Instances, ours: Instances) -> tuple[Tensor, Tensor]:
        """Counts both models' detections in one image, on the CPU.

        Returns:
            Indices of partners, of the first model's and of the second's.
        """
        theirs, mine = _partners(expected, ours)
        self.matched += len(theirs)
        self.missing += len(expected) - len(theirs)
        self.extra += len(ours) - len(mine)
        if len(theirs):
            boxes = expected.pred_boxes.tensor[theirs] - ours.pred_boxes.tensor[mine]
            scores = expected.scores[theirs] - ours.scores[mine]
            self.box_px = max(self.box_px, float(boxes.abs().max()))
            self.score = max(self.score, float(scores.abs().max()))
        return theirs, mine


def _partners(expected: Instances, ours: Instances) -> tuple[Tensor, Tensor]:
    """Pairs of greatest overlap first, each detection in one at most."""
    overlaps = pairwise_iou(expected.pred_boxes, ours.pred_boxes)
    overlaps[expected.pred_classes[:, None] != ours.pred_classes] = 0
    theirs, mine = (overlaps > 0.5).nonzero(as_tuple=True)
    order = overlaps[theirs, mine].argsort(descending=True, stable=True)
    pairs: dict[int, int] = {}
    taken: set[int] = set()
    for first, second in zip(theirs[order].tolist(), mine[order].tolist(), strict=True):
        if first not in pairs and second not in taken:
            pairs[first] = second
            taken.add(second)
    return (
        torch.tensor(list(pairs), dtype=torch.int64),
        torch.tensor(list(pairs.values()), dtype=torch.int64),
    )

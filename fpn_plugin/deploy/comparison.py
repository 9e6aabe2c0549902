"""Detections of two models compared, and the time that each takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.structures import Instances, pairwise_iou
from torch import Tensor

__all__ = ["Agreement", "compare_detectors"]


@dataclass
class Agreement:
    """How well the detections of two models agree, summed over images.

    Attributes:
        matched: pairs of detections, one of each model, of the same class and an IoU above 0.5.
        missing: detections of the first model without a partner.
        extra: detections of the second model without a partner.
        box_px: largest difference of a coordinate between partners, in pixels of the image.
        score: largest difference of scores between partners.
    """

    matched: int = 0
    missing: int = 0
    extra: int = 0
    box_px: float = 0.0
    score: float = 0.0

    def add(self, expected: Instances, ours: Instances) -> tuple[Tensor, Tensor]:
        """Compares both models' detections in one image, on the CPU.

        Returns:
            Indices of the partners, in the first model's detections and in the second's.
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
    """Pairs with the largest overlap first; a detection is in one pair at most."""
    overlaps = pairwise_iou(expected.pred_boxes, ours.pred_boxes)
    overlaps[expected.pred_classes[:, None] != ours.pred_classes] = 0
    theirs, mine = (overlaps > 0.5).nonzero(as_tuple=True)
    order = overlaps[theirs, mine].argsort(descending=True, stable=True)
    pairs: dict[int, int] = {}
    for first, second in zip(theirs[order].tolist(), mine[order].tolist(), strict=True):
        if first not in pairs and second not in pairs.values():
            pairs[first] = second
    return torch.tensor(list(pairs)).long(), torch.tensor(list(pairs.values())).long()


def compare_detectors(
    detectors: Mapping[str, Callable[[np.ndarray], Instances]], images: Iterable[np.ndarray]
) -> dict[str, tuple[float, float, Agreement]]:
    """Runs detectors in turn on each image.

    Args:
        detectors: by name. They return detections on the CPU. All are compared with the first.
        images: see :class:`fpn_plugin.engine.inference.Detector`.

    Returns:
        For each detector, the seconds of its first call, the median seconds of its later calls,
        and how well its detections agree with the first detector's.
    """
    seconds: dict[str, list[float]] = {name: [] for name in detectors}
    agreement = {name: Agreement() for name in detectors}
    for number, image in enumerate(images):
        outputs: dict[str, Instances] = {}
        for _ in range(2 if number == 0 else 1):  # a first call takes longer
            for name, detector in detectors.items():
                started = time.perf_counter()  # detections are on the CPU: the work is done
                outputs[name] = detector(image)
                seconds[name].append(time.perf_counter() - started)
        expected = next(iter(outputs.values()))
        for name, output in outputs.items():
            agreement[name].add(expected, output)
    return {
        name: (taken[0], statistics.median(taken[1:]), agreement[name])
        for name, taken in seconds.items()
    }

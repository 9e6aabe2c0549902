"""How well anchors fit boxes: the best IoU over every place of the grid they stand on."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .pyramid import Pyramid
from .resizing import InputBoxes

__all__ = ["GridOffsets", "best_anchors"]

_CHUNK = 200_000  # boxes at a time


class GridOffsets:
    """How far the centre of each box is from the nearest anchor centre of each level.

    Anchors of level k stand at ((i + offset) 2^k, (j + offset) 2^k) for the cells (i, j) of its
    map. Whatever an anchor's shape, its IoU with a box falls with the distance of their centres
    along either axis, so the best place for it is the nearest centre: that makes the best IoU
    exact. The map is that of the box's own image, padded as Detectron2 pads a batch of one.

    Args:
        inputs: the boxes.
        levels: of the anchors.
        offset: MODEL.ANCHOR_GENERATOR.OFFSET.
        divisibility: what sides of the padded input are multiples of, in pixels.
    """

    def __init__(
        self, inputs: InputBoxes, levels: Sequence[int], offset: float, divisibility: int
    ) -> None:
        self.sides = inputs.sides
        self._areas = self.sides.prod(axis=1)
        centers = inputs.boxes[:, :2] + self.sides / 2
        padded = -(-inputs.shapes[:, ::-1] // divisibility) * divisibility
        self._distance = {}
        for level in levels:
            stride = 2**level
            last = -(-padded // stride) - 1
            cell = np.clip(np.round(centers / stride - offset), 0, last)
            self._distance[level] = np.abs(centers - (cell + offset) * stride)

    def iou(self, level: int, shapes: np.ndarray) -> np.ndarray:
        """Best IoU of each box with each anchor shape of a level, over all its places.

        Args:
            level: one of those given.
            shapes: float ``(A, 2)``, widths and heights in input pixels.

        Returns:
            float64 ``(N, A)``.
        """
        intersection = 1.0
        for axis in (0, 1):
            side, shape = self.sides[:, axis, None], shapes[None, :, axis]
            overlap = (side + shape) / 2 - self._distance[level][:, axis, None]
            overlap = np.minimum(np.minimum(overlap, side), shape)
            intersection = intersection * np.maximum(overlap, 0)
        return intersection / (self._areas[:, None] + shapes.prod(axis=1) - intersection)


def best_anchors(inputs: InputBoxes, pyramid: Pyramid) -> tuple[np.ndarray, np.ndarray]:
    """The anchor that fits each box best.

    Args:
        inputs: the boxes.
        pyramid: whose anchors.

    Returns:
        float64 ``(N,)``, its IoU, and int64 ``(N,)``, its level.
    """
    shapes = pyramid.anchor_shapes()
    best, level_of = [], []
    for start in range(0, len(inputs.boxes), _CHUNK):
        part = inputs.part(slice(start, start + _CHUNK))
        grid = GridOffsets(part, pyramid.anchor_levels, pyramid.offset, pyramid.divisibility)
        by_level = np.stack(
            [
                grid.iou(level, of_level).max(axis=1)
                for level, of_level in zip(pyramid.anchor_levels, shapes, strict=True)
            ]
        )
        best.append(by_level.max(axis=0))
        level_of.append(np.array(pyramid.anchor_levels)[by_level.argmax(axis=0)])
    return np.concatenate(best), np.concatenate(level_of)

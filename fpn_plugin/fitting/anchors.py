"""Anchors and boxes: the best IoU over the grid, matches, and sizes fitted to boxes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from .pyramid import Pyramid
from .resizing import InputBoxes

__all__ = ["GridOffsets", "best_anchors", "fit_anchors", "matching_anchors"]

_CHUNK = 200_000  # boxes that are matched at a time
_CHUNK_COUNTED = 5_000  # the same, with all places of the anchors
_SAMPLE = 3_000  # boxes that anchors are fitted to
_STRIDES = (4.0, 8.0)  # of the smallest anchor's size; the paper's has eight
_STEPS_PER_OCTAVE = 16


class GridOffsets:
    """How far the centre of each box is from the nearest anchor centre of each level.

    Anchors of level k are centred at ((i + offset) 2^k, (j + offset) 2^k) for the cells (i, j) of
    its map. The IoU of an anchor of any shape with a box falls with the distance of their centres
    along each axis. So the nearest centre is the best place, and the best IoU is exact. The map is
    that of the box's own image, padded as Detectron2 pads a batch of one.

    Args:
        inputs: the boxes.
        levels: of the anchors.
        offset: MODEL.ANCHOR_GENERATOR.OFFSET.
        divisibility: the padded input's sides are multiples of it, in pixels.
    """

    def __init__(
        self, inputs: InputBoxes, levels: Sequence[int], offset: float, divisibility: int
    ) -> None:
        self.sides = inputs.sides
        self._areas = self.sides.prod(axis=1)
        self._centers = inputs.boxes[:, :2] + self.sides / 2
        self._offset = offset
        padded = -(-inputs.shapes[:, ::-1] // divisibility) * divisibility
        self._cell, self._last, self._distance = {}, {}, {}
        for level in levels:
            stride = 2**level
            last = self._last[level] = -(-padded // stride) - 1
            cell = np.clip(np.round(self._centers / stride - offset), 0, last)
            self._cell[level] = cell
            self._distance[level] = np.abs(self._centers - (cell + offset) * stride)

    def iou(self, level: int, shapes: np.ndarray) -> np.ndarray:
        """Best IoU of each box with each anchor shape of a level, over all its places.

        Args:
            level: one of the constructor's.
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

    def count(self, level: int, shapes: np.ndarray, threshold: float) -> np.ndarray:
        """How many anchors of a level overlap each box by an IoU or more, of all their places.

        Args:
            level: one of the constructor's.
            shapes: float ``(A, 2)``, widths and heights in input pixels.
            threshold: the IoU, above 0.

        Returns:
            int64 ``(N,)``.
        """
        stride, total = 2**level, np.zeros(len(self.sides), np.int64)
        for shape in shapes:
            overlaps = []
            for axis in (0, 1):
                # Of equal heights, centres (1 - t) / 2t anchor widths apart have an IoU of t.
                reach = int(shape[axis] * (1 - threshold) / (2 * threshold * stride)) + 1
                cell = self._cell[level][:, axis, None] + np.arange(-reach, reach + 1)
                side = self.sides[:, axis, None]
                distance = np.abs(self._centers[:, axis, None] - (cell + self._offset) * stride)
                overlap = np.minimum((side + shape[axis]) / 2 - distance, side)
                overlap = np.maximum(np.minimum(overlap, shape[axis]), 0)
                there = (cell >= 0) & (cell <= self._last[level][:, axis, None])
                overlaps.append(overlap * there)
            intersection = overlaps[0][:, :, None] * overlaps[1][:, None]
            union = (self._areas + shape.prod())[:, None, None] - intersection
            total += (intersection >= threshold * union).sum(axis=(1, 2))
        return total


def matching_anchors(inputs: InputBoxes, pyramid: Pyramid, threshold: float) -> np.ndarray:
    """How many anchors of each level match each box, as the RPN's training matches them.

    Anchors match that overlap the box by ``threshold`` or more. If there is none, the best one
    does (Detectron2's low-quality matches).

    Returns:
        int64 ``(N, levels)``.
    """
    shapes, counts = pyramid.anchor_shapes(), []
    for start in range(0, len(inputs.boxes), _CHUNK_COUNTED):
        part = inputs.part(slice(start, start + _CHUNK_COUNTED))
        grid = GridOffsets(part, pyramid.anchor_levels, pyramid.offset, pyramid.divisibility)
        pairs = list(zip(pyramid.anchor_levels, shapes, strict=True))
        counted = np.stack([grid.count(*each, threshold) for each in pairs], axis=1)
        best = np.stack([grid.iou(*each).max(axis=1) for each in pairs]).argmax(axis=0)
        unmatched = np.flatnonzero(counted.sum(axis=1) == 0)
        counted[unmatched, best[unmatched]] = 1
        counts.append(counted)
    return np.concatenate(counts)


def best_anchors(inputs: InputBoxes, pyramid: Pyramid) -> tuple[np.ndarray, np.ndarray]:
    """The anchor of a pyramid that fits each box best.

    Returns:
        float64 ``(N,)``, its IoU, and int64 ``(N,)``, its level.
    """
    shapes = pyramid.anchor_shapes()
    best, level_of = [], []
    for start in range(0, len(inputs.boxes), _CHUNK):
        part = inputs.part(slice(start, start + _CHUNK))
        grid = GridOffsets(part, pyramid.anchor_levels, pyramid.offset, pyramid.divisibility)
        pairs = zip(pyramid.anchor_levels, shapes, strict=True)
        by_level = np.stack([grid.iou(level, of_level).max(axis=1) for level, of_level in pairs])
        best.append(by_level.max(axis=0))
        level_of.append(np.array(pyramid.anchor_levels)[by_level.argmax(axis=0)])
    return np.concatenate(best), np.concatenate(level_of)


def fit_anchors(inputs: InputBoxes, pyramid: Pyramid) -> Pyramid:
    """Fits anchors to boxes: multiplies all sizes by the factor with the highest mean best IoU.

    All levels have the same factor, so that each keeps its share of the objects and no level is
    crowded. The smallest anchor of the finest level has between four and eight strides afterwards,
    the paper's, or the config's own number if it is outside. That is an octave, as from level to
    level, so every size is within reach. Of more than 3,000 boxes a sample is used.

    Args:
        inputs: the boxes as the network sees them.
        pyramid: the config's.

    Returns:
        The pyramid with other sizes, and with s0 of Eq. (1) multiplied by the same factor if the
        RoI heads read it: the paper's 224 px are for anchors of eight strides.
    """
    few = inputs.sample(_SAMPLE)
    strides = pyramid.sizes[0][0] / 2 ** pyramid.anchor_levels[0]
    low, high = min(_STRIDES[0], strides) / strides, max(_STRIDES[1], strides) / strides
    factors = np.geomspace(low, high, int(np.ceil(np.log2(high / low) * _STEPS_PER_OCTAVE)) + 1)
    scaled = [_scaled(pyramid, factor) for factor in factors]
    # Among equals, the one that changes least.
    return max([pyramid, *scaled], key=lambda each: round(best_anchors(few, each)[0].mean(), 4))


def _scaled(pyramid: Pyramid, factor: float) -> Pyramid:
    sizes = tuple(tuple(float(f"{s * factor:.3g}") for s in each) for each in pyramid.sizes)
    canonical = round(pyramid.canonical_size * factor) if pyramid.canonical_keys else 0
    return replace(pyramid, sizes=sizes, canonical_size=float(canonical) or pyramid.canonical_size)

"""Measures of boxes against a pyramid: sizes, levels, cells and anchors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fpn_plugin.modeling.levels import assign_levels

from .anchors import best_anchors
from .pyramid import Pyramid
from .resizing import InputBoxes

__all__ = ["PERCENTILES", "Measures", "measure"]

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_BEYOND = 64  # levels; Eq. (1) puts no box further away


@dataclass(frozen=True)
class Measures:
    """Boxes measured against a pyramid.

    Attributes:
        size: sqrt(w h) of each box in input pixels, ``(N,)``.
        aspect: height over width, ``(N,)``.
        level: of Eq. (1) for each box, clamped to the RoI levels, ``(N,)``; without RoI heads, the
            level of its best anchor.
        clamped_fine, clamped_coarse: how many boxes Eq. (1) puts below the finest RoI level and
            above the coarsest.
        cells: the shorter side of each box in cells of its level, ``(N,)``.
        best_iou: with the anchor that fits best, over all its places, ``(N,)``.
        anchor_level: that anchor's level, ``(N,)``.
        pyramid: the pyramid.
    """

    size: np.ndarray
    aspect: np.ndarray
    level: np.ndarray
    clamped_fine: int
    clamped_coarse: int
    cells: np.ndarray
    best_iou: np.ndarray
    anchor_level: np.ndarray
    pyramid: Pyramid

    def recall(self, threshold: float) -> float:
        """Share of boxes that an anchor overlaps by at least this IoU."""
        return _mean(self.best_iou >= threshold)

    @property
    def mean_iou(self) -> float:
        """Mean of ``best_iou``."""
        return _mean(self.best_iou)

    def below_cells(self, cells: float) -> float:
        """Share of boxes whose shorter side is less than so many cells of their level."""
        return _mean(self.cells < cells)

    def octaves(self) -> list[dict[str, Any]]:
        """Boxes and anchors by octave of size: from 2^i to less than 2^(i+1) input pixels.

        Octaves without boxes are left out.
        """
        octave = np.floor(np.log2(self.size)).astype(int)
        return [
            {"from": 2.0**i, "to": 2.0 ** (i + 1), **self._group(octave == i)}
            for i in np.unique(octave)
        ]

    def by_level(self) -> list[dict[str, Any]]:
        """Figures of each level: of the boxes pooled from it, and of those with their best anchor
        there. Shares below 1 and 2 cells are of the boxes with that ``level``.
        """
        roi_levels, anchor_levels = self.pyramid.roi_levels, self.pyramid.anchor_levels
        return [
            {
                "level": level,
                "pooled": _mean(self.level == level) if roi_levels else None,
                "below_1_cell": _mean(self.cells[self.level == level] < 1),
                "below_2_cells": _mean(self.cells[self.level == level] < 2),
                **self._group(self.anchor_level == level),
            }
            for level in sorted({*roi_levels, *anchor_levels})
        ]

    def _group(self, which: np.ndarray) -> dict[str, Any]:
        iou = self.best_iou[which]
        return {
            "share": _mean(which),
            "recall_50": _mean(iou >= 0.5),
            "recall_70": _mean(iou >= 0.7),
            "mean_iou": _mean(iou),
        }

    def as_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        total = len(self.size)
        return {
            "boxes": total,
            "size_percentiles": _percentiles(self.size),
            "aspect_percentiles": _percentiles(self.aspect),
            "small": _mean(self.size < 32),
            "medium": _mean((self.size >= 32) & (self.size < 96)),
            "large": _mean(self.size >= 96),
            "clamped_fine": self.clamped_fine / total,
            "clamped_coarse": self.clamped_coarse / total,
            "below_1_cell": self.below_cells(1),
            "below_2_cells": self.below_cells(2),
            "recall_50": self.recall(0.5),
            "recall_70": self.recall(0.7),
            "mean_iou": self.mean_iou,
            "by_size": self.octaves(),
            "by_level": self.by_level(),
        }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if len(values) else None


def _percentiles(values: np.ndarray) -> dict[str, float]:
    found = np.percentile(values, PERCENTILES).tolist()
    return dict(zip(map(str, PERCENTILES), found, strict=True))


def measure(inputs: InputBoxes, pyramid: Pyramid) -> Measures:
    """Measures a pyramid against boxes as the network sees them."""
    best_iou, anchor_level = best_anchors(inputs, pyramid)
    level, fine, coarse = anchor_level, 0, 0
    if pyramid.roi_levels:
        # From corners at the origin, so that float32 loses nothing of a box far from it.
        boxes = np.concatenate([np.zeros_like(inputs.sides), inputs.sides], axis=1)
        canonical = pyramid.canonical_size, pyramid.canonical_level
        free = assign_levels(torch.from_numpy(boxes), -_BEYOND, _BEYOND, *canonical).numpy()
        finest, coarsest = pyramid.roi_levels[0], pyramid.roi_levels[-1]
        fine, coarse = int((free < finest).sum()), int((free > coarsest).sum())
        level = free.clip(finest, coarsest)
    width, height = inputs.sides.T
    return Measures(
        size=inputs.size,
        aspect=height / width,
        level=level,
        clamped_fine=fine,
        clamped_coarse=coarse,
        cells=np.minimum(width, height) / 2.0**level,
        best_iou=best_iou,
        anchor_level=anchor_level,
        pyramid=pyramid,
    )

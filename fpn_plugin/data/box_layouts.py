"""Boxes that are written in another way than COCO's, recognised by what all have in common."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .shapes import ROUNDING

__all__ = ["COCO_LAYOUT", "SLACK", "BoxLayout", "box_layout"]


def _of_corners(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2], boxes[:, 2:] - boxes[:, :2]], axis=1)


def _of_centres(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, 2:]], axis=1)


_TURNS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "[x, y, width, height]": lambda boxes: boxes,
    "corners [x0, y0, x1, y1]": _of_corners,
    "[centre x, centre y, width, height]": _of_centres,
}
_COCO, _CORNERS, _CENTRES = _TURNS
# How many boxes and which share must reach out of the image if they are read as COCO's. Of real
# corners three in four do, and of centres those of objects near a border.
_LEAST = {_CORNERS: (3, 0.2), _CENTRES: (5, 0.05)}
_NEARLY_ALL = 0.99
SLACK = 0.05  # by which fractions may reach out of 0 to 1


class BoxLayout(NamedTuple):
    """How boxes are written."""

    normalised: bool  # as fractions of the image's width and height, not pixels
    values: str  # what the four numbers are

    @property
    def kind(self) -> str:
        """One of :data:`fpn_plugin.data.problems.KINDS`; "" for COCO's layout."""
        if self.normalised:
            return "boxes_normalised"
        return {_CORNERS: "boxes_corners", _CENTRES: "boxes_centres"}.get(self.values, "")

    def __str__(self) -> str:
        """For messages."""
        of = ", as fractions of the image's width and height" if self.normalised else ""
        return f"{self.values}{of or ' in pixels'}"

    def turned(self, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
        """Boxes as COCO has them: x, y, width, height in pixels.

        Args:
            boxes: float64 ``(N, 4)``, in this layout.
            sizes: ``(N, 2)``, width and height of each one's image.
        """
        return _TURNS[self.values](boxes * np.tile(sizes, 2) if self.normalised else boxes)


COCO_LAYOUT = BoxLayout(False, _COCO)


def box_layout(boxes: np.ndarray, sizes: np.ndarray) -> BoxLayout:
    """How boxes seem to be written.

    Args:
        boxes: float64 ``(N, 4)``, finite.
        sizes: ``(N, 2)``, width and height in pixels of each one's image.

    Returns:
        COCO's layout, unless nearly all boxes fit another one.
    """
    if not len(boxes) or not (boxes[:, 2:] > 0).any():
        return COCO_LAYOUT
    # In pixels, all boxes would lie within the first pixel.
    fractions = boxes.min() >= -SLACK and boxes.max() <= 1 + SLACK and sizes.min() > 2
    fractions = bool(fractions and boxes[:, :2].max() < 1)
    reach_out = ~_fits(BoxLayout(fractions, _COCO), boxes, sizes)
    for values, (least, share) in _LEAST.items():
        layout = BoxLayout(fractions, values)
        many = reach_out.sum() >= max(least, share * len(boxes))
        if many and _fits(layout, boxes, sizes).mean() >= _NEARLY_ALL:
            return layout
    return BoxLayout(fractions, _COCO)


def _fits(layout: BoxLayout, boxes: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Whether each box lies in its image if it has this layout."""
    turned = layout.turned(boxes, sizes)
    ends = turned[:, :2] + turned[:, 2:]
    inside = (turned[:, :2] >= -ROUNDING) & (ends <= sizes + ROUNDING) & (turned[:, 2:] >= 0)
    return inside.all(axis=1)

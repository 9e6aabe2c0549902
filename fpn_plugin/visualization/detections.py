"""Pictures of detections, each box in the colour of its pyramid level or class."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from .figures import panels, save
from .keypoints import KeypointLayout, draw_keypoints
from .palette import level_color, text_color

__all__ = ["DrawnBox", "draw_detections"]

_PANEL_INCHES = 5.0


@dataclass(frozen=True)
class DrawnBox:
    """A box to draw.

    Attributes:
        box: XYXY in pixels of the picture.
        text: drawn above it.
        level: the level it was pooled from; None if that is not known.
        keypoints: ``(x, y)`` of each; None for keypoints that the object lacks.
        color: "#RRGGBB"; None for the colour of the level.
    """

    box: tuple[float, float, float, float]
    text: str
    level: int | None = None
    keypoints: tuple[tuple[float, float] | None, ...] = ()
    color: str | None = None

    @property
    def drawn_color(self) -> str:
        """The colour that it is drawn in."""
        return self.color or level_color(self.level)


def draw_detections(
    image: np.ndarray,
    detections: Sequence[DrawnBox],
    path: Path | IO[bytes],
    ground_truth: Sequence[DrawnBox] | None = None,
    layout: KeypointLayout | None = None,
) -> Path | IO[bytes]:
    """Writes a picture of detections, with ground truth next to them if it is given.

    Args:
        image: uint8 RGB ``(H, W, 3)``.
        detections: drawn in their own colour, or that of their level; a legend names the levels.
        path: the file to write, whose suffix sets the format, or a stream for a PNG.
        ground_truth: labelled boxes; None for a picture of detections only.
        layout: names and skeleton of keypoints.

    Returns:
        ``path``.
    """
    by_class = any(drawn.color for drawn in (*detections, *(ground_truth or ())))
    shown = [(f"detections, by {'class' if by_class else 'pyramid level'}", detections)]
    if ground_truth is not None:
        shown.insert(0, ("ground truth", ground_truth))
    height = _PANEL_INCHES * image.shape[0] / image.shape[1]
    size = _PANEL_INCHES * len(shown), height + 0.6
    figure, grid = panels(1, len(shown), size, dpi=160)
    for axes, (title, boxes) in zip(grid[0], shown, strict=True):
        axes.imshow(image)
        axes.set_title(title, fontsize=10)
        for drawn in boxes:
            _draw_box(axes, drawn)
            draw_keypoints(axes, drawn.keypoints, layout or KeypointLayout(), drawn.drawn_color)
    levels = sorted({drawn.level for drawn in detections if drawn.level is not None})
    if levels and not by_class:
        handles = [Patch(color=level_color(level), label=f"P{level}") for level in levels]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(levels), fontsize=9)
    return save(figure, path)


def _draw_box(axes: Axes, drawn: DrawnBox) -> None:
    x0, y0, x1, y1 = drawn.box
    color = drawn.drawn_color
    axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=color, lw=1.5))
    # Above the box, or below its upper edge if there is no room above it.
    side = "bottom" if y0 > 0.05 * max(axes.get_ylim()) else "top"
    edge = {"facecolor": color, "edgecolor": "none", "pad": 0.8, "alpha": 0.9}
    style = {"fontsize": 6, "color": text_color(color), "clip_on": True}
    axes.text(x0, y0, drawn.text, va=side, bbox=edge, **style)

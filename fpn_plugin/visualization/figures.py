"""The parts that pictures share: panels without axes, outlined boxes, saving."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from .palette import INK

__all__ = ["outline", "panels", "save"]


def panels(
    rows: int, columns: int, size: tuple[float, float], dpi: int = 130
) -> tuple[Figure, np.ndarray]:
    """A figure of ``size`` inches, and its axes ``(rows, columns)``, which are not shown."""
    figure = Figure(figsize=size, dpi=dpi, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    return figure, grid


def outline(axes: Axes, box: Sequence[float], color: str, width: float) -> None:
    """Draws a box, XYXY in pixels, with a dark edge on both sides of its line."""
    x0, y0, x1, y1 = box
    for line, shade in ((width + 1.4, INK), (width, color)):
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=shade, lw=line))


def save(figure: Figure, path: Path | IO[bytes]) -> Path | IO[bytes]:
    """Writes a picture without a margin, and returns ``path``.

    The folder of a path is made if necessary. A stream is given a PNG.
    """
    kind = None if isinstance(path, Path) else "png"
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format=kind, bbox_inches="tight", pad_inches=0.1)
    return path

"""Keypoints of an object in a picture: a dot and a name for each, joined by the skeleton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from .palette import INK

__all__ = ["KeypointLayout", "draw_keypoints"]


@dataclass(frozen=True)
class KeypointLayout:
    """Names of keypoints, and pairs of indices of those that a line joins."""

    names: tuple[str, ...] = ()
    edges: tuple[tuple[int, int], ...] = ()

    def name(self, index: int) -> str:
        """The name of a keypoint, or "keypoint 1" if names are not known."""
        return self.names[index] if index < len(self.names) else f"keypoint {index + 1}"


def draw_keypoints(
    axes: Axes,
    points: Sequence[tuple[float, float] | None],
    layout: KeypointLayout,
    color: str,
) -> None:
    """Draws the keypoints of an object.

    Args:
        axes: of the picture.
        points: x and y in pixels of the picture; None for those that the object lacks.
        layout: their names and skeleton.
        color: of dots and lines.
    """
    for pair in layout.edges:
        ends = [points[index] for index in pair]
        if None not in ends:
            axes.plot(*zip(*ends, strict=True), color=color, lw=1.2, scalex=False, scaley=False)
    for index, point in enumerate(points):
        if point is not None:
            axes.plot(*point, "o", ms=3, mfc=color, mec=INK, mew=0.5, scalex=False, scaley=False)
            axes.annotate(
                layout.name(index), point, xytext=(2, 2), textcoords="offset points",
                fontsize=4.5, color=color, clip_on=True,
            )  # fmt: skip

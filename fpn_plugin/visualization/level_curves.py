"""Curves of each pyramid level's statistics in a training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from .figures import save
from .palette import level_color, level_title

__all__ = ["FIGURES", "plot_level_curves"]

FIGURES = {
    "rois": "RoIs an image",
    "foreground": "foreground share of RoIs",
    "anchors_matched": "anchors matched an image",
    "rpn_recall": "RPN recall, IoU 0.5",
    "share": "share of the loss",
    "feature_norm": "feature norm",
}
_MARKERS = ("o", "s", "^", "D", "v", "P")
_SMOOTHED = 5


def plot_level_curves(
    statistics: Mapping[str, Mapping[str, Sequence[tuple[int, float]]]], path: Path
) -> Path:
    """Draws a panel for each figure of :func:`fpn_plugin.utils.metrics.level_rows`.

    Each level is a line, the running mean of five points. The points are faint.

    Args:
        statistics: ``{figure: {level: [(iteration, value), ...]}}``.
        path: the file to write, which is returned; its suffix sets the format.
    """
    shown = [name for name in FIGURES if name in statistics]
    rows = -(-len(shown) // 3)
    figure = Figure(figsize=(12, 3.3 * rows + 0.5), dpi=110, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    grid = figure.subplots(rows, 3, squeeze=False)
    levels = sorted({level for name in shown for level in statistics[name]})
    for axes, name in zip(grid.flat, shown, strict=False):
        for level, points in sorted(statistics[name].items()):
            iterations, values = (np.array(v, dtype=float) for v in zip(*points, strict=True))
            marker = _MARKERS[levels.index(level) % len(_MARKERS)]
            axes.plot(iterations, values, marker, ms=3, alpha=0.3, color=level_color(level))
            axes.plot(
                iterations, _running_mean(values), color=level_color(level), lw=2, marker=marker,
                markevery=(0.05, 0.2), ms=7, label=level_title(level),
            )  # fmt: skip
        axes.set_title(FIGURES[name], fontsize=13)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in list(grid.flat)[len(shown) :]:
        axes.set_axis_off()
    for axes in grid[-1]:
        axes.set_xlabel("iteration", fontsize=11)
    handles = {}
    for axes in grid.flat:
        handles.update(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        [handles[name] for name in sorted(handles)], sorted(handles), ncols=max(len(handles), 1),
        loc="outside lower center", fontsize=12,
    )  # fmt: skip
    return save(figure, path)


def _running_mean(values: np.ndarray) -> np.ndarray:
    window = min(_SMOOTHED, len(values))
    padded = np.pad(values, (window // 2, window - 1 - window // 2), mode="edge")
    return np.convolve(padded, np.ones(window) / window, mode="valid")

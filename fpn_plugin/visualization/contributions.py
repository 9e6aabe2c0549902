"""A picture of what each level of a pyramid contributes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from fpn_plugin.inspection.forward_trace import ForwardTrace

from .figures import panels, save
from .palette import INK, level_color, level_title

__all__ = ["contributions", "draw_contributions"]

_BEST = 100  # proposals, as in AR@100


def contributions(
    traces: Sequence[ForwardTrace], threshold: float = 0.5
) -> dict[str, dict[str, int]]:
    """Counts the anchors, proposals and detections that came from each level, over images.

    Args:
        traces: of images by one model.
        threshold: lowest score of a detection that counts.

    Returns:
        ``{figure: {level: count}}``. Figures that need a part that the model lacks, or missing
        labels, are left out.
    """
    counted: dict[str, dict[str, int]] = {}
    for trace in traces:
        sure = correct = None
        if trace.detections is not None and trace.pooled is not None:
            sure = trace.detections.chosen(trace.detections.scores >= threshold)
            correct = trace.correct(threshold)
        for figure, regions in (
            ("anchors that matched", trace.matched),
            ("proposals made", trace.proposed),
            (f"objects in {_BEST} best", trace.covering(_BEST)),
            ("proposals pooled", trace.pooled),
            ("detections", sure),
            ("correct detections", correct),
        ):
            if regions is not None:
                by_level = counted.setdefault(figure, dict.fromkeys(trace.features, 0))
                for level in regions.levels:
                    by_level[level] = by_level.get(level, 0) + 1
    return counted


def draw_contributions(
    counted: Sequence[dict[str, dict[str, int]]], labels: Sequence[str], path: Path, images: int
) -> Path:
    """Draws the counts of :func:`contributions`, a row for each model.

    Args:
        counted: of each model; at least one has a figure.
        labels: the models' names.
        path: the file to write; its suffix sets the format.
        images: how many were counted.

    Returns:
        ``path``.
    """
    figures = list(dict.fromkeys(figure for of_model in counted for figure in of_model))
    most = max(len(levels) for of_model in counted for levels in of_model.values())
    # One model's figures are wrapped; of several models, each has a row.
    across = min(len(figures), 3) if len(counted) == 1 else len(figures)
    rows = -(-len(figures) // across) * len(counted)
    size = 1.0 + 2.7 * across, 0.9 + rows * (0.75 + 0.36 * most)
    figure, grid = panels(rows, across, size)
    for row, of_model, label in zip(grid.reshape(len(counted), -1), counted, labels, strict=True):
        for axes, name in zip(row, figures, strict=False):
            if name in of_model:
                axes.set_axis_on()
                _draw_bars(axes, of_model[name])
                axes.set_title(name, fontsize=13)
        row[0].set_ylabel(label, fontsize=14)
    title = f"What each level contributed: shares, and counts in {images} image"
    figure.suptitle(title + "s" * (images != 1), fontsize=15)
    return save(figure, path)


def _draw_bars(axes: Axes, by_level: dict[str, int]) -> None:
    levels = list(by_level)
    whole = max(sum(by_level.values()), 1)
    shares = [100 * by_level[level] / whole for level in levels]
    colors = [level_color(level or None) for level in levels]
    axes.barh(range(len(levels)), shares, color=colors, height=0.75)
    for row, (share, level) in enumerate(zip(shares, levels, strict=True)):
        axes.text(share + 2, row, f"{by_level[level]:,}", va="center", fontsize=12, color=INK)
    names = [level_title(level) if level else "none" for level in levels]
    axes.set_yticks(range(len(levels)), names, fontsize=12)
    axes.invert_yaxis()
    axes.set_xlim(0, 135)
    axes.set_xticks([0, 50, 100], ["0", "50", "100%"], fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)

"""Pictures of pooled boxes and of matched anchors, in the colours of their levels."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from fpn_plugin.inspection.forward_trace import ForwardTrace, Regions

from .figures import outline, panels, save
from .keypoints import KeypointLayout, draw_keypoints
from .palette import INK, level_color, level_title, text_color

__all__ = ["draw_anchors", "draw_pooling"]

_PANEL_INCHES = 4.2


def draw_pooling(
    traces: Sequence[ForwardTrace],
    labels: Sequence[str],
    path: Path,
    proposals: int = 100,
    threshold: float = 0.5,
    class_names: Sequence[str] = (),
    layout: KeypointLayout | None = None,
    class_colors: Sequence[str] = (),
) -> Path:
    """Draws proposals and detections in the colour of the level they were pooled from.

    Detections may have the colour of their class instead. Proposals of a model without a box head
    have the colour of their anchors' level.

    Args:
        traces: of one image. Of several models, each has a column; one model has a row of panels.
        labels: the models' names.
        path: the file to write; its suffix sets the format.
        proposals: how many of the best to draw.
        threshold: lowest score of a detection to draw.
        class_names: of the detections.
        layout: names and skeleton of their keypoints.
        class_colors: of the detections; by default they have the colours of their levels.

    Returns:
        ``path``.
    """
    shown = (proposals, threshold, class_names, bool(class_colors))
    columns = [_panels(trace, *shown) for trace in traces]
    deep = max(map(len, columns))
    shape = (1, deep) if len(columns) == 1 else (deep, len(columns))
    figure, grid = _figure(traces[0], shape, _PANEL_INCHES)
    for number, (label, column) in enumerate(zip(labels, columns, strict=True)):
        for place, (title, regions, texts) in enumerate(column):
            axes = grid[0, place] if len(columns) == 1 else grid[place, number]
            axes.imshow(traces[number].image)
            axes.set_title(f"{label}: {title}" if len(columns) > 1 else title, fontsize=14)
            colors = _level_colors(regions)
            if texts and class_colors:  # of detections
                colors = [class_colors[c % len(class_colors)] for c in regions.classes.tolist()]
            _draw_regions(axes, regions, colors, texts)
            points = () if regions.keypoints is None else regions.keypoints.tolist()
            for of_object, color in zip(points, colors, strict=False):
                keypoints = [tuple(xy) for xy in of_object]
                draw_keypoints(axes, keypoints, layout or KeypointLayout(), color)
    drawn = [regions for column in columns for _, regions, _ in column]
    _legend(figure, drawn, f"{labels[0]}: " if len(columns) == 1 else "")
    return save(figure, path)


def _panels(
    trace: ForwardTrace,
    proposals: int,
    threshold: float,
    class_names: Sequence[str],
    by_class: bool,
) -> list[tuple[str, Regions, list[str]]]:
    """Title, boxes and their texts of each panel."""
    shown = []
    if trace.pooled is not None:
        best = trace.pooled.first(proposals)
        shown.append((f"{len(best)} best proposals, where pooled", best, []))
    elif trace.proposed is not None:
        best = trace.proposed.first(proposals)
        shown.append((f"{len(best)} best proposals,\nby the level of their anchors", best, []))
    if trace.detections is not None:
        sure = trace.detections.chosen(trace.detections.scores >= threshold)
        texts = [
            f"{class_names[c] if c < len(class_names) else c} {score:.2f}"
            for c, score in zip(sure.classes.tolist(), sure.scores.tolist(), strict=True)
        ]
        where = ", where pooled" if trace.pooled is not None else ""
        where = ", by class" if by_class else where
        shown.append((f"{len(sure)} detections{where}", sure, texts))
    return shown


def draw_anchors(trace: ForwardTrace, path: Path) -> Path:
    """Draws the anchors of each level that match ground truth. Ground truth is dashed and white.

    Args:
        trace: with labels.
        path: the file to write, which is returned; its suffix sets the format.
    """
    # All levels if none has matched anchors.
    levels = set(trace.matched.levels) or set(trace.features)
    names = [name for name in trace.features if name in levels]
    faded = (trace.image * 0.55).astype(np.uint8)
    figure, grid = _figure(trace, (1, len(names)), inches=3.0)
    for axes, name in zip(grid[0], names, strict=True):
        chosen = [level == name for level in trace.matched.levels]
        of_level = trace.matched.chosen(torch.tensor(chosen, dtype=torch.bool))
        axes.imshow(faded)
        for x0, y0, x1, y1 in trace.truths.boxes.tolist():
            axes.add_patch(
                Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec="white", lw=1.4, ls="--")
            )
        _draw_regions(axes, of_level, _level_colors(of_level), [], width=2.0)
        plural = "anchor" if len(of_level) == 1 else "anchors"
        axes.set_title(f"{level_title(name)}: {len(of_level)} {plural}", fontsize=14)
    figure.suptitle("Anchors that match ground truth (dashed), by level", fontsize=15)
    return save(figure, path)


def _figure(
    trace: ForwardTrace, shape: tuple[int, int], inches: float
) -> tuple[Figure, np.ndarray]:
    height = inches * trace.image.shape[0] / trace.image.shape[1]
    size = (inches * shape[1] + 0.2, (height + 0.45) * shape[0] + 0.6)
    return panels(*shape, size)


def _level_colors(regions: Regions) -> list[str]:
    return [level_color(level or None) for level in regions.levels]


def _draw_regions(
    axes: Axes,
    regions: Regions,
    colors: Sequence[str],
    texts: Sequence[str],
    width: float = 1.6,
) -> None:
    # The best last, on top of the others.
    for index in reversed(range(len(regions))):
        x0, y0, x1, y1 = regions.boxes[index].tolist()
        color = colors[index]
        outline(axes, (x0, y0, x1, y1), color, width)
        if texts:
            room = y0 > 14
            right = x0 > 0.7 * axes.get_xlim()[1]  # else the text leaves the picture
            axes.text(
                x1 if right else x0, y0 if room else y1, texts[index], fontsize=9,
                color=text_color(color),
                ha="right" if right else "left", va="bottom" if room else "top", clip_on=True,
                bbox={"facecolor": color, "edgecolor": "none", "pad": 0.9, "alpha": 0.95},
            )  # fmt: skip


def _legend(figure: Figure, drawn: Sequence[Regions], label: str) -> None:
    levels = sorted({level for regions in drawn for level in regions.levels})
    if not levels:
        return
    handles = [
        Patch(fc=level_color(v or None), ec=INK, label=level_title(v) if v else "no level")
        for v in levels
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(levels), fontsize=13,
        title=f"{label}pyramid level", title_fontsize=12,
    )  # fmt: skip

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

from .keypoints import KeypointLayout, draw_keypoints
from .palette import INK, level_color, level_title

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
) -> Path:
    """Draws proposals and detections in the colour of the level they were pooled from.

    Proposals of a model without a box head have the colour of their anchors' level.

    Args:
        traces: of one image. Several models have a column each, one model a row of panels.
        labels: the models' names.
        path: the file to write; its suffix sets the format.
        proposals: how many of the best to draw.
        threshold: lowest score of a detection to draw.
        class_names: of the detections.
        layout: names and skeleton of their keypoints.

    Returns:
        ``path``.
    """
    columns = [_panels(trace, proposals, threshold, class_names) for trace in traces]
    deep = max(map(len, columns))
    shape = (1, deep) if len(columns) == 1 else (deep, len(columns))
    figure, grid = _figure(traces[0], shape)
    for number, (label, panels) in enumerate(zip(labels, columns, strict=True)):
        for place, (title, regions, texts) in enumerate(panels):
            axes = grid[0, place] if len(columns) == 1 else grid[place, number]
            axes.imshow(traces[number].image)
            axes.set_title(f"{label}: {title}" if len(columns) > 1 else title, fontsize=14)
            _draw_regions(axes, regions, texts)
            _draw_keypoints(axes, regions, layout or KeypointLayout())
    drawn = [regions for panels in columns for _, regions, _ in panels]
    _legend(figure, drawn, f"{labels[0]}: " if len(columns) == 1 else "")
    return _saved(figure, path)


def _panels(
    trace: ForwardTrace, proposals: int, threshold: float, class_names: Sequence[str]
) -> list[tuple[str, Regions, list[str]]]:
    """Title, boxes and their texts of each panel."""
    panels = []
    if trace.pooled is not None:
        best = trace.pooled.first(proposals)
        panels.append((f"{len(best)} best proposals, where pooled", best, []))
    elif trace.proposed is not None:
        best = trace.proposed.first(proposals)
        panels.append((f"{len(best)} best proposals,\nby the level of their anchors", best, []))
    if trace.detections is not None:
        sure = trace.detections.chosen(trace.detections.scores >= threshold)
        texts = [
            f"{class_names[c] if c < len(class_names) else c} {score:.2f}"
            for c, score in zip(sure.classes.tolist(), sure.scores.tolist(), strict=True)
        ]
        where = ", where pooled" if trace.pooled is not None else ""
        panels.append((f"{len(sure)} detections{where}", sure, texts))
    return panels


def draw_anchors(trace: ForwardTrace, path: Path) -> Path:
    """Draws the anchors of each level that match ground truth, which is dashed and white.

    Args:
        trace: with labels.
        path: the file to write; its suffix sets the format.

    Returns:
        ``path``.
    """
    names = [name for name in trace.features if name in _anchor_levels(trace)]
    figure, grid = _figure(trace, (1, len(names)), inches=3.0)
    for axes, name in zip(grid[0], names, strict=True):
        of_level = trace.matched.chosen(_is(trace.matched, name))
        axes.imshow(_faded(trace.image))
        for x0, y0, x1, y1 in trace.truths.boxes.tolist():
            axes.add_patch(
                Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec="white", lw=1.4, ls="--")
            )
        _draw_regions(axes, of_level, [], width=2.0)
        plural = "anchor" if len(of_level) == 1 else "anchors"
        axes.set_title(f"{level_title(name)}: {len(of_level)} {plural}", fontsize=14)
    figure.suptitle("Anchors that match ground truth (dashed), by level", fontsize=15)
    return _saved(figure, path)


def _anchor_levels(trace: ForwardTrace) -> set[str]:
    # All levels if none has matched anchors.
    return set(trace.matched.levels) or set(trace.features)


def _is(regions: Regions, name: str) -> torch.Tensor:
    return torch.tensor([level == name for level in regions.levels], dtype=torch.bool)


def _faded(image: np.ndarray) -> np.ndarray:
    return (image * 0.55).astype(np.uint8)


def _figure(
    trace: ForwardTrace, shape: tuple[int, int], inches: float = _PANEL_INCHES
) -> tuple[Figure, np.ndarray]:
    height = inches * trace.image.shape[0] / trace.image.shape[1]
    size = (inches * shape[1] + 0.2, (height + 0.45) * shape[0] + 0.6)
    figure = Figure(figsize=size, dpi=130, layout="constrained")
    grid = figure.subplots(*shape, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    return figure, grid


def _draw_regions(axes: Axes, regions: Regions, texts: Sequence[str], width: float = 1.6) -> None:
    # The best last, on top of the others.
    for index in reversed(range(len(regions))):
        x0, y0, x1, y1 = regions.boxes[index].tolist()
        color = level_color(regions.levels[index] or None)
        for line, shade in ((width + 1.4, INK), (width, color)):
            axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, ec=shade, lw=line))
        if texts:
            room = y0 > 14
            right = x0 > 0.7 * axes.get_xlim()[1]  # the text would leave the picture
            axes.text(
                x1 if right else x0, y0 if room else y1, texts[index], fontsize=9, color="black",
                ha="right" if right else "left", va="bottom" if room else "top", clip_on=True,
                bbox={"facecolor": color, "edgecolor": "none", "pad": 0.9, "alpha": 0.95},
            )  # fmt: skip


def _draw_keypoints(axes: Axes, regions: Regions, layout: KeypointLayout) -> None:
    for index, points in enumerate(() if regions.keypoints is None else regions.keypoints.tolist()):
        draw_keypoints(
            axes, [tuple(xy) for xy in points], layout, level_color(regions.levels[index] or None)
        )


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


def _saved(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.1)
    return path

"""A picture of a model's levels and parts."""

from __future__ import annotations

import math
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from fpn_plugin.inspection.anatomy import Anatomy

from .figures import save
from .palette import CATEGORY_COLORS, GRAY, INK, level_color, level_title

__all__ = ["draw_anatomy"]

_ANCHORS = {"ls": "", "marker": "D", "ms": 8, "mfc": "white", "mec": INK, "mew": 1.6}
_LEGEND = {"fontsize": 11, "ncols": 2, "loc": "upper center", "frameon": False,
           "bbox_to_anchor": (0.5, -0.2)}  # fmt: skip


def draw_anatomy(anatomy: Anatomy, path: Path, title: str = "") -> Path:
    """Draws the box sizes and anchors of each level, and parameters and multiply-adds of each part.

    Args:
        anatomy: of a model.
        path: the file to write, which is returned; its suffix sets the format.
        title: of the picture.
    """
    rows = max(len(anatomy.levels), len(anatomy.parts))
    figure = Figure(figsize=(12, 2.2 + 0.52 * rows), dpi=130, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[1.25, 1])
    height, width = anatomy.input_size
    figure.suptitle(f"{title}: input {width} x {height} px".removeprefix(": "), fontsize=15)
    _draw_sizes(left, anatomy)
    _draw_parts(right, anatomy)
    return save(figure, path)


def _draw_sizes(axes: Axes, anatomy: Anatomy) -> None:
    ends = [v for s in anatomy.sizes for v in (s.low, s.high) if 0 < v < math.inf]
    ends += [size for level in anatomy.levels for size in level.anchor_sizes]
    low = min(ends, default=16) / 2.5
    high = max(ends, default=512) * 2.5
    bands = {sizes.level: sizes for sizes in anatomy.sizes}
    for row, level in enumerate(anatomy.levels):
        if level.name in bands:
            sizes, color = bands[level.name], level_color(level.name)
            start, end = max(sizes.low, low), min(sizes.high, high)
            axes.barh(row, end - start, left=start, height=0.72, color=color, alpha=0.75)
            # A bar of one octave is narrower than its label, which stands to its left.
            octave = (start, end) == (sizes.low, sizes.high)
            at, align = (start / 1.06, "right") if octave else (math.sqrt(start * end), "center")
            text = {"ha": align, "va": "center", "fontsize": 11, "color": INK}
            axes.text(at, row - 0.19, _range_text(sizes.low, sizes.high), **text)
        if level.anchor_sizes:
            axes.plot(level.anchor_sizes, [row + 0.14] * len(level.anchor_sizes), **_ANCHORS)
    names = [
        f"{level_title(v.name)}  stride {v.stride}\n{v.width} x {v.height} x {v.channels}"
        for v in anatomy.levels
    ]
    axes.set_yticks(range(len(names)), names, fontsize=11)
    axes.set_ylim(len(names) - 0.5, -0.5)  # with rows that have no bar
    axes.set_xscale("log", base=2)
    axes.set_xlim(low, high)
    powers = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    axes.set_xticks([2**p for p in powers], [str(2**p) for p in powers], fontsize=11)
    axes.set_xlabel("box size sqrt(w h), pixels of the network's input", fontsize=12)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    shown = []
    if anatomy.sizes:
        shown.append(Patch(color=GRAY, alpha=0.75, label="boxes pooled from the level"))
    if any(level.anchor_sizes for level in anatomy.levels):
        shown.append(Line2D([], [], label="anchors of the level", **_ANCHORS))
    if shown:
        axes.legend(handles=shown, **_LEGEND)
    title = "Levels"
    if anatomy.canonical is not None:
        title += ", and Eq. (1) with k0 = {} at {:g} px".format(*anatomy.canonical)
    axes.set_title(title, fontsize=13)


def _range_text(low: float, high: float) -> str:
    if low == 0:
        return f"below {high:g}"
    return f"{low:g} and up" if math.isinf(high) else f"{low:g} to {high:g}"


def _draw_parts(axes: Axes, anatomy: Anatomy) -> None:
    parts = anatomy.parts
    for offset, values, color, unit, prefix, divisor in (
        (-0.2, [p.parameters for p in parts], CATEGORY_COLORS[0], "parameters", "M", 1e6),
        (0.2, [p.multiply_adds for p in parts], CATEGORY_COLORS[1], "multiply-adds", "G", 1e9),
    ):
        whole = max(sum(values), 1)
        rows = [row + offset for row in range(len(parts))]
        label = f"{whole / divisor:.3g} {prefix} {unit}"
        axes.barh(rows, [100 * v / whole for v in values], height=0.36, color=color, label=label)
        for row, value in zip(rows, values, strict=True):
            text = f" {value / divisor:.3g} {prefix}"
            axes.text(100 * value / whole, row, text, va="center", fontsize=11, color=INK)
    axes.set_yticks(range(len(parts)), [part.name for part in parts], fontsize=12)
    axes.invert_yaxis()
    axes.set_xlim(0, 118)
    axes.set_xticks([0, 25, 50, 75, 100])
    axes.set_xlabel("share of the model (%)", fontsize=12)
    axes.set_title("Parameters and multiply-adds by part", fontsize=13)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(**_LEGEND)

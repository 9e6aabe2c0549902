"""Charts of a dataset and a pyramid: sizes by level, anchors among boxes, IoU by size."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from fpn_plugin.visualization import level_color
from fpn_plugin.visualization.palette import BLUE, GRAY, GREEN, ORANGE, PURPLE, VERMILION

from .fit import Fit
from .measures import Measures

__all__ = ["draw"]

_FONT = {"font.size": 13}
_MOST_TICKS = 8
_POINTS = 4_000  # boxes in the scatter plot


def draw(fit: Fit, folder: Path) -> list[Path]:
    """Draws levels.png, shapes.png, anchors.png and input_sizes.png; returns their paths.

    Args:
        fit: the fit.
        folder: of the files.
    """
    charts = {
        "levels": _levels,
        "shapes": _shapes,
        "anchors": _anchors,
        "input_sizes": _input_sizes,
    }
    paths = [folder / f"{name}.png" for name in charts]
    with matplotlib.rc_context(_FONT):
        for path, chart in zip(paths, charts.values(), strict=True):
            chart(fit).savefig(path)
    return paths


def _log_pixels(
    axes: Axes, values: np.ndarray, which: str = "x", all_of: Iterable[float] = ()
) -> None:
    """Makes an axis logarithmic to base 2, over most of ``values`` and the whole of ``all_of``."""
    ends = [*np.percentile(values, (0.1, 99.9)), *all_of]
    low, high = min(ends) / 1.3, max(ends) * 1.3
    first, last = np.floor(np.log2(low)), np.ceil(np.log2(high))
    exponents = np.arange(first, last + 1, max((last - first) // _MOST_TICKS, 1))
    axis = getattr(axes, f"{which}axis")
    getattr(axes, f"set_{which}scale")("log", base=2)
    axis.set_ticks(2.0**exponents)
    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:.3g}" if value < 1 else f"{value:.0f}")
    )
    axis.set_minor_formatter(NullFormatter())
    getattr(axes, f"set_{which}lim")(low, high)


def _levels(fit: Fit) -> Figure:
    """Sizes at the input, each bar divided among the levels that Eq. (1) pools from."""
    rows = [("as it is", fit.before), ("fitted", fit.after)][: 1 + fit.changed]
    figure = Figure(figsize=(9, 1.2 + 3.2 * len(rows)), dpi=120, layout="constrained")
    all_axes = figure.subplots(len(rows), 1, sharex=True, squeeze=False)[:, 0]
    sizes = np.concatenate([found.size for _, found in rows])
    low, high = np.log2(np.percentile(sizes, (0.1, 99.9)))
    anchors = [size for _, found in rows for of_level in found.pyramid.sizes for size in of_level]
    bins = np.exp2(np.arange(np.floor(low * 4) / 4, np.ceil(high * 4) / 4 + 0.25, 0.25))
    for axes, (name, found) in zip(all_axes, rows, strict=True):
        pyramid = found.pyramid
        levels = sorted({*pyramid.anchor_levels, *pyramid.roi_levels})
        axes.hist(
            [found.size[found.level == level] for level in levels], bins=bins, stacked=True,
            weights=[np.full((found.level == each).sum(), 1 / len(found.size)) for each in levels],
            color=[level_color(level) for level in levels], edgecolor="white", linewidth=0.5,
            label=[f"P{level}  {(found.level == level).mean():.0%}" for level in levels],
        )  # fmt: skip
        axes.margins(y=0.16)
        for level, of_level in zip(pyramid.anchor_levels, pyramid.sizes, strict=True):
            axes.plot(
                of_level, [0.95] * len(of_level), "v", color=level_color(level), mec="black", ms=9,
                transform=axes.get_xaxis_transform(),
            )  # fmt: skip
        where = "pooled from" if pyramid.roi_levels else "found at by its best anchor"
        axes.set_title(f"{name}: level that an object is {where}")
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        axes.set_ylabel("objects")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        _log_pixels(axes, sizes, all_of=anchors)
    all_axes[-1].set_xlabel("object size sqrt(w h), pixels of the input;  ▼ anchor sizes")
    return figure


def _series(fit: Fit) -> list[tuple[str, Measures, str, str]]:
    # They differ in marker too, not only in colour.
    return [("as they are", fit.before, VERMILION, "D"), ("fitted", fit.after, BLUE, "o")]


def _shapes(fit: Fit) -> Figure:
    """Widths and heights of objects, and the anchors among them."""
    series = _series(fit)[: 1 + (fit.after.pyramid != fit.before.pyramid or fit.resized)]
    figure = Figure(figsize=(1 + 6.5 * len(series), 7), dpi=120, layout="constrained")
    all_axes = figure.subplots(1, len(series), sharex=True, sharey=True, squeeze=False)[0]
    points, shapes = [], []
    for axes, (name, found, color, marker) in zip(all_axes, series, strict=True):
        few = np.random.default_rng(0).permutation(len(found.size))[:_POINTS]
        root = np.sqrt(found.aspect[few])
        points.append(np.column_stack([found.size[few] / root, found.size[few] * root]))
        shapes.append(np.concatenate(found.pyramid.anchor_shapes()))
        axes.scatter(
            *points[-1].T, s=12, color=GRAY, alpha=0.5, lw=0, label="objects", rasterized=True
        )
        axes.plot(*shapes[-1].T, marker, color=color, mec="black", ms=9, label=f"anchors {name}")
        axes.set_xlabel("width, pixels of the input")
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left")
    every = np.concatenate(points), np.concatenate(shapes)
    for axis, which in enumerate("xy"):
        _log_pixels(all_axes[0], every[0][:, axis], which, every[1][:, axis])
    all_axes[0].set_ylabel("height")
    return figure


def _anchors(fit: Fit) -> Figure:
    """Best IoU and recall of anchors by octave of size."""
    figure = Figure(figsize=(10, 4.6), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    for name, found, color, marker in _series(fit)[: 1 + fit.changed]:
        rows = [row for row in found.octaves() if row["share"] >= 0.001]
        at = [row["from"] * 2**0.5 for row in rows]
        left.plot(at, [row["mean_iou"] for row in rows], marker=marker, color=color, label=name)
        for key, style in (("recall_50", "-"), ("recall_70", "--")):
            label, values = f"{name}, IoU 0.{key[-2]}", [row[key] for row in rows]
            right.plot(at, values, style, marker=marker, color=color, label=label)
    left.set_title("mean IoU with the best anchor")
    right.set_title("objects with an anchor of that IoU")
    right.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    for axes in (left, right):
        axes.set_ylim(0, 1.03)
        axes.grid(alpha=0.3)
        axes.set_xlabel("object size, pixels of the input")
        _log_pixels(axes, fit.before.size)
    left.legend()
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower right", ncols=4)
    return figure


def _input_sizes(fit: Fit) -> Figure:
    """The effect of the input size on the config as it is."""
    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    axes = figure.subplots()
    rows = [row for row in fit.input_sizes if row["factor"] == row["max_factor"]]
    factors = [row["factor"] for row in rows]
    series = (
        ("recall_50", "anchor recall at IoU 0.5", GREEN, "o"),
        ("recall_70", "anchor recall at IoU 0.7", BLUE, "s"),
        ("below_2_cells", "objects under 2 cells of their level", VERMILION, "D"),
        ("clamped_fine", "below the finest level by Eq. (1)", PURPLE, "^"),
        ("clamped_coarse", "above the coarsest", ORANGE, "v"),
    )
    for key, label, color, marker in series:
        axes.plot(
            factors, [row[key] for row in rows], marker=marker, color=color, label=label, ms=8
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(factors, [f"x {factor:g}" for factor in factors])
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_ylim(-0.03, 1.03)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_xlabel("input size over the config's; its pyramid as it is")
    axes.set_ylabel("objects")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    return figure

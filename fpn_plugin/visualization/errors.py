"""Pictures of a detector's errors: their shares, and the worst ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from fpn_plugin.inspection.errors import FALSE_ALARM_KINDS, MISS_KINDS, SIZES, Errors, Mistake

from .figures import outline, panels, save
from .palette import CATEGORY_COLORS, GRAY, INK, level_color, level_title

__all__ = ["draw_confusion", "draw_mistakes", "plot_errors"]

_WITH_COUNTS = 25  # classes of a confusion matrix whose cells have room for numbers
_NAME_LENGTH = 24  # of a file, under a picture


def plot_errors(errors: Errors, levels: Sequence[str], path: Path) -> Path:
    """Draws shares of objects missed and of detections that are false, by size and by level.

    Args:
        errors: of a detector on a dataset.
        levels: names, finest first; if empty, errors are drawn by size only.
        path: the file to write, which is returned; its suffix sets the format.
    """
    places = [(SIZES, "size"), *([(levels, "level")] if levels else [])]
    figure = Figure(figsize=(12 if levels else 8, 6.6), dpi=110, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    ratios = [len(groups) for groups, _ in places]
    grid = figure.subplots(2, len(places), width_ratios=ratios, squeeze=False)
    rows = (
        ("objects missed", MISS_KINDS, errors.missed_in),
        ("detections that are false", FALSE_ALARM_KINDS, errors.false_in),
    )
    for row, (title, kinds, counts_in) in zip(grid, rows, strict=True):
        for axes, (groups, name) in zip(row, places, strict=True):
            _stack(axes, groups, [counts_in(group) for group in groups], kinds)
            axes.set_title(f"{title}, by {name}", fontsize=13)
        row[0].set_ylabel("share (%)", fontsize=12)
        # Column 0 always has bars.
        place = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)}
        row[-1].legend(*row[0].get_legend_handles_labels(), fontsize=11, frameon=False, **place)
    return save(figure, path)


def _stack(
    axes: Axes, groups: Sequence[str], counts: Sequence[tuple[int, ...]], kinds: Sequence[str]
) -> None:
    """Stacks the kinds of each group; its counts are all, the mistakes, and those of each kind."""
    totals, wrong, *by_kind = np.array(counts).T
    bottom = np.zeros(len(groups))
    styles = zip(kinds, by_kind, CATEGORY_COLORS, ("", "//", "..", "xx"), strict=False)
    for kind, of_kind, color, hatch in styles:
        shares = 100 * of_kind / np.maximum(totals, 1)
        style = {"color": color, "hatch": hatch, "edgecolor": "white", "width": 0.7}
        axes.bar(range(len(groups)), shares, bottom=bottom, label=kind, **style)
        bottom += shares
    for place, height in enumerate(bottom):
        text, style = f"{wrong[place]} of {totals[place]}", {"fontsize": 11, "color": INK}
        axes.text(place, height + 2, text, ha="center", va="bottom", **style)
    axes.set_xticks(range(len(groups)), [level_title(g) for g in groups], fontsize=12)
    axes.set_ylim(0, 115)
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.spines[["top", "right"]].set_visible(False)


def draw_mistakes(
    mistakes: Sequence[Mistake],
    image_of: Callable[[int], np.ndarray],
    files: Mapping[int, str],
    path: Path,
) -> Path:
    """Draws the surroundings of each mistake, its box in the colour of its level.

    The name of the image's file is under it.

    Args:
        mistakes: the ones to draw, six in a row.
        image_of: uint8 RGB ``(H, W, 3)`` of an image id.
        files: names of the files, by image id.
        path: the file to write, which is returned; its suffix sets the format.
    """
    columns = 6
    rows = max(-(-len(mistakes) // columns), 1)
    figure, grid = panels(rows, columns, (12, 2.75 * rows), dpi=100)
    figure.get_layout_engine().set(h_pad=0.1)
    for axes, mistake in zip(grid.flat, mistakes, strict=False):
        image = image_of(mistake.image_id)
        x, y, width, height = mistake.box
        half = max(1.1 * max(width, height), 16)
        axes.imshow(image)
        # A square around the box, moved and cut to what the image has.
        half = min(half, min(image.shape[:2]) / 2)
        across = np.clip(x + width / 2, half, image.shape[1] - half)
        down = np.clip(y + height / 2, half, image.shape[0] - half)
        axes.set_xlim(across - half, across + half)
        axes.set_ylim(down + half, down - half)
        outline(axes, (x, y, x + width, y + height), level_color(mistake.level or None), 2.2)
        score = f" {mistake.score:.2f}" if mistake.score else ""
        level = f", {level_title(mistake.level)}" if mistake.level else ""
        axes.set_title(
            f"{mistake.category}{score}\n{width:.0f} x {height:.0f} px{level}\n{mistake.kind}",
            fontsize=10,
        )
        name = Path(files[mistake.image_id]).name
        if len(name) > _NAME_LENGTH:
            name = f"{name[: _NAME_LENGTH // 2 - 1]}…{name[-_NAME_LENGTH // 2 :]}"
        under = {"transform": axes.transAxes, "ha": "center", "va": "top", "color": INK}
        axes.text(0.5, -0.02, name, fontsize=8, parse_math=False, **under)
    return save(figure, path)


def draw_confusion(counts: np.ndarray, names: Sequence[str], path: Path) -> Path:
    """Draws a confusion matrix. The darker a cell, the larger its share of the row.

    Args:
        counts: see :func:`fpn_plugin.inspection.errors.confusion`.
        names: of the classes.
        path: the file to write, which is returned; its suffix sets the format.
    """
    side = min(3.5 + 0.45 * len(names), 13)
    figure = Figure(figsize=(side, side), dpi=110, layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    if len(names) <= _WITH_COUNTS:
        for (row, column), count in np.ndenumerate(counts):
            if row == column == len(names):
                continue  # no detection of no object
            color = "white" if shares[row, column] > 0.5 else INK if count else GRAY
            axes.text(column, row, str(count), ha="center", va="center", color=color, fontsize=9)
    size = 10 if len(names) <= _WITH_COUNTS else 5
    places = range(len(names) + 1)
    style = {"fontsize": size, "parse_math": False}
    axes.set_xticks(places, [*names, "missed"], rotation=90, **style)
    axes.set_yticks(places, [*names, "no object"], **style)
    axes.set_xlabel("detected as", fontsize=12)
    axes.set_ylabel("labelled as", fontsize=12)
    return save(figure, path)

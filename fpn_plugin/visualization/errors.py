"""Pictures of a detector's errors: how many, and the worst of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from fpn_plugin.inspection.errors import FALSE_ALARM_KINDS, MISS_KINDS, SIZES, Errors, Mistake

from .palette import CATEGORY_COLORS, INK, level_color, level_title

__all__ = ["draw_mistakes", "plot_errors"]


def plot_errors(errors: Errors, levels: Sequence[str], path: Path) -> Path:
    """Draws shares of objects missed and of detections that are false, by size and by level.

    Args:
        errors: of a detector on a dataset.
        levels: names, finest first; without any, errors are drawn by size only.
        path: the file to write; its suffix sets the format.

    Returns:
        ``path``.
    """
    places = [(SIZES, 0, "size")]
    if levels:
        places.append((levels, 1, "level"))
    figure = Figure(figsize=(12 if levels else 8, 6.6), dpi=110, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.1)
    ratios = [len(groups) for groups, _, _ in places]
    grid = figure.subplots(2, len(places), width_ratios=ratios, squeeze=False)
    for row, (mistakes, wholes, kinds, title) in enumerate(
        (
            (errors.misses, errors.objects, MISS_KINDS, "objects missed"),
            (
                errors.false_alarms,
                errors.detections,
                FALSE_ALARM_KINDS,
                "detections that are false",
            ),
        )
    ):
        for axes, (groups, place, name) in zip(grid[row], places, strict=True):
            totals = [sum(n for key, n in wholes.items() if key[place] == g) for g in groups]
            counts = [
                [sum(m.kind == kind and (m.size, m.level)[place] == g for m in mistakes)
                 for g in groups]
                for kind in kinds
            ]  # fmt: skip
            _stack(axes, groups, counts, totals, kinds)
            axes.set_title(f"{title}, by {name}", fontsize=13)
        grid[row, 0].set_ylabel("share (%)", fontsize=12)
        # Column 0 always has bars.
        handles, names = grid[row, 0].get_legend_handles_labels()
        grid[row, -1].legend(
            handles, names, loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=11,
            frameon=False,
        )  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.12)
    return path


def _stack(
    axes: Axes,
    groups: Sequence[str],
    counts: Sequence[Sequence[int]],
    totals: Sequence[int],
    kinds: Sequence[str],
) -> None:
    bottom = np.zeros(len(groups))
    hatches = ("", "//", "..", "xx")
    for index, (kind, of_kind) in enumerate(zip(kinds, counts, strict=True)):
        shares = 100 * np.array(of_kind) / np.maximum(totals, 1)
        axes.bar(
            range(len(groups)), shares, bottom=bottom, label=kind, color=CATEGORY_COLORS[index],
            hatch=hatches[index], edgecolor="white", width=0.7,
        )  # fmt: skip
        bottom += shares
    for place, (height, total) in enumerate(zip(bottom, totals, strict=True)):
        missed = sum(of_kind[place] for of_kind in counts)
        axes.text(
            place, height + 2, f"{missed} of {total}", ha="center", va="bottom", fontsize=11,
            color=INK,
        )  # fmt: skip
    axes.set_xticks(range(len(groups)), [level_title(g) for g in groups], fontsize=12)
    axes.set_ylim(0, 115)
    axes.set_yticks([0, 25, 50, 75, 100])
    axes.spines[["top", "right"]].set_visible(False)


def draw_mistakes(
    mistakes: Sequence[Mistake], image_of: Callable[[int], np.ndarray], path: Path
) -> Path:
    """Draws the surroundings of each mistake, its box in the colour of its level.

    Args:
        mistakes: what to draw, six a row.
        image_of: uint8 RGB ``(H, W, 3)`` of an image id.
        path: the file to write; its suffix sets the format.

    Returns:
        ``path``.
    """
    columns = 6
    rows = max(-(-len(mistakes) // columns), 1)
    figure = Figure(figsize=(12, 2.65 * rows), dpi=100, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
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
        for line, color in ((4.0, INK), (2.2, level_color(mistake.level or None))):
            axes.add_patch(Rectangle((x, y), width, height, fill=False, ec=color, lw=line))
        score = f" {mistake.score:.2f}" if mistake.score else ""
        level = f", {level_title(mistake.level)}" if mistake.level else ""
        axes.set_title(
            f"{mistake.category}{score}\n{width:.0f} x {height:.0f} px{level}\n{mistake.kind}",
            fontsize=10,
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, bbox_inches="tight", pad_inches=0.12)
    return path

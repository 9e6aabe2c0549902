"""Precision-recall curves of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .figures import save
from .palette import BLUE, CATEGORY_COLORS

__all__ = ["plot_precision"]

_NAMED = 20  # classes in the legend at most
_STYLES = ("-", "--", ":", "-.")
_IOUS = {0.5: 0, 0.75: 5, 0.9: 8}  # COCO's thresholds that are drawn, and their places


def plot_precision(
    precision: np.ndarray, classes: Sequence[str], colors: Sequence[str], path: Path
) -> Path:
    """Draws the curve of each class at an IoU of 0.5, and that of all classes at several IoUs.

    Args:
        precision: COCO's, ``(10 IoUs, 101 recalls, classes)``; -1 for classes without objects,
            which are left out. At least one class has objects.
        classes: their names. The legend has those with the lowest AP50, if there are many.
        colors: one for each class.
        path: the file to write, which is returned; its suffix sets the format.
    """
    figure = Figure(figsize=(12, 5), dpi=110, layout="constrained")
    by_class, by_iou = figure.subplots(1, 2)
    there = [index for index in range(len(classes)) if precision[:, :, index].min() > -1]
    recalls = np.linspace(0, 1, precision.shape[1])
    of_class = {index: precision[0, :, index].mean() for index in there}
    for place, index in enumerate(sorted(there, key=of_class.__getitem__)):
        label = f"{classes[index]}: {100 * of_class[index]:.1f}" if place < _NAMED else None
        style = _STYLES[index // len(CATEGORY_COLORS) % len(_STYLES)]
        color = colors[index]
        by_class.plot(recalls, precision[0, :, index], style, color=color, label=label, lw=1.6)
    _finish(by_class, "IoU 0.5, by class", "AP50", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for (iou, place), style in zip(_IOUS.items(), _STYLES, strict=False):
        mean = precision[place][:, there].mean(1)
        label = f"IoU {iou:g}: {100 * mean.mean():.1f}"
        by_iou.plot(recalls, mean, style, color=BLUE, label=label, lw=1.8)
    _finish(by_iou, "mean of all classes", "AP", loc="best")
    return save(figure, path)


def _finish(axes: Axes, title: str, legend: str, **place: Any) -> None:
    axes.set_title(title, fontsize=13)
    axes.set_xlabel("recall", fontsize=12)
    axes.set_ylabel("precision", fontsize=12)
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.02)
    axes.spines[["top", "right"]].set_visible(False)
    shown = axes.legend(title=legend, fontsize=9, frameon=False, **place)
    for text in shown.get_texts():
        text.set_parse_math(False)

"""Loss curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fpn_plugin.utils.metrics import loss_rows

from .figures import save
from .palette import CATEGORY_COLORS, INK

__all__ = ["plot_losses"]

# 3 styles and 7 colours distinguish 21 losses. The learning rate is dotted.
_STYLES = ("-", "--", "-.")


def plot_losses(metrics_file: Path, path: Path) -> Path:
    """Draws every loss of a run, and the learning rate, against the iteration.

    Args:
        metrics_file: the metrics.json that Detectron2 writes, one JSON object a line.
        path: the file to write, which is returned; its suffix sets the format.
    """
    rows = loss_rows(metrics_file)
    iterations = [row["iteration"] for row in rows]
    names = sorted({key for row in rows for key in row if "loss" in key})
    figure = Figure(figsize=(8, 5.2), dpi=140, layout="constrained")
    axes = figure.subplots()
    parts = [name for name in names if name != "total_loss"]
    for name in names:
        values = [row.get(name, np.nan) for row in rows]
        if name == "total_loss":
            style = {"color": INK, "lw": 2.4}
        else:
            number = parts.index(name)
            color = CATEGORY_COLORS[number % len(CATEGORY_COLORS)]
            style = {"color": color, "ls": _STYLES[number % len(_STYLES)], "lw": 1.6}
        axes.plot(iterations, values, label=name, **style)
    axes.set_yscale("log")
    axes.set_xlabel("iteration", fontsize=12)
    axes.set_ylabel("loss (median of 20 iterations)", fontsize=12)
    axes.grid(alpha=0.3)
    rate_axes = axes.twinx()
    rates = [row.get("lr", np.nan) for row in rows]
    rate_axes.plot(iterations, rates, color="gray", ls=":", lw=1.2)
    rate_axes.set_ylabel("learning rate (grey, dotted)", color="gray", fontsize=12)
    rate_axes.set_ylim(bottom=0)
    figure.legend(
        *axes.get_legend_handles_labels(), fontsize=11, ncols=3, loc="outside lower center"
    )
    return save(figure, path)

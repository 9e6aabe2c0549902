"""Loss curves."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fpn_plugin.metrics import loss_rows

__all__ = ["plot_losses"]


def plot_losses(metrics_file: Path, path: Path) -> Path:
    """Draws every loss of a run, and the learning rate, against the iteration.

    Args:
        metrics_file: the metrics.json that Detectron2 writes, one JSON object a line.
        path: the file to write; its suffix says the format.

    Returns:
        ``path``.
    """
    rows = loss_rows(metrics_file)
    iterations = [row["iteration"] for row in rows]
    names = sorted({key for row in rows for key in row if "loss" in key})
    figure = Figure(figsize=(8, 4.5), dpi=140, layout="constrained")
    axes = figure.subplots()
    for name in names:
        values = [row.get(name, np.nan) for row in rows]
        width = 2.2 if name == "total_loss" else 1.2
        axes.plot(iterations, values, label=name, lw=width)
    axes.set_yscale("log")
    axes.set_xlabel("iteration")
    axes.set_ylabel("loss (median of 20 iterations)")
    axes.grid(alpha=0.3)
    rate_axes = axes.twinx()
    rates = [row.get("lr", np.nan) for row in rows]
    rate_axes.plot(iterations, rates, color="gray", ls=":", lw=1)
    rate_axes.set_ylabel("learning rate (dotted)", color="gray")
    rate_axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path

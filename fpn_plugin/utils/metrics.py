"""Reading what Detectron2 logs of a training."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

__all__ = ["level_rows", "loss_rows"]


def loss_rows(metrics_file: Path) -> list[dict[str, float]]:
    """The rows of a metrics.json that tell losses, in order of their iteration.

    Args:
        metrics_file: one JSON object a line, as Detectron2 writes it; may be missing.
    """
    return _rows(metrics_file, lambda row: "total_loss" in row)


def level_rows(metrics_file: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """What MODEL.FPN.LEVEL_STATS_PERIOD logged: ``{figure: {level: [(iteration, value), ...]}}``.

    Args:
        metrics_file: as for :func:`loss_rows`.
    """
    figures: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in _rows(metrics_file, lambda row: any(key.startswith("fpn_") for key in row)):
        for key, value in row.items():
            if key.startswith("fpn_"):
                figure, _, level = key.removeprefix("fpn_").partition("/")
                points = figures.setdefault(figure, {}).setdefault(level, [])
                points.append((int(row["iteration"]), value))
    return figures


def _rows(metrics_file: Path, wanted: Callable[[dict[str, float]], bool]) -> list[dict[str, float]]:
    rows: list[dict[str, float]] = []
    for line in metrics_file.read_text().splitlines() if metrics_file.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a run that was killed left half a line
        if wanted(row):
            # One that went on from a checkpoint, or began anew, replaces what came later before.
            while rows and rows[-1]["iteration"] >= row["iteration"]:
                rows.pop()
            rows.append(row)
    return rows

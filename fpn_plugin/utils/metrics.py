"""Metrics of trainings and evaluations, as Detectron2 logs and returns them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = [
    "PRECISION_FILE", "ap_by_class", "level_rows", "loss_rows", "metric_rows", "task_metrics",
]  # fmt: skip

PRECISION_FILE = "precision.npz"
"""What an evaluation writes, in the folder of its detections."""


def loss_rows(metrics_file: Path) -> list[dict[str, float]]:
    """The rows of a metrics.json with losses, in order of their iteration.

    Args:
        metrics_file: one JSON object a line, as Detectron2 writes it; may be missing.
    """
    return metric_rows(metrics_file, "total_loss")


def level_rows(metrics_file: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Level statistics of a metrics.json: ``{figure: {level: [(iteration, value), ...]}}``.

    Args:
        metrics_file: as for :func:`loss_rows`.
    """
    figures: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for row in metric_rows(metrics_file, "fpn_"):
        for key, value in row.items():
            if key.startswith("fpn_"):
                figure, _, level = key.removeprefix("fpn_").partition("/")
                points = figures.setdefault(figure, {}).setdefault(level, [])
                points.append((int(row["iteration"]), value))
    return figures


def metric_rows(metrics_file: Path, prefix: str = "") -> list[dict[str, float]]:
    """The rows of a metrics.json with a key that begins so, in order of their iteration.

    Args:
        metrics_file: as for :func:`loss_rows`.
        prefix: of the key.
    """
    rows: list[dict[str, float]] = []
    for line in metrics_file.read_text().splitlines() if metrics_file.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # half a line, of a run that was killed
        if any(key.startswith(prefix) for key in row):
            # A run that resumed or started again replaces the rows from its first iteration on.
            while rows and rows[-1]["iteration"] >= row["iteration"]:
                rows.pop()
            rows.append(row)
    return rows


def ap_by_class(metrics: dict[str, float]) -> dict[str, float]:
    """The AP of each class among the metrics of a task; empty for data of one class."""
    return {key[3:]: value for key, value in metrics.items() if key.startswith("AP-")}


def task_metrics(
    results: dict[str, Any], prefix: str = ""
) -> Iterator[tuple[str, dict[str, float]]]:
    """Each task's name, after its dataset's if there are several, and its metrics.

    Args:
        results: of an evaluation, by task, or by dataset and task.
        prefix: what each name begins with.
    """
    for name, content in results.items():
        if content and all(isinstance(value, dict) for value in content.values()):
            yield from task_metrics(content, f"{prefix}{name} ")
        elif content:
            yield prefix + name, content

"""Reading what Detectron2 logs of a training."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["loss_rows"]


def loss_rows(metrics_file: Path) -> list[dict[str, float]]:
    """The rows of a metrics.json that tell losses, in order of their iteration.

    Args:
        metrics_file: one JSON object a line, as Detectron2 writes it; may be missing.
    """
    rows: list[dict[str, float]] = []
    for line in metrics_file.read_text().splitlines() if metrics_file.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a run that was killed left half a line
        if "total_loss" in row:
            # One that went on from a checkpoint, or began anew, replaces what came later before.
            while rows and rows[-1]["iteration"] >= row["iteration"]:
                rows.pop()
            rows.append(row)
    return rows

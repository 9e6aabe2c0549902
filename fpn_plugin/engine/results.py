"""Results of an evaluation: their table, the files that a run leaves, and those expected of it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from tabulate import tabulate

from fpn_plugin.errors import UserError, near_names
from fpn_plugin.utils.atomic import written_whole
from fpn_plugin.utils.metrics import ap_by_class, task_metrics

from .run_config import RunConfig

__all__ = ["finish", "results_table", "save_results", "tensorboard", "verify_expected"]


def results_table(results: dict[str, Any]) -> str:
    """The metrics of an evaluation as Markdown: a table for each task, and AP by class.

    Args:
        results: ``{task: {metric: value}}``, or that by dataset if there are several.
    """
    tables = []
    found = list(task_metrics(results))
    for name, metrics in found:
        overall = {key: value for key, value in metrics.items() if "-" not in key}
        table = tabulate([overall], headers="keys", tablefmt="github", floatfmt=".1f")
        tables.append(f"{name}\n\n{table}\n")
    if any("@" in name for name, _ in found):
        tables.append(
            "If a task is there twice, the first is COCO's, which takes at most 100 detections "
            "of a category in an image, and 20 with keypoints. The one with @ takes all that the "
            "model may give for an image.\n"
        )
    by_class = {name: ap_by_class(metrics) for name, metrics in found}
    by_class = {name: each for name, each in by_class.items() if each}
    if by_class:
        classes = dict.fromkeys(name for each in by_class.values() for name in each)
        rows = [
            [name.replace("|", r"\|"), *(each.get(name) for each in by_class.values())]
            for name in classes
        ]
        looks = {"tablefmt": "github", "floatfmt": ".1f", "missingval": "-"}
        table = tabulate(rows, ["AP by class", *by_class], disable_numparse=[0], **looks)
        tables.append(f"{table}\n")
    return "\n".join(tables)


def save_results(results: dict[str, Any], output_dir: str) -> None:
    """Writes results.json and results.md to a folder and prints the latter, if there are any."""
    if not results:
        return
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    table = results_table(results)
    for name, text in (("results.json", json.dumps(results, indent=1)), ("results.md", table)):
        with written_whole(str(folder / name), "w") as file:
            file.write(text)
    print(f"\n{table}\nresults.md and results.json are in {folder}", flush=True)
    if any(folder.glob("events.out.tfevents.*")):
        print(f"curves: {tensorboard(output_dir)}", flush=True)


def tensorboard(output_dir: str) -> str:
    """The command that shows the curves of a training."""
    return f"tensorboard --logdir {shlex.quote(output_dir)}"


def finish(config: RunConfig, results: dict[str, Any]) -> None:
    """Saves a run's results and compares them with those that its config expects.

    Raises:
        UserError: see :func:`verify_expected`.
    """
    if comm.is_main_process():
        save_results(results, config["output_dir"])
        verify_expected(config.key("expected_results"), config["expected_results"], results)


def verify_expected(key: str, expected: Sequence[Any], results: dict[str, Any]) -> None:
    """Compares results with those that are expected, by Detectron2's rule.

    Args:
        key: the config key of the expected results.
        expected: ``[[task, metric, value, tolerance], ...]``.
        results: ``{task: {metric: value}}``.

    Raises:
        UserError: a result is missing, not finite, or off by more than its tolerance.
    """
    for task, *_ in expected:
        if task not in results:
            raise UserError(f"{key} names {task!r}, no task here: {near_names(task, results)}")
    node = CfgNode({"TEST": {"EXPECTED_RESULTS": [list(entry) for entry in expected]}})
    try:
        verify_results(node, results)
    except SystemExit as error:
        message = ", ".join(
            f"{task} {metric} is {results[task].get(metric, 'missing')} (expected {value} within "
            f"{tolerance})"
            for task, metric, value, tolerance in expected
        )
        raise UserError(f"{key} is not met: {message}") from error

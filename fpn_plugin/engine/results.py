"""Results of an evaluation: a table of them, and the files that a run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from detectron2.utils import comm
from tabulate import tabulate

from fpn_plugin.utils.atomic import written_whole
from fpn_plugin.utils.metrics import task_metrics

from .expectations import verify_expected
from .run_config import RunConfig

__all__ = ["finish", "results_table", "save_results"]


def results_table(results: dict[str, Any]) -> str:
    """The metrics of an evaluation as a Markdown table for each task, without categories.

    Args:
        results: ``{task: {metric: value}}``, or that by dataset if there are several.
    """
    tables = []
    found = list(task_metrics(results))
    for name, metrics in found:
        overall = {key: value for key, value in metrics.items() if "-" not in key}
        table = tabulate(
            [list(overall.values())], headers=list(overall), tablefmt="github", floatfmt=".1f"
        )
        tables.append(f"{name}\n\n{table}\n")
    if any("@" in name for name, _ in found):
        tables.append(
            "If a task is there twice, the first is COCO's, which takes at most 100 detections "
            "of a category in an image, and 20 with keypoints. The one with @ takes all that the "
            "model may give for an image.\n"
        )
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
    print(f"\n{table}", flush=True)


def finish(config: RunConfig, results: dict[str, Any]) -> None:
    """Saves a run's results and compares them with those that its config expects.

    Args:
        config: of the run.
        results: see :func:`results_table`.

    Raises:
        UserError: they are not those.
    """
    if comm.is_main_process():
        save_results(results, config["output_dir"])
        verify_expected(config.key("expected_results"), config["expected_results"], results)

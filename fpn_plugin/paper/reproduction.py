"""Rows of the paper's tables, trained and reported."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fpn_plugin.data import check_datasets
from fpn_plugin.errors import UserError
from fpn_plugin.mini import MINI_WEIGHTS, ensure_mini, ensure_mini_weights

from .report import read_runs, write_report
from .runs import Outcome, RunFolder
from .scheduler import Task, run_tasks, tasks_for
from .tables import RUNS, TABLES, Table, needed_runs, select_rows

__all__ = ["reproduce"]

_SEEDS_LOOKED_FOR = range(20)  # of runs made by earlier calls, reported next to those asked for


def reproduce(
    what: Sequence[str],
    scale: str,
    seeds: Sequence[int],
    output: Path,
    opts: Sequence[str] = (),
    at_once: int = 1,
    reports: Sequence[Path] = (),
    dry_run: bool = False,
) -> str:
    """Trains what is missing of rows, and writes report.md, report.json and charts.

    Args:
        what: tables and rows, as :func:`select_rows` takes them.
        scale: one of ``SCALES``.
        seeds: a run for each.
        output: folder of runs and reports.
        opts: config keys and values for all runs.
        at_once: how many runs at a time.
        reports: report.json files of runs made elsewhere, to report as well.
        dry_run: only list what would run.

    Returns:
        The report, or with ``dry_run`` the list.

    Raises:
        UserError: an unknown table or row, data that does not exist, a folder made by another
            config or other code, a run that failed.
    """
    tables = select_rows(what)
    rows = [row for of_table in tables.values() for row in of_table]
    folders = [
        RunFolder(run, scale, seed, output, tuple(opts))
        for seed in dict.fromkeys(seeds)
        for run in needed_runs(rows)
    ]
    for folder in folders:
        folder.config()  # errors in opts come before anything is made
        folder.check()
    tasks = tasks_for(folders)
    if dry_run:
        return _plan(tasks)
    _check_data(folders)
    run_tasks(tasks, at_once)
    found: dict[RunFolder, Outcome] = {}
    looked_for = sorted({*seeds, *_SEEDS_LOOKED_FOR})
    for number, of_table in tables.items():
        for name in dict.fromkeys(row.run for row in of_table if row.run):
            of_run = [
                RunFolder(RUNS[name], scale, seed, output, tuple(opts)) for seed in looked_for
            ]
            found |= _outcomes(of_run, reports, TABLES[number])
    report = write_report(tables, found, output / scale)
    return f"{report.read_text()}\nreport: {report}"


def _check_data(folders: Sequence[RunFolder]) -> None:
    for folder in folders:
        cfg = folder.config()
        for split in ("TRAIN", "TEST"):
            check_datasets(cfg.DATASETS[split], f"DATASETS.{split}", registers=False)
    if folders and folders[0].scale == "mini":
        ensure_mini()
    for folder in folders:
        cfg = folder.config()
        if cfg.MODEL.WEIGHTS.startswith(MINI_WEIGHTS):
            ensure_mini_weights(cfg.MODEL.WEIGHTS.removeprefix(MINI_WEIGHTS))


def _outcomes(
    folders: Sequence[RunFolder], reports: Sequence[Path], table: Table
) -> dict[RunFolder, Outcome]:
    """Outcomes of finished runs, in their folders and in other reports."""
    found: dict[RunFolder, Outcome] = {}
    for report in reports:
        found |= read_runs(report, folders)
    for folder in folders:
        if folder.finished:
            try:
                folder.check()
            except UserError as error:  # of another seed than those asked for
                print(f"not in the report: {error}")
            else:
                found[folder] = folder.outcome(table.task, table.costs)
    return found


def _plan(tasks: Sequence[Task]) -> str:
    lines = []
    for task in tasks:
        length = "" if task.dump else f"{task.folder.config().SOLVER.MAX_ITER} iterations"
        iteration = 0 if task.dump or task.done else task.folder.iteration()
        state = "finished" if task.done else f"at {iteration}" if iteration else "to run"
        lines.append(f"{state:>9}  {task.name:<50} {length}")
    left = sum(not task.done for task in tasks)
    return "\n".join([*lines, f"{left} of {len(tasks)} to run"])

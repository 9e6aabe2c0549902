"""What tools/reproduce.py does: trains the rows that are asked for and reports them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fpn_plugin.data import check_datasets
from fpn_plugin.errors import UserError
from fpn_plugin.mini import MINI_WEIGHTS, ensure_mini, ensure_mini_weights
from fpn_plugin.paper.report import read_runs, write_report
from fpn_plugin.paper.runs import Outcome, RunFolder
from fpn_plugin.paper.scheduler import Task, run_tasks, tasks_for
from fpn_plugin.paper.tables import RUNS, SCALES, TABLES, Row, needed_runs, select_rows

from .common import ToolParser, at_least, input_file, output_folder

__all__ = ["argument_parser", "reproduce_main"]

_SEEDS_LOOKED_FOR = range(20)  # of runs made by earlier calls, to report beside those asked for

_EXAMPLES = """
Examples:
  reproduce.py 1 --scale mini                      # Table 1, a seed, on the mini dataset
  reproduce.py 1 2 3 --scale mini --seeds 0 1 2    # Tables 1 to 3, three seeds
  reproduce.py 1c 1d --scale paper                 # two rows on COCO, at the paper's size
  reproduce.py 2 --scale mini --dry-run            # what would run
"""


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of tools/reproduce.py."""
    parser = ToolParser(
        description="Train rows of the paper's Tables 1 to 5 and set them beside its figures. What "
        "is finished is not run again, what was cut off goes on.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("what", nargs="+", metavar="TABLE|ROW", help="1 to 5, or rows as 1c, 2a")
    parser.add_argument(
        "--scale", choices=SCALES, default="mini", help="mini: minutes on a CPU; paper: COCO"
    )
    parser.add_argument("--seeds", nargs="+", type=at_least(0), default=[0], metavar="SEED")
    parser.add_argument(
        "--output", type=output_folder, default="output", help="folder of runs and reports"
    )
    parser.add_argument(
        "--at-once",
        type=at_least(1, 1024),
        default=1,
        metavar="N",
        help="runs at a time; GPUs, or the CPU's threads, are divided among them",
    )
    parser.add_argument(
        "--with",
        dest="reports",
        nargs="+",
        type=input_file,
        default=[],
        metavar="REPORT",
        help="report.json of runs made elsewhere, by the same code and config, to report as well",
    )
    parser.add_argument("--dry-run", action="store_true", help="list what would run, and stop")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="config options: KEY VALUE ..."
    )
    return parser


def reproduce_main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing of rows and writes report.md, report.json and charts.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: an unknown table or row, data that is not there, a folder made by another
            config or other code, a run that failed.
    """
    args = argument_parser().parse_args(argv)
    tables = select_rows(args.what)
    rows = [row for of_table in tables.values() for row in of_table]
    folders = [
        RunFolder(run, args.scale, seed, Path(args.output), tuple(args.opts))
        for seed in dict.fromkeys(args.seeds)
        for run in needed_runs(rows)
    ]
    for folder in folders:
        folder.config()  # what is wrong with --opts is said before anything is made
        folder.check()
    tasks = tasks_for(folders)
    if args.dry_run:
        print(_plan(tasks))
        return
    _check_data(folders)
    run_tasks(tasks, args.at_once)
    report = write_report(tables, _outcomes(args, tables), Path(args.output) / args.scale)
    print(f"{report.read_text()}\nreport: {report}")


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


def _outcomes(args: argparse.Namespace, tables: dict[int, list[Row]]) -> dict[RunFolder, Outcome]:
    """What finished runs of the rows came to, in the output folder and in other reports."""
    found: dict[RunFolder, Outcome] = {}
    for number, rows in tables.items():
        for name in dict.fromkeys(row.run for row in rows if row.run):
            of_run = [
                RunFolder(RUNS[name], args.scale, seed, Path(args.output), tuple(args.opts))
                for seed in sorted({*args.seeds, *_SEEDS_LOOKED_FOR})
            ]
            for report in args.reports:
                found |= read_runs(Path(report), of_run)
            for folder in of_run:
                if not folder.finished:
                    continue
                try:
                    folder.check()
                except UserError as error:  # those asked for were checked before they ran
                    print(f"not in the report: {error}")
                    continue
                found[folder] = folder.outcome(TABLES[number].task)
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

"""``fpn-plugin reproduce``: rows of the paper's tables, trained and reported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fpn_plugin.paper.reproduction import reproduce
from fpn_plugin.paper.tables import SCALES

from .common import ToolParser, add_shared, at_least, input_file

__all__ = ["argument_parser", "reproduce_main"]

_EXAMPLES = """
Examples:
  fpn-plugin reproduce 1 --scale mini                      # Table 1, a seed, on the mini dataset
  fpn-plugin reproduce 1 2 3 --scale mini --seeds 0 1 2    # Tables 1 to 3, three seeds
  fpn-plugin reproduce 1c 1d --scale paper                 # two rows on COCO, at the paper's size
  fpn-plugin reproduce 2 --scale mini --dry-run            # what would run
"""


def argument_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = ToolParser(
        "fpn-plugin reproduce",
        description="Train rows of the paper's Tables 1 to 5 and report them next to its figures. "
        "Finished runs are not run again, interrupted runs are resumed.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("what", nargs="+", metavar="TABLE|ROW", help="1 to 5, or rows as 1c, 2a")
    parser.add_argument(
        "--scale", choices=SCALES, default="mini", help="mini: minutes on a CPU; paper: COCO"
    )
    parser.add_argument("--seeds", nargs="+", type=at_least(0), default=[0], metavar="SEED")
    add_shared(parser, "--output", default="output", help="folder of runs and reports")
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
        "--opts", nargs=argparse.REMAINDER, default=[], help="config keys and values for all runs"
    )
    return parser


def reproduce_main(argv: Sequence[str] | None = None) -> None:
    """Trains what is missing of rows and writes a report; see :func:`reproduce`.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: something given cannot be used, or a run failed.
    """
    args = argument_parser().parse_args(argv)
    reports = [Path(report) for report in args.reports]
    output = Path(args.output)
    print(
        reproduce(
            args.what,
            args.scale,
            args.seeds,
            output,
            args.opts,
            at_once=args.at_once,
            reports=reports,
            dry_run=args.dry_run,
        )
    )

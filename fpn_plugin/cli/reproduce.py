"""Train rows of the paper's Tables 1 to 6 and the designs of its Figure 1, and report them next to
its figures. Finished runs are not run again. Interrupted runs are resumed.

Examples:
  fpn-plugin reproduce 1 --scale mini                      # Table 1, a seed, on the mini dataset
  fpn-plugin reproduce 1 2 3 --scale mini --seeds 0 1 2    # Tables 1 to 3, three seeds
  fpn-plugin reproduce 1c 1d --scale paper                 # two rows on COCO, at the paper's size
  fpn-plugin reproduce figure1 --scale mini                # the designs of Figure 1
  fpn-plugin reproduce 2 --scale mini --dry-run            # what would run
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fpn_plugin.paper.reproduction import reproduce
from fpn_plugin.paper.tables import SCALES

from .common import ToolParser, add_shared, at_least, command_parser, input_file

__all__ = ["reproduce_main"]


def _parser() -> ToolParser:
    parser = command_parser("reproduce", __doc__)
    add = parser.add_argument
    add("what", nargs="+", metavar="TABLE|ROW", help="tables 1 to 6, figure1, or rows: 1c, 2a")
    add("--scale", choices=SCALES, default="mini", help="mini: minutes on a CPU; paper: COCO")
    add("--seeds", nargs="+", type=at_least(0), default=[0], metavar="SEED")
    add_shared(parser, "--output", default="output", help="folder of runs and reports")
    add(
        "--at-once",
        type=at_least(1, 1024),
        default=1,
        metavar="N",
        help="runs at a time; they share the GPUs, or the CPU's threads",
    )
    add(
        "--with",
        dest="reports",
        nargs="+",
        type=input_file,
        default=[],
        metavar="REPORT",
        help="report.json of runs on other machines, of the same code and config, to add",
    )
    add("--dry-run", action="store_true", help="list the runs, and stop")
    opts = "config keys and values for all runs"
    add("--opts", nargs=argparse.REMAINDER, default=[], help=opts)
    return parser


def reproduce_main(argv: list[str] | None = None) -> None:
    """Trains the runs that are missing, and prints the report; see :func:`reproduce`."""
    args = _parser().parse_args(argv)
    reports, output = [Path(report) for report in args.reports], Path(args.output)
    options = {"at_once": args.at_once, "reports": reports, "dry_run": args.dry_run}
    print(reproduce(args.what, args.scale, args.seeds, output, args.opts, **options))

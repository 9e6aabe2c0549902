"""``fpn-plugin report``: a run's curves, results, levels and errors in one file of HTML."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fpn_plugin.data import register_datasets
from fpn_plugin.engine import load_config
from fpn_plugin.errors import UserError
from fpn_plugin.visualization.run_page import run_page

from .common import ToolParser, add_shared, output_file

__all__ = ["argument_parser", "report_main"]

_EXAMPLES = """
Examples:
  fpn-plugin report output/demo
  fpn-plugin report output/cells --dataset cells_val=cells/val.json:cells/images \\
      --output cells.html
"""


def argument_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = ToolParser(
        "fpn-plugin report",
        description="Put a run's curves, AP table, level statistics and worst errors into one file "
        "of HTML that needs no other.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("run", help="the folder of a training: config.yaml, metrics.json, ...")
    add_shared(
        parser,
        "--output",
        type=output_file(),
        help="the file to write; report.html in that folder by default",
    )
    add_shared(parser, "--threshold", "--dataset")
    return parser


def report_main(argv: Sequence[str] | None = None) -> None:
    """Writes the report.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: something given cannot be used.
    """
    args = argument_parser().parse_args(argv)
    run = Path(args.run)
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"{str(run)!r} has no config.yaml: give the OUTPUT_DIR of a training or evaluation"
        )
    register_datasets(args.dataset)
    cfg = load_config(str(run / "config.yaml"))
    html = run_page(run, cfg, args.threshold).html()
    path = Path(args.output) if args.output else run / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    print(f"{path} ({len(html) / 1e6:.1f} MB)")

r"""Put a run's curves, AP tables, precision-recall curves, level statistics, confusion matrix and
worst errors into one file of HTML that needs no other.

Examples:
  fpn-plugin report output/demo
  fpn-plugin report output/cells --dataset cells_val=cells/val.json:cells/images \
      --output cells.html
"""

from __future__ import annotations

from pathlib import Path

from fpn_plugin.engine import load_config
from fpn_plugin.engine.run_datasets import class_colors, register_with_runs
from fpn_plugin.errors import UserError
from fpn_plugin.visualization.run_page import run_page

from .common import ToolParser, add_shared, command_parser, output_file

__all__ = ["report_main"]


def _parser() -> ToolParser:
    parser = command_parser("report", __doc__)
    parser.add_argument("run", help="folder of a training, with config.yaml, metrics.json, ...")
    output = "file to write (default: report.html in that folder)"
    add_shared(parser, "--output", type=output_file(), help=output)
    add_shared(parser, "--threshold", "--dataset")
    return parser


def report_main(argv: list[str] | None = None) -> None:
    """Writes the report of a run."""
    args = _parser().parse_args(argv)
    run = Path(args.run)
    if not (run / "config.yaml").is_file():
        raise UserError(
            f"{str(run)!r} has no config.yaml: give the OUTPUT_DIR of a training or evaluation"
        )
    register_with_runs(args.dataset, run)
    cfg = load_config(str(run / "config.yaml"))
    html = run_page(run, cfg, args.threshold, class_colors(run)).html()
    path = Path(args.output) if args.output else run / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    print(f"{path} ({len(html) / 1e6:.1f} MB)")

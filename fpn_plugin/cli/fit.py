"""``fpn-plugin fit``: a dataset and a config in, a fitted config and a report out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fpn_plugin.data import Needs, register_datasets
from fpn_plugin.engine import find_config_file, load_config
from fpn_plugin.errors import UserError
from fpn_plugin.fitting import check_config, fit_pyramid, read_ground_truth
from fpn_plugin.fitting.report import check_output, write_report

from .common import ToolParser, add_shared

__all__ = ["argument_parser", "fit_main"]

_EXAMPLES = """
Examples:
  fpn-plugin fit --config-file mini/faster_rcnn_R_18_FPN.yaml --data mini_small_train
  fpn-plugin fit --config-file my.yaml --data train.json --output output/fit
  fpn-plugin fit --config-file my.yaml INPUT.MIN_SIZE_TRAIN "(1200,)"   # DATASETS.TRAIN of my.yaml
"""


def argument_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = ToolParser(
        "fpn-plugin fit",
        description="Fit levels, canonical size and anchors to your data: measure a config's "
        "pyramid against labelled boxes, and write a config that fits them better.",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="NAME|JSON",
        help="a registered dataset or a COCO instances JSON; may be given several times; default: "
        "the config's DATASETS.TRAIN",
    )
    add_shared(parser, "--output", default="output/fit")
    add_shared(parser, "--config-file", "--dataset", "opts")
    return parser


def fit_main(argv: Sequence[str] | None = None) -> None:
    """Fits a pyramid, and writes fitted.yaml, report.md, report.json and charts.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: something given cannot be used.
    """
    args = argument_parser().parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    pyramid = check_config(cfg)
    base, folder = Path(find_config_file(args.config_file)), Path(args.output)
    check_output(base, folder)
    register_datasets(args.dataset)
    sources = args.data or list(cfg.DATASETS.TRAIN)
    if not sources:
        raise UserError("no data: give --data, or a config whose DATASETS.TRAIN names some")
    key = "--data" if args.data else "DATASETS.TRAIN"
    truth = read_ground_truth(sources, Needs.of(cfg, training=True), key)
    fit = fit_pyramid(cfg, truth, pyramid)
    print(write_report(fit, sources, base, list(args.opts[::2]), folder, args.dataset))

"""Fit levels, canonical size and anchors to your data. The command measures a config's pyramid on
labelled boxes, and writes a config that fits them better.

Examples:
  fpn-plugin fit --config-file mini/faster_rcnn_R_18_FPN.yaml --data mini_small_train
  fpn-plugin fit --config-file my.yaml --data train.json --output output/fit
  fpn-plugin fit --config-file my.yaml INPUT.MIN_SIZE_TRAIN "(1200,)"   # DATASETS.TRAIN of my.yaml
"""

from __future__ import annotations

from pathlib import Path

from fpn_plugin.data import Needs
from fpn_plugin.engine import find_config_file, load_config
from fpn_plugin.engine.run_datasets import register_with_runs, run_folders
from fpn_plugin.errors import UserError
from fpn_plugin.fitting import check_config, fit_pyramid, read_ground_truth
from fpn_plugin.fitting.report import check_output, write_report

from .common import Arguments, ToolParser, add_shared, command_parser

__all__ = ["fit_main"]


def _parser() -> ToolParser:
    parser = command_parser("fit", __doc__)
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="NAME|JSON",
        help="a registered dataset or a COCO JSON; repeat for several (default: the config's "
        "DATASETS.TRAIN)",
    )
    add_shared(parser, "--output", default="output/fit")
    add_shared(parser, "--config-file", "--dataset", "opts")
    return parser


def fit_main(argv: Arguments = None) -> Path:
    """Fits a pyramid, writes fitted.yaml, report.md, report.json and charts, returns the folder."""
    args = _parser().parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    pyramid = check_config(cfg)
    base, folder = Path(find_config_file(args.config_file)), Path(args.output)
    check_output(base, folder)
    register_with_runs(args.dataset, *run_folders(args.config_file, cfg.MODEL.WEIGHTS))
    sources = args.data or list(cfg.DATASETS.TRAIN)
    if not sources:
        raise UserError("no data: give --data, or a config whose DATASETS.TRAIN names a dataset")
    key = "--data" if args.data else "DATASETS.TRAIN"
    truth = read_ground_truth(sources, Needs.of(cfg, training=True), key)
    fit = fit_pyramid(cfg, truth, pyramid)
    print(write_report(fit, sources, base, list(args.opts[::2]), folder, args.dataset))
    return folder

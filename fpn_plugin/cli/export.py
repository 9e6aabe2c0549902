"""``fpn-plugin export``: a trained detector as files that run without Detectron2, each compared."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fpn_plugin.data import read_picture, register_datasets
from fpn_plugin.deploy.export import FORMATS, TIME_LIMIT
from fpn_plugin.deploy.export_check import export_checked
from fpn_plugin.engine import load_config
from fpn_plugin.engine.inference import Detector, class_names

from .common import ToolParser, add_shared, at_least

__all__ = ["argument_parser", "export_main"]

_EXAMPLES = """
Example:
  fpn-plugin export --config-file output/demo/config.yaml --input photo.jpg \\
      --output exported MODEL.WEIGHTS output/demo/model_final.pth
"""


def argument_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = ToolParser(
        "fpn-plugin export",
        description="Export a trained Faster R-CNN, Mask R-CNN or RetinaNet, run each file, and "
        "compare its detections with the model's.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    add_shared(
        parser, "--input", required=True, metavar="IMAGE", help="images to compare detections on"
    )
    add_shared(parser, "--output", default="output/exported")
    parser.add_argument(
        "--time-limit",
        type=at_least(1),
        default=TIME_LIMIT,
        metavar="SECONDS",
        help="give a format up that takes longer to write (default: %(default)s)",
    )
    add_shared(parser, "--config-file", "--dataset", "opts")
    return parser


def export_main(argv: Sequence[str] | None = None) -> None:
    """Exports, checks, and prints a line for each format; see :func:`export_checked`.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: something given cannot be used, or a file's detections are not the model's.
    """
    args = argument_parser().parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    cfg.MODEL.DEVICE = "cpu"
    register_datasets(args.dataset)
    images = [read_picture(cfg, path) for path in args.input]  # before the weights are loaded
    model, folder = Detector(cfg).model, Path(args.output)
    export_checked(cfg, model, class_names(cfg), images, args.formats, folder, args.time_limit)

r"""Export a trained Faster R-CNN, Mask R-CNN or RetinaNet. The command runs each file, and
compares its detections with the model's.

Example:
  fpn-plugin export --config-file output/demo/config.yaml --input photo.jpg \
      --output exported MODEL.WEIGHTS output/demo/model_final.pth
"""

from __future__ import annotations

from pathlib import Path

from fpn_plugin.data import read_picture
from fpn_plugin.deploy.export import FORMATS, TIME_LIMIT
from fpn_plugin.deploy.export_check import export_checked
from fpn_plugin.engine import load_config
from fpn_plugin.engine.inference import Detector, class_names
from fpn_plugin.engine.run_datasets import register_with_runs, run_folders

from .common import ToolParser, add_shared, at_least, command_parser

__all__ = ["export_main"]


def _parser() -> ToolParser:
    parser = command_parser("export", __doc__)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    add_shared(parser, "--input", required=True, metavar="IMAGE", help="images to compare on")
    add_shared(parser, "--output", default="output/exported")
    parser.add_argument(
        "--time-limit",
        type=at_least(1),
        default=TIME_LIMIT,
        metavar="SECONDS",
        help="give up a format that takes longer (default: %(default)s)",
    )
    add_shared(parser, "--config-file", "--dataset", "opts")
    return parser


def export_main(argv: list[str] | None = None) -> None:
    """Exports, checks, and prints a line for each format; see :func:`export_checked`."""
    args = _parser().parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    cfg.MODEL.DEVICE = "cpu"
    register_with_runs(args.dataset, *run_folders(args.config_file, cfg.MODEL.WEIGHTS))
    images = [read_picture(cfg, path) for path in args.input]  # before the weights are loaded
    model, folder = Detector(cfg).model, Path(args.output)
    export_checked(cfg, model, class_names(cfg), images, args.formats, folder, args.time_limit)

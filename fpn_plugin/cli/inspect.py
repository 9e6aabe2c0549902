"""``fpn-plugin inspect``: what a model is made of, in words and a picture."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from fpn_plugin.engine.build_errors import explained_build_errors
from fpn_plugin.engine.settings import config_on_device
from fpn_plugin.errors import UserError
from fpn_plugin.inspection.anatomy import anatomy
from fpn_plugin.inspection.anatomy_text import anatomy_text
from fpn_plugin.visualization.anatomy import draw_anatomy

from .common import ToolParser, add_shared, at_least, output_file

__all__ = ["argument_parser", "inspect_main"]

_EXAMPLES = """
Examples:
  fpn-plugin inspect --config-file COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml
  fpn-plugin inspect --config-file mini/faster_rcnn_R_18_FPN.yaml --size 256 256 \\
      MODEL.FPN.CANONICAL_LEVEL 3
"""
_LARGEST_SIDE = 10_000


def argument_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = ToolParser(
        "fpn-plugin inspect",
        description="Show what a config's model is made of: levels, anchors, the box sizes that "
        "Eq. (1) sends to each level, parameters and multiply-adds by part. No weights are needed.",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "--size", nargs=2, type=at_least(1, _LARGEST_SIDE), metavar=("HEIGHT", "WIDTH"),
        help="of the image after resizing; by default of a 3:4 one by INPUT.MIN_SIZE_TEST, "
        "MAX_SIZE_TEST",
    )  # fmt: skip
    parser.add_argument(
        "--rois", type=at_least(1), help="that the box head sees; all proposals by default"
    )
    add_shared(
        parser,
        "--output",
        type=output_file(".png", ".pdf", ".svg", ".jpg"),
        default="output/model.png",
        help="the picture to write (default: %(default)s)",
    )
    add_shared(parser, "--config-file", "opts")
    return parser


def inspect_main(argv: Sequence[str] | None = None) -> None:
    """Prints a model's anatomy and draws it.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: something given cannot be used.
    """
    args = argument_parser().parse_args(argv)
    cfg = config_on_device(args.config_file, args.opts)
    size = tuple(args.size) if args.size else _usual_size(cfg)
    if not all(0 < side <= _LARGEST_SIDE for side in size):
        raise UserError(
            f"INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST make {size[0]} x {size[1]} px: sides are 1 to "
            f"{_LARGEST_SIDE} px"
        )
    # What is counted is the same for any weights: none are downloaded.
    cfg.MODEL.TIMM.PRETRAINED = False
    cfg.MODEL.TORCHVISION.WEIGHTS = ""
    with explained_build_errors(cfg):
        model = build_model(cfg)
    parts = anatomy(model, size, args.rois)
    print(anatomy_text(parts))
    path = draw_anatomy(parts, Path(args.output), title=Path(args.config_file).stem)
    print(f"\ndrawn in {path}")


def _usual_size(cfg: CfgNode) -> tuple[int, int]:
    """Height and width that a 3:4 image is resized to in testing."""
    short, most = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    short = short or 480  # 0: images are not resized
    long = short * 4 / 3
    scale = min(1.0, most / long) if most > 0 else 1.0
    return round(short * scale), round(long * scale)

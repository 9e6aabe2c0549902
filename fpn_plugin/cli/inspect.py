r"""Show the parts of a config's model: levels, anchors, the box sizes that Eq. (1) sends to each
level, parameters and multiply-adds. It needs no weights.

Examples:
  fpn-plugin inspect --config-file COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml
  fpn-plugin inspect --config-file mini/faster_rcnn_R_18_FPN.yaml --size 256 256 \
      MODEL.FPN.CANONICAL_LEVEL 3
"""

from __future__ import annotations

from pathlib import Path

from detectron2.config import CfgNode
from detectron2.modeling import build_model

from fpn_plugin.engine.build_errors import explained_build_errors
from fpn_plugin.engine.settings import config_on_device
from fpn_plugin.errors import UserError
from fpn_plugin.inspection.anatomy import anatomy
from fpn_plugin.inspection.anatomy_text import anatomy_text
from fpn_plugin.modeling import without_network_weights
from fpn_plugin.visualization.anatomy import draw_anatomy

from .common import ToolParser, add_shared, at_least, command_parser, output_file

__all__ = ["inspect_main"]

_LARGEST_SIDE = 10_000


def _parser() -> ToolParser:
    parser = command_parser("inspect", __doc__)
    parser.add_argument(
        "--size",
        nargs=2,
        type=at_least(1, _LARGEST_SIDE),
        metavar=("HEIGHT", "WIDTH"),
        help="of the resized image (default: a 3:4 image, resized by INPUT.MIN_SIZE_TEST, "
        "MAX_SIZE_TEST)",
    )
    parser.add_argument(
        "--rois", type=at_least(1), help="regions that the box head sees (default: all proposals)"
    )
    add_shared(
        parser,
        "--output",
        type=output_file(".png", ".pdf", ".svg", ".jpg"),
        default="output/model.png",
        help="picture to write (default: %(default)s)",
    )
    add_shared(parser, "--config-file", "opts")
    return parser


def inspect_main(argv: list[str] | None = None) -> None:
    """Prints a model's anatomy and draws it."""
    args = _parser().parse_args(argv)
    cfg = config_on_device(args.config_file, args.opts)
    size = tuple(args.size) if args.size else _usual_size(cfg)
    if not all(0 < side <= _LARGEST_SIDE for side in size):
        raise UserError(
            f"INPUT.MIN_SIZE_TEST and MAX_SIZE_TEST make {size[0]} x {size[1]} px; expected sides "
            f"of 1 to {_LARGEST_SIDE} px"
        )
    # Counts are the same for any weights: download none.
    cfg = without_network_weights(cfg)
    cfg.MODEL.TORCHVISION.WEIGHTS = ""
    with explained_build_errors(cfg):
        model = build_model(cfg)
    parts = anatomy(model, size, args.rois)
    print(anatomy_text(parts))
    path = draw_anatomy(parts, Path(args.output), title=Path(args.config_file).stem)
    print(f"\ndrawn in {path}")


def _usual_size(cfg: CfgNode) -> tuple[int, int]:
    """Height and width of a 3:4 image after the resizing of testing."""
    short, most = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
    short = short or 480  # 0: images are not resized
    long = short * 4 / 3
    scale = min(1.0, most / long) if most > 0 else 1.0
    return round(short * scale), round(long * scale)

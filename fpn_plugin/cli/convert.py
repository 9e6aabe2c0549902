"""``fpn-plugin convert``: weights from and to torchvision and mmdetection."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from fpn_plugin.conversion import LIBRARIES, read_weights, write_for_library, write_from_library
from fpn_plugin.errors import UserError

from .common import ToolParser, add_shared, between, input_file, output_file

__all__ = ["argument_parser", "convert_main"]

_EXAMPLES = """
Examples:
  fpn-plugin convert --from torchvision --weights maskrcnn.pth --output maskrcnn_d2.pth \\
      --config-file COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml
  fpn-plugin convert --to torchvision --weights model_final.pth --output for_torchvision.pth \\
      --config-file output/config.yaml
"""


def argument_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = ToolParser(
        "fpn-plugin convert",
        description="Convert an FPN detector's weights from torchvision or mmdetection into this "
        "plugin's names, or back. Files are read without running code that is in them.",
        epilog=_EXAMPLES,
    )
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from", dest="source", choices=LIBRARIES, help="library it is from")
    direction.add_argument("--to", dest="target", choices=LIBRARIES, help="library it is for")
    parser.add_argument(
        "--weights", type=input_file, required=True, help=".pth, .pkl or .safetensors"
    )
    parser.add_argument(
        "--bn-eps",
        type=between(0, 1),
        help="of the original's batch norms; 0 for torchvision's COCO_V1 weights",
    )
    parser.add_argument(
        "--trust-pickle",
        action="store_true",
        help="read weights that hold more than tensors, as mmdetection's checkpoints do, which "
        "runs code that is in them: only for files whose author you trust",
    )
    parser.add_argument(
        "--into", type=input_file, help="weights of the library whose layout to fill; for --to"
    )
    add_shared(parser, "--config-file", "opts")
    add_shared(
        parser,
        "--output",
        required=True,
        type=output_file(".pth", ".safetensors"),
        help="file to write, .pth or .safetensors",
    )
    return parser


def convert_main(argv: Sequence[str] | None = None) -> None:
    """Writes converted weights and, from a library, the config next to them.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: a file cannot be read, or does not fit the config.
    """
    args = argument_parser().parse_args(argv)
    if args.into and not args.target:
        raise UserError("--into is for --to: it is the layout of the library that weights are for")
    if args.bn_eps is not None and not args.source:
        raise UserError("--bn-eps is for --from: it is of the library that weights are from")
    state = read_weights(args.weights, trust_pickle=args.trust_pickle)
    output, model = Path(args.output), (args.config_file, args.opts)
    if args.target:
        into = read_weights(args.into, trust_pickle=args.trust_pickle) if args.into else None
        write_for_library(state, args.target, *model, output, into)
        print(f"{output}: in the names of {args.target}")
    else:
        eps = {} if args.bn_eps is None else {"bn_eps": args.bn_eps}
        config = write_from_library(state, args.source, *model, output, **eps)
        print(f"{output}, and {config} that loads it")

r"""Convert an FPN detector's weights from torchvision's or mmdetection's names, or to them.
Files are read without running code in them.

Examples:
  fpn-plugin convert --from torchvision --weights maskrcnn.pth --output maskrcnn_d2.pth \
      --config-file COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml
  fpn-plugin convert --to torchvision --weights model_final.pth --output for_torchvision.pth \
      --config-file output/config.yaml
"""

from __future__ import annotations

from pathlib import Path

from fpn_plugin.conversion import LIBRARIES, read_weights, write_for_library, write_from_library
from fpn_plugin.errors import UserError

from .common import ToolParser, add_shared, between, command_parser, input_file, output_file

__all__ = ["convert_main"]


def _parser() -> ToolParser:
    parser = command_parser("convert", __doc__)
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from", dest="source", choices=LIBRARIES, help="library it is from")
    direction.add_argument("--to", dest="target", choices=LIBRARIES, help="library it is for")
    add = parser.add_argument
    add("--weights", type=input_file, required=True, help=".pth, .pkl or .safetensors")
    add(
        "--bn-eps",
        type=between(0, 1),
        help="epsilon of the original's batch norms; 0 for torchvision's COCO_V1 weights",
    )
    add(
        "--trust-pickle",
        action="store_true",
        help="read weights that hold more than tensors, as mmdetection's checkpoints do. This "
        "runs code in the file: use it only if you trust the author",
    )
    add("--into", type=input_file, help="with --to: weights of that library, as the layout to fill")
    add_shared(parser, "--config-file", "opts")
    kinds = output_file(".pth", ".safetensors")
    add_shared(
        parser, "--output", required=True, type=kinds, help="file to write, .pth or .safetensors"
    )
    return parser


def convert_main(argv: list[str] | None = None) -> None:
    """Writes converted weights and, with --from, a config next to them."""
    args = _parser().parse_args(argv)
    if args.into and not args.target:
        raise UserError("--into is for --to: it is the layout of the target library")
    if args.bn_eps is not None and not args.source:
        raise UserError("--bn-eps is for --from: it is of the source library")
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

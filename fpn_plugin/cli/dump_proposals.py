r"""Write a trained RPN's proposals, one file for each dataset. Call it again to resume.

Example:
  fpn-plugin dump-proposals --config-file output/mini/table1_c_FPN/seed0/config.yaml \
      --splits mini_train mini_val --output output/mini/table1_c_FPN/seed0/proposals \
      MODEL.WEIGHTS output/mini/table1_c_FPN/seed0/model_final.pth
"""

from __future__ import annotations

from fpn_plugin.engine.proposal_dump import dump_proposals
from fpn_plugin.engine.settings import config_on_device

from .common import ToolParser, add_shared, command_parser

__all__ = ["dump_proposals_main"]


def _parser() -> ToolParser:
    parser = command_parser("dump-proposals", __doc__)
    parser.add_argument(
        "--splits", nargs="+", required=True, metavar="DATASET", help="registered datasets"
    )
    add_shared(parser, "--output", required=True, help="folder to write <dataset>.pkl to")
    add_shared(parser, "--config-file", "--dataset", "--num-gpus", "--dist-url", "opts")
    parser.set_defaults(num_machines=1, machine_rank=0)
    return parser


def dump_proposals_main(argv: list[str] | None = None) -> None:
    """Writes ``<output>/<dataset>.pkl`` for each dataset; see :func:`dump_proposals`."""
    args = _parser().parse_args(argv)
    cfg = config_on_device(args.config_file, args.opts, args.num_gpus)
    dump_proposals(cfg, args)

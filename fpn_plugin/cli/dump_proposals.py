"""``fpn-plugin dump-proposals``: a trained RPN's proposals of datasets.

Fast R-CNN on fixed proposals (paper, section 5.2) trains on them, through MODEL.LOAD_PROPOSALS.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from fpn_plugin.engine.proposal_dump import dump_proposals
from fpn_plugin.engine.settings import config_on_device

from .common import ToolParser, add_shared

__all__ = ["argument_parser", "dump_proposals_main"]

_EXAMPLES = """
Example:
  fpn-plugin dump-proposals --config-file output/mini/table1_c_FPN/seed0/config.yaml \\
      --splits mini_train mini_val --output output/mini/table1_c_FPN/seed0/proposals \\
      MODEL.WEIGHTS output/mini/table1_c_FPN/seed0/model_final.pth
"""


def argument_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = ToolParser(
        "fpn-plugin dump-proposals",
        description="Write the proposals of a trained RPN for datasets, one file each. The same "
        "command resumes an interrupted run.",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "--splits", nargs="+", required=True, metavar="DATASET", help="registered datasets"
    )
    add_shared(parser, "--output", required=True, help="folder for a <dataset>.pkl of each")
    add_shared(parser, "--config-file", "--dataset", "--num-gpus", "--dist-url", "opts")
    parser.set_defaults(num_machines=1, machine_rank=0)
    return parser


def dump_proposals_main(argv: Sequence[str] | None = None) -> None:
    """Writes ``<output>/<dataset>.pkl`` for each dataset; see :func:`dump_proposals`.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: something given cannot be used, or the model gives no proposals.
    """
    args = argument_parser().parse_args(argv)
    cfg = config_on_device(args.config_file, args.opts, args.num_gpus)
    dump_proposals(cfg, args)

"""``fpn-plugin train``: trains and evaluates the model of a yacs or a lazy config."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import torch
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from torch import nn

from fpn_plugin.deploy import optimize_for_inference
from fpn_plugin.deploy.optimize import print_steps
from fpn_plugin.engine.run import YacsRun
from fpn_plugin.engine.settings import load_config
from fpn_plugin.errors import UserError
from fpn_plugin.lazy import load_lazy_config
from fpn_plugin.lazy.trainer import LazyRun

from .common import ToolParser, add_shared, at_least

__all__ = ["argument_parser", "lazy_main", "train_main"]

_EXAMPLES = """
Examples:
  fpn-plugin train --config-file mini/faster_rcnn_R_18_FPN.yaml
  fpn-plugin train --config-file COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml --num-gpus 8
  fpn-plugin train --config-file my.yaml --dataset cells=cells.json:images \\
      DATASETS.TRAIN "('cells',)"
  fpn-plugin train --config-file my.py train.max_iter=5000 train.output_dir=output/my
  fpn-plugin evaluate --config-file my.yaml MODEL.WEIGHTS model_final.pth
  torchrun --nproc-per-node 8 -m fpn_plugin train --config-file my.yaml
"""


def argument_parser(command: str = "train") -> argparse.ArgumentParser:
    """Detectron2's arguments, and what this adds.

    Args:
        command: "train", or "evaluate", which is training's --eval-only.
    """
    parser = ToolParser(
        f"fpn-plugin {command}",
        description="Train a model and evaluate it."
        if command == "train"
        else "Evaluate a trained model.",
        epilog=_EXAMPLES,
        parents=[default_argument_parser()],
        add_help=False,  # theirs has it
        conflict_handler="resolve",  # for the arguments below that theirs has too
    )
    add_shared(parser, "--config-file", required=False, default="")
    add_shared(parser, "--dist-url", default=parser.get_default("dist_url"))
    add_shared(parser, "--num-gpus", "--dataset", "--optimize")
    parser.add_argument("--num-machines", type=at_least(1), default=1)
    parser.add_argument(
        "--machine-rank", type=at_least(0), default=0, help="of this machine, from 0"
    )
    parser.set_defaults(eval_only=command == "evaluate")
    return parser


def train_main(
    argv: Sequence[str] | None = None, *, command: str = "train", lazy: bool = False
) -> None:
    """Trains, or evaluates with --eval-only, what the command line says.

    Args:
        argv: arguments; those of the command line by default.
        command: see :func:`argument_parser`.
        lazy: the config is a lazy one whatever its name; otherwise it is if it ends in ``.py``.

    Raises:
        UserError: something given cannot be used. All that can be checked is checked before the
            first process starts.
    """
    args = argument_parser(command).parse_args(argv)
    if lazy and not args.config_file:
        raise UserError("--config-file is missing: a lazy config's path or a packaged name")
    lazy = lazy or args.config_file.endswith(".py")
    cfg = (load_lazy_config if lazy else load_config)(args.config_file, args.opts)
    optimize = partial(_optimized, dtype=getattr(torch, args.optimize)) if args.optimize else None
    (LazyRun if lazy else YacsRun)(cfg, args, optimize).start()


def lazy_main(argv: Sequence[str] | None = None) -> None:
    """:func:`train_main` of a lazy config, packaged ones by the names of their YAML files."""
    train_main(argv, lazy=True)


def _optimized(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    fast = optimize_for_inference(model, dtype=dtype)
    if comm.is_main_process():
        print_steps(fast)
    return fast

"""fpn-plugin train: trains and evaluates the model of a yacs or a lazy config."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import torch
from detectron2.engine import default_argument_parser
from detectron2.utils import comm
from torch import nn

from fpn_plugin.deploy import optimize_for_inference
from fpn_plugin.engine.run import YacsRun
from fpn_plugin.engine.settings import load_config
from fpn_plugin.errors import UserError
from fpn_plugin.lazy import load_lazy_config
from fpn_plugin.lazy.trainer import LazyRun

from .common import ToolParser, at_least, dist_url
from .optimize_arguments import add_optimize_argument, optimize_dtype, print_steps

__all__ = ["argument_parser", "lazy_main", "train_main"]

_EXAMPLES = """
Examples:
  train_net.py --config-file mini/faster_rcnn_R_18_FPN.yaml
  train_net.py --config-file COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml --num-gpus 8
  train_net.py --config-file my.yaml --dataset cells=cells.json:images DATASETS.TRAIN "('cells',)"
  train_net.py --config-file my.yaml --eval-only MODEL.WEIGHTS model_final.pth
  torchrun --nproc-per-node 8 train_net.py --config-file my.yaml
"""
_LAZY_EXAMPLES = """
Examples:
  lazyconfig_train_net.py --config-file mini/faster_rcnn_R_18_FPN.yaml
  lazyconfig_train_net.py --config-file my.py --num-gpus 8 train.output_dir=output/my
  lazyconfig_train_net.py --config-file my.py --eval-only train.init_checkpoint=model_final.pth
"""

# Of Detectron2's arguments, what is not as in its own tools.
_TYPES = {
    "num_gpus": at_least(1, 1024),
    "num_machines": at_least(1),
    "machine_rank": at_least(0),
    "dist_url": dist_url,
}
_HELP = {
    "config_file": "path of a config, or name of a packaged one",
    "num_gpus": "GPUs on this machine; with MODEL.DEVICE cpu, processes",
}


def argument_parser(examples: str = _EXAMPLES) -> argparse.ArgumentParser:
    """Detectron2's arguments, and --dataset.

    Args:
        examples: what --help ends with.
    """
    parser = ToolParser(
        description="Train a model and evaluate it.",
        epilog=examples,
        parents=[default_argument_parser()],
        add_help=False,  # theirs has it
    )
    for action in parser._actions:
        action.type = _TYPES.get(action.dest, action.type)
        action.help = _HELP.get(action.dest, action.help)
    parser.add_argument(
        "--dataset",
        action="append",
        default=[],
        metavar="NAME=JSON:IMAGES",
        help="register COCO-format data under a name; may be given several times",
    )
    return parser


def train_main(argv: Sequence[str] | None = None, *, lazy: bool = False) -> None:
    """Trains, or evaluates with --eval-only, what the command line says.

    Args:
        argv: arguments; those of the command line by default.
        lazy: the config is a lazy one whatever its name; otherwise it is if it ends in ``.py``.

    Raises:
        UserError: something given cannot be used. All that can be checked is checked before the
            first process starts.
    """
    parser = argument_parser(_LAZY_EXAMPLES if lazy else _EXAMPLES)
    add_optimize_argument(parser)
    args = parser.parse_args(argv)
    if lazy and not args.config_file:
        raise UserError("--config-file is missing: a lazy config's path or a packaged name")
    lazy = lazy or args.config_file.endswith(".py")
    cfg = (load_lazy_config if lazy else load_config)(args.config_file, args.opts)
    optimize = partial(_optimized, dtype=optimize_dtype(args)) if args.optimize else None
    (LazyRun if lazy else YacsRun)(cfg, args, optimize).start()


def lazy_main(argv: Sequence[str] | None = None) -> None:
    """:func:`train_main` of a lazy config, packaged ones by the names of their YAML files."""
    train_main(argv, lazy=True)


def _optimized(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    fast = optimize_for_inference(model, dtype=dtype)
    if comm.is_main_process():
        print_steps(fast)
    return fast

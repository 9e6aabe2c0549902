r"""Train a model and evaluate it. The command evaluate only evaluates a trained model.

Examples:
  fpn-plugin train --config-file mini/faster_rcnn_R_18_FPN.yaml
  fpn-plugin train --config-file COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml --num-gpus 8
  fpn-plugin train --config-file own_data/faster_rcnn_R_18_FPN.yaml \
      --dataset cells_train=cells/train.json:cells/images DATASETS.TRAIN "('cells_train',)" \
      MODEL.ROI_HEADS.NUM_CLASSES 3
  fpn-plugin train --config-file my.py train.max_iter=5000 train.output_dir=output/my
  fpn-plugin evaluate --config-file my.yaml MODEL.WEIGHTS model_final.pth
  torchrun --nproc-per-node 8 -m fpn_plugin train --config-file my.yaml
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

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

from .common import Arguments, ToolParser, add_shared, at_least, command_parser

__all__ = ["lazy_main", "train_main"]


def _parser(command: str) -> ToolParser:
    parser = command_parser(
        command,
        __doc__,
        parents=[default_argument_parser()],
        add_help=False,  # theirs has it
        conflict_handler="resolve",  # for the arguments below that theirs has too
    )
    add_shared(parser, "--config-file", required=False, default="")
    add_shared(parser, "--dist-url", default=parser.get_default("dist_url"))
    add_shared(parser, "--num-gpus", "--dataset", "--optimize")
    parser.add_argument("--num-machines", type=at_least(1), default=1)
    rank = "rank of this machine, from 0"
    parser.add_argument("--machine-rank", type=at_least(0), default=0, help=rank)
    parser.set_defaults(eval_only=command == "evaluate")
    return parser


def train_main(argv: Arguments = None, *, command: str = "train", lazy: bool = False) -> Path:
    """Trains or evaluates a model.

    Args:
        argv: arguments; those of the command line by default.
        command: "train", or "evaluate", which is train with --eval-only.
        lazy: whether the config is a lazy one; a name that ends in ``.py`` always is.

    Returns:
        The output folder.
    """
    args = _parser(command).parse_args(argv)
    if lazy and not args.config_file:
        raise UserError("--config-file is missing: a lazy config's path or a packaged name")
    lazy = lazy or args.config_file.endswith(".py")
    cfg = (load_lazy_config if lazy else load_config)(args.config_file, args.opts)
    optimize = partial(_optimized, dtype=getattr(torch, args.optimize)) if args.optimize else None
    run = (LazyRun if lazy else YacsRun)(cfg, args, optimize)
    run.start()
    return Path(run.config["output_dir"])


def lazy_main(argv: list[str] | None = None) -> None:
    """Trains or evaluates the model of a lazy config; see :func:`train_main`."""
    train_main(argv, lazy=True)


def _optimized(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    fast = optimize_for_inference(model, dtype=dtype)
    if comm.is_main_process():
        print_steps(fast)
    return fast

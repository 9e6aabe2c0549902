"""What tools/train_net.py does: arguments in, a trained and evaluated model out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.utils import comm

from fpn_plugin.data import (
    check_config_datasets,
    ensure_mini_datasets,
    number_of_classes,
    register_datasets,
    registered_specs,
)
from fpn_plugin.deploy import optimize_for_inference
from fpn_plugin.deploy.arguments import add_optimize_argument, optimize_dtype, print_steps
from fpn_plugin.errors import UserError

from .atomic import explained_full_disk, make_output_dir
from .checkpoint import FittingCheckpointer
from .class_names import match_datasets
from .launch import launch
from .settings import check_seed, check_solver, find_config_file, load_config, settle_device
from .trainer import FPNTrainer, save_results

__all__ = ["argument_parser", "train_main"]

_EXAMPLES = """
Examples:
  train_net.py --config-file mini/faster_rcnn_R_18_FPN.yaml
  train_net.py --config-file COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml --num-gpus 8
  train_net.py --config-file my.yaml --dataset cells=cells.json:images DATASETS.TRAIN "('cells',)"
  train_net.py --config-file my.yaml --eval-only MODEL.WEIGHTS model_final.pth
  torchrun --nproc-per-node 8 train_net.py --config-file my.yaml
"""


def argument_parser(examples: str = _EXAMPLES) -> argparse.ArgumentParser:
    """Detectron2's arguments, and --dataset.

    Args:
        examples: what --help ends with.
    """
    parser = default_argument_parser(epilog=examples)
    for action in parser._actions:
        if action.dest == "config_file":
            action.help = "path of a config, or name of a packaged one"
        if action.dest == "num_gpus":
            action.help = "GPUs on this machine; with MODEL.DEVICE cpu, processes"
    parser.add_argument(
        "--dataset",
        action="append",
        default=[],
        metavar="NAME=JSON:IMAGES",
        help="register COCO-format data under a name; may be given several times",
    )
    return parser


def train_main(argv: Sequence[str] | None = None) -> None:
    """Trains, or evaluates with --eval-only, what the command line says.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: something given cannot be used. All that can be checked is checked before the
            first process starts.
    """
    parser = argument_parser()
    add_optimize_argument(parser)
    args = parser.parse_args(argv)
    if args.optimize and not args.eval_only:
        raise UserError("--optimize is for --eval-only: an optimised model cannot be trained")
    cfg = load_config(args.config_file, args.opts)
    check_seed("SEED", cfg.SEED)
    if not args.eval_only:
        check_solver(cfg)
    if args.config_file:
        args.config_file = find_config_file(args.config_file)  # Detectron2 logs its content
    settle_device(cfg, "MODEL.DEVICE" in args.opts[::2], args.num_gpus)
    register_datasets(args.dataset, checked=True)  # by the next line
    check_config_datasets(cfg, training=not args.eval_only)
    args.dataset = registered_specs(args.dataset)
    if not args.eval_only and not cfg.DATASETS.TRAIN:
        raise UserError("DATASETS.TRAIN is empty: name a dataset to train on")
    _match_datasets(cfg, args)
    make_output_dir(cfg.OUTPUT_DIR, "OUTPUT_DIR")
    ensure_mini_datasets(cfg.DATASETS.TRAIN + cfg.DATASETS.TEST)
    cfg.freeze()
    launch(_worker, args, cfg.MODEL.DEVICE, (cfg, args))


def _worker(cfg: CfgNode, args: argparse.Namespace) -> None:
    """One process of a training or an evaluation.

    Raises:
        UserError: something given cannot be used, or the disk is full.
    """
    full = explained_full_disk(f"to {cfg.OUTPUT_DIR}", "make room, then give the command again")
    with full:
        _run(cfg, args)


def _match_datasets(cfg: CfgNode, args: argparse.Namespace) -> None:
    match_datasets(
        cfg.DATASETS.TRAIN,
        cfg.DATASETS.TEST,
        cfg.MODEL.WEIGHTS,
        cfg.OUTPUT_DIR,
        resume=args.resume,
        training=not args.eval_only,
        classes=number_of_classes(cfg)[1],
    )


def _run(cfg: CfgNode, args: argparse.Namespace) -> None:
    # Started processes begin with what an import registers.
    register_datasets(args.dataset, checked=True)
    _match_datasets(cfg, args)
    default_setup(cfg, args)
    if args.eval_only:
        model = FPNTrainer.build_model(cfg)
        FittingCheckpointer(model, cfg.OUTPUT_DIR, complete=True).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        if args.optimize:
            model = optimize_for_inference(model, dtype=optimize_dtype(args))
            if comm.is_main_process():
                print_steps(model)
        results = FPNTrainer.test(cfg, model)
    else:
        trainer = FPNTrainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        trainer.train()
        results = trainer.results
    if results and comm.is_main_process():
        save_results(results, cfg.OUTPUT_DIR)

"""What tools/train_net.py does: arguments in, a trained and evaluated model out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from detectron2.config import CfgNode
from detectron2.engine import default_argument_parser, default_setup
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm

from fpn_plugin.data import (
    check_config_datasets,
    number_of_classes,
    register_datasets,
    registered_specs,
)
from fpn_plugin.deploy import optimize_for_inference
from fpn_plugin.engine.changes import earlier_config_kept
from fpn_plugin.engine.checkpoint import StrictCheckpointer
from fpn_plugin.engine.class_names import match_datasets
from fpn_plugin.engine.expectations import check_augmentation, check_expected, verify_expected
from fpn_plugin.engine.launch import launch
from fpn_plugin.engine.settings import (
    check_seed,
    check_solver,
    find_config_file,
    load_config,
    settle_device,
)
from fpn_plugin.engine.trainer import FPNTrainer, save_results
from fpn_plugin.errors import UserError
from fpn_plugin.mini import ensure_mini_datasets
from fpn_plugin.utils.atomic import explained_full_disk, make_output_dir

from .common import ToolParser, at_least, dist_url
from .optimize_arguments import add_optimize_argument, optimize_dtype, print_steps

__all__ = ["argument_parser", "train_main"]

_EXAMPLES = """
Examples:
  train_net.py --config-file mini/faster_rcnn_R_18_FPN.yaml
  train_net.py --config-file COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml --num-gpus 8
  train_net.py --config-file my.yaml --dataset cells=cells.json:images DATASETS.TRAIN "('cells',)"
  train_net.py --config-file my.yaml --eval-only MODEL.WEIGHTS model_final.pth
  torchrun --nproc-per-node 8 train_net.py --config-file my.yaml
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
    _check_evaluation(cfg, optimized=bool(args.optimize))
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


def _check_evaluation(cfg: CfgNode, *, optimized: bool) -> None:
    """Refuses keys of an evaluation that could not be done.

    Raises:
        UserError: names them.
    """
    check_expected("TEST.EXPECTED_RESULTS", cfg.TEST.EXPECTED_RESULTS, cfg.DATASETS.TEST)
    model = cfg.MODEL
    # A name that is not registered is for the model's builder to tell.
    if cfg.TEST.AUG.ENABLED and model.META_ARCHITECTURE in META_ARCH_REGISTRY:
        check_augmentation(
            "TEST.AUG.ENABLED",
            META_ARCH_REGISTRY.get(model.META_ARCHITECTURE),
            keypoints=model.KEYPOINT_ON,
            proposals=model.LOAD_PROPOSALS,
            min_sizes=cfg.TEST.AUG.MIN_SIZES,
        )
        if optimized:
            raise UserError("TEST.AUG.ENABLED is True: --optimize has no test-time augmentation")


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
    with earlier_config_kept(cfg.OUTPUT_DIR, always=args.eval_only):
        default_setup(cfg, args)
        trainer = None if args.eval_only else FPNTrainer(cfg)
        if trainer is not None:
            trainer.resume_or_load(resume=args.resume)
    if trainer is None:
        model = FPNTrainer.build_model(cfg)
        StrictCheckpointer(model, cfg.OUTPUT_DIR, complete=True).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        if args.optimize:
            model = optimize_for_inference(model, dtype=optimize_dtype(args))
            if comm.is_main_process():
                print_steps(model)
        results = FPNTrainer.test(cfg, model)
        if cfg.TEST.AUG.ENABLED:
            results = {**results, **FPNTrainer.test_with_TTA(cfg, model)}
        if comm.is_main_process():
            save_results(results, cfg.OUTPUT_DIR)
            verify_expected("TEST.EXPECTED_RESULTS", cfg.TEST.EXPECTED_RESULTS, results)
    else:
        trainer.train()

"""What tools/lazyconfig_train_net.py does: a lazy config in, a trained and evaluated model out."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import LazyConfig, get_cfg, instantiate
from detectron2.data.transforms import RandomFlip
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    create_ddp_model,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.modeling import DatasetMapperTTA, GeneralizedRCNNWithTTA
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fpn_plugin import model_zoo
from fpn_plugin.cli.train import argument_parser
from fpn_plugin.data import (
    Needs,
    check_channels,
    check_classes,
    check_datasets,
    check_keypoints,
    check_proposal_files,
    check_records,
    class_order,
    register_datasets,
    registered_specs,
    train_stream,
)
from fpn_plugin.deploy.fast_training import optimize_for_training
from fpn_plugin.engine.changes import check_length, earlier_config_kept
from fpn_plugin.engine.checkpoint import StrictCheckpointer
from fpn_plugin.engine.class_names import match_datasets
from fpn_plugin.engine.cpu_ddp import create_cpu_ddp_model
from fpn_plugin.engine.evaluation import DetectionEvaluator
from fpn_plugin.engine.evaluation_hook import JointEvalHook
from fpn_plugin.engine.expectations import check_augmentation, check_expected, verify_expected
from fpn_plugin.engine.launch import launch
from fpn_plugin.engine.level_statistics import LevelStatistics
from fpn_plugin.engine.nonfinite import LossWatch, SkippedSteps
from fpn_plugin.engine.precision import settle_precision
from fpn_plugin.engine.resume import ExactResume
from fpn_plugin.engine.settings import (
    check_mixed_precision,
    check_number,
    check_seed,
    settled_device,
)
from fpn_plugin.engine.trainer import LossCurve, save_results
from fpn_plugin.errors import UserError, near_names
from fpn_plugin.mini import ensure_mini_datasets
from fpn_plugin.utils.atomic import explained_full_disk, make_output_dir

from .checking import check_arguments, check_override_keys, check_override_types

__all__ = ["lazy_main", "load_lazy_config"]

_EXAMPLES = """
Examples:
  lazyconfig_train_net.py --config-file lazy/mini/faster_rcnn_R_18_FPN.py
  lazyconfig_train_net.py --config-file my.py --num-gpus 8 train.output_dir=output/my
  lazyconfig_train_net.py --config-file my.py --eval-only train.init_checkpoint=model_final.pth
"""


def load_lazy_config(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """A lazy config from a path or, failing that, the packaged one of that name.

    A lazy config is Python and is run, as are those that it imports: load those alone whose
    author you trust.

    Args:
        name: for example ``"lazy/COCO-Detection/faster_rcnn_R_50_FPN_1x.py"``.
        overrides: ``["train.max_iter=100", ...]``.

    Raises:
        UserError: there is none; or an override that does not fit; or an argument that what it
            is given to does not take.
    """
    known = model_zoo.lazy_names()
    path = name if Path(name).is_file() else None
    if path is None and name.removeprefix("configs/") in known:
        path = model_zoo.get_config_file(name.removeprefix("configs/"))
    if path is None:
        raise UserError(
            f"no lazy config {name!r}, neither as a path nor in the package: "
            f"{near_names(name, known)}"
        )
    for override in overrides:
        if override.startswith("--"):
            raise UserError(f"{override} stands among config options: give it before key=value")
        if "=" not in override:
            raise UserError(
                f"option {override!r}: lazy configs take key=value, as train.max_iter=9"
            )
    if not path.endswith(".py"):
        # Detectron2 reads others with tags that run code, and calls what they name as _target_.
        raise UserError(
            f"{path} is not a .py file; lazy configs are Python, and YAML is for train_net.py"
        )
    cfg = LazyConfig.load(path)
    missing = [part for part in ("model", "dataloader", "train") if part not in cfg]
    if missing:
        raise UserError(f"{name} is no config of a training: it has no {', '.join(missing)}")
    check_override_keys(cfg, overrides)
    before = copy.deepcopy(cfg)
    try:
        cfg = LazyConfig.apply_overrides(cfg, list(overrides))
        check_override_types(before, cfg, overrides)
    except UserError:
        raise
    except Exception as error:  # hydra, where it is installed, has its own for what it cannot read
        raise UserError(f"{' '.join(str(error).split())} (in {list(overrides)})") from error
    check_arguments(cfg)
    return cfg


def lazy_main(argv: Sequence[str] | None = None) -> None:
    """Trains, or evaluates with --eval-only, what the command line says.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: something given cannot be used.
    """
    args = argument_parser(_EXAMPLES).parse_args(argv)
    if not args.config_file:
        raise UserError("--config-file is missing: a lazy config's path or packaged name")
    cfg = load_lazy_config(args.config_file, args.opts)
    named = any(opt.startswith("train.device=") for opt in args.opts)
    cfg.train.device = settled_device(cfg.train.device, named, args.num_gpus, "train.device")
    register_datasets(args.dataset, checked=True)  # below
    names = {split: _names(cfg, split) for split in ("train", "test")}
    check_seed("train.seed", cfg.train.get("seed", -1))
    if not args.eval_only:
        _check_solver(cfg)
    check_expected("train.expected_results", _expected(cfg), names["test"])
    _check_evaluators(cfg)
    for split in ("test",) if args.eval_only else ("train", "test"):
        _check_channels(cfg, f"dataloader.{split}.mapper.image_format")
        check_datasets(names[split], f"dataloader.{split}.dataset.names")
        check_records(names[split], _needs(cfg, split))
        if split == "train" or args.eval_only:  # others are matched with the training's by name
            check_classes(names[split], *_classes(cfg.model))
        files = cfg.dataloader[split].dataset.get("proposal_files")
        if files is not None:
            key = f"dataloader.{split}.dataset.proposal_files"
            check_proposal_files(names[split], files, key)
    args.dataset = registered_specs(args.dataset)
    keypoints = OmegaConf.select(cfg, "model.roi_heads.keypoint_head.num_keypoints")
    if keypoints:
        _check_keypoints(cfg, names, keypoints, not args.eval_only)
    _match_datasets(cfg, args)
    make_output_dir(cfg.train.output_dir, "train.output_dir")
    ensure_mini_datasets(names["train"] + names["test"])
    args.config_file = ""  # Detectron2 would log it as if it were YAML
    launch(_worker, args, cfg.train.device, (cfg, args))


def _check_channels(cfg: DictConfig, key: str) -> None:
    """Refuses images of other channels than the model's."""
    keys = (key, "model.pixel_mean", "model.pixel_std")
    image_format, mean, std = (OmegaConf.select(cfg, each) for each in keys)
    if None not in (image_format, mean, std):  # a config of one's own may go without
        check_channels(image_format, mean, std, keys)


def _match_datasets(cfg: DictConfig, args: argparse.Namespace) -> None:
    match_datasets(
        _names(cfg, "train"),
        _names(cfg, "test"),
        cfg.train.init_checkpoint,
        cfg.train.output_dir,
        resume=args.resume,
        training=not args.eval_only,
        classes=_classes(cfg.model)[1],
    )


def _names(cfg: DictConfig, split: str) -> list[str]:
    names = cfg.dataloader[split].dataset.names
    return [names] if isinstance(names, str) else list(names)


def _check_solver(cfg: DictConfig) -> None:
    keys = {
        "train.max_iter": 1,
        "train.checkpointer.period": 1,
        "dataloader.train.total_batch_size": 1,
        "optimizer.lr": 0,
    }
    for key, least in keys.items():
        value = OmegaConf.select(cfg, key)
        if value is not None:  # a config may go without
            check_number(key, value, least)


def _needs(cfg: DictConfig, split: str) -> Needs:
    """What a lazy config's model and mapper ask of the data; see :meth:`Needs.of`."""

    def of(key: str, otherwise: Any = None) -> Any:
        return OmegaConf.select(cfg, key, default=otherwise)

    mapper = f"dataloader.{split}.mapper"
    resized = [
        node["max_size"]
        for node in of(f"{mapper}.augmentations") or ()
        if isinstance(node, DictConfig) and node.get("max_size")
    ]
    has_masks = of("model.roi_heads.mask_head") is not None
    return Needs(
        max_size=min(resized, default=2**31),
        masks=of(f"{mapper}.instance_mask_format", "polygon") if has_masks else "",
        keypoints=of("model.roi_heads.keypoint_head.num_keypoints", 0),
        visible=of("dataloader.train.dataset.min_keypoints", 0) if split == "train" else 1,
        training=split == "train",
    )


def _check_keypoints(
    cfg: DictConfig, names: dict[str, list[str]], keypoints: int, training: bool
) -> None:
    flips = [
        way
        for node in OmegaConf.select(cfg, "dataloader.train.mapper.augmentations") or ()
        if OmegaConf.is_dict(node) and _is_target(node, RandomFlip)
        for way, otherwise in (("horizontal", True), ("vertical", False))
        if node.get(way, otherwise)
    ]
    evaluators = cfg.dataloader.get("evaluator")
    sigmas = [
        node.get("kpt_oks_sigmas")
        for node in (evaluators if OmegaConf.is_list(evaluators) else [evaluators])
        if OmegaConf.is_dict(node) and _is_target(node, DetectionEvaluator)
    ]
    check_keypoints(
        names["train"] if training else (),
        names["test"] if sigmas else (),
        keypoints,
        flips=flips,
        sigmas=next(filter(None, sigmas), ()),
    )


def _is_target(node: DictConfig, target: type) -> bool:
    """Whether a node makes this class, as LazyCall or a YAML names it."""
    given = node.get("_target_")
    return given is target or str(given).rpartition(".")[2] == target.__name__


def _classes(model: DictConfig) -> tuple[str, int | None]:
    """The key of a lazy model's number of classes and that number; None for one without."""
    for key in ("roi_heads.num_classes", "num_classes"):
        classes = OmegaConf.select(model, key)
        if classes is not None:
            return f"model.{key}", classes
    return "", None


def _test_sets(cfg: DictConfig) -> Iterator[tuple[str, DictConfig]]:
    """Each test set's name, and cfg.dataloader as it is for that set alone."""
    names, files = _names(cfg, "test"), cfg.dataloader.test.dataset.get("proposal_files")
    for i, name in enumerate(names):
        dataloader = copy.deepcopy(cfg.dataloader)
        dataloader.test.dataset.names = name
        if files is not None:
            dataloader.test.dataset.proposal_files = [files[i]]
        yield name, dataloader


def _check_evaluators(cfg: DictConfig) -> None:
    """Refuses evaluators of another set than the one whose detections they are given."""
    for name, dataloader in _test_sets(cfg):
        evaluators = dataloader.get("evaluator")
        for node in evaluators if OmegaConf.is_list(evaluators) else [evaluators]:
            told = node.get("dataset_name", name) if OmegaConf.is_dict(node) else name
            if told != name:
                raise UserError(
                    f"dataloader.evaluator has dataset_name {told!r}, and "
                    f"dataloader.test.dataset.names has {name!r}: leave the evaluator's out, it "
                    "follows the other"
                )


def _built(node: Any, key: str) -> Any:
    """What a lazy node makes; a UserError for values that its parts cannot be made of."""
    try:
        return instantiate(node)
    except UserError:
        raise
    except (
        AssertionError, AttributeError, KeyError, TypeError, ValueError, OmegaConfBaseException
    ) as error:  # fmt: skip
        told = " ".join(str(error).split())
        raise UserError(f"{key} cannot be built: {type(error).__name__}: {told}") from error


def _worker(cfg: DictConfig, args: argparse.Namespace) -> None:
    """One process of a training or an evaluation.

    Raises:
        UserError: something given cannot be used, or the disk is full.
    """
    folder = cfg.train.output_dir
    with explained_full_disk(f"to {folder}", "make room, then give the command again"):
        _run(cfg, args)


def _run(cfg: DictConfig, args: argparse.Namespace) -> None:
    register_datasets(args.dataset, checked=True)
    _match_datasets(cfg, args)
    folder = cfg.train.output_dir
    with earlier_config_kept(folder, always=args.eval_only):
        default_setup(cfg, args)
        train = None if args.eval_only else _training(cfg, args.resume)
    if train is None:
        model = _model(cfg)
        StrictCheckpointer(model, folder, complete=True).resume_or_load(
            cfg.train.init_checkpoint, resume=args.resume
        )
        results = {**_evaluate(cfg, model), **_evaluate_augmented(cfg, model)}
    else:
        results = train()
    if comm.is_main_process():
        save_results(results, folder)
        verify_expected("train.expected_results", _expected(cfg), results)


def _model(cfg: DictConfig) -> nn.Module:
    device = cfg.train.device
    model = _built(cfg.model, "model").to(device)
    if _augmented(cfg):
        check_augmentation(
            "train.tta.enabled",
            type(model),
            keypoints=getattr(getattr(model, "roi_heads", None), "keypoint_on", False),
            proposals=getattr(model, "proposal_generator", None) is None,
            min_sizes=cfg.train.tta.min_sizes,
        )
    optimize_for_training(model, cfg.train.get("compile", False))
    return model


def _training(cfg: DictConfig, resume: bool) -> Callable[[], dict[str, Any]]:
    """Makes all of a training, its weights loaded; the function returned runs it."""
    train = cfg.train
    check_mixed_precision(train.amp.enabled, train.device, "train.amp.enabled")
    model = _model(cfg)
    as_given = copy.deepcopy(cfg)
    cfg.optimizer.params.model = model
    optimizer = _built(cfg.optimizer, "optimizer")
    on_gpu = train.device.startswith("cuda")
    model = (create_ddp_model if on_gpu else create_cpu_ddp_model)(model, **train.ddp)
    kind = AMPTrainer if train.amp.enabled else SimpleTrainer
    loader = train_stream(_built(cfg.dataloader.train, "dataloader.train"))
    trainer = kind(model, loader, optimizer)
    if train.amp.enabled:
        settle_precision(trainer, train.amp.get("dtype", "float16"), "train.amp.dtype")
    scales = train.amp.enabled and trainer.grad_scaler.is_enabled()
    classes = class_order(_names(cfg, "train")[0])
    checkpointer = StrictCheckpointer(model, train.output_dir, classes=classes, trainer=trainer)
    watch = LossWatch(
        model,
        "a lower optimizer.lr or a longer lr_multiplier.warmup_length",
    )
    exact = ExactResume(train.get("seed", -1), loader, train.output_dir, as_given, optimizer)
    main = comm.is_main_process()
    results: dict[str, Any] = {}

    def evaluate() -> dict[str, Any]:
        results.update(_evaluate(cfg, model))
        return results

    def evaluate_augmented() -> dict[str, Any]:
        found = _evaluate_augmented(cfg, model)
        results.update(found)
        return found

    trainer.register_hooks(
        [
            exact,
            watch,
            SkippedSteps(optimizer, trainer.grad_scaler) if scales else None,
            LevelStatistics(model, period) if (period := train.get("level_stats_period")) else None,
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=_built(cfg.lr_multiplier, "lr_multiplier")),
            hooks.PeriodicCheckpointer(checkpointer, **train.checkpointer) if main else None,
            JointEvalHook(train.eval_period, evaluate),
            JointEvalHook(0, evaluate_augmented) if _augmented(cfg) else None,
            hooks.PeriodicWriter(
                default_writers(train.output_dir, train.max_iter), period=train.log_period
            )
            if main
            else None,
            LossCurve(Path(train.output_dir)) if main else None,
        ]
    )
    with exact.explained():
        checkpointer.resume_or_load(train.init_checkpoint, resume=resume)
    start = trainer.iter + 1 if resume and checkpointer.has_checkpoint() else 0
    check_length(start, train.max_iter, "train.max_iter")

    def run() -> dict[str, Any]:
        full = explained_full_disk(f"to {train.output_dir}", "make room, then go on with --resume")
        with full, watch.explained():
            trainer.train(start, train.max_iter)
        return results

    return run


def _expected(cfg: DictConfig) -> list[Any]:
    return OmegaConf.to_object(cfg.train.get("expected_results") or OmegaConf.create([]))


def _augmented(cfg: DictConfig) -> bool:
    return bool(OmegaConf.select(cfg, "train.tta.enabled"))


def _evaluate_augmented(cfg: DictConfig, model: nn.Module) -> dict[str, Any]:
    """Results with test-time augmentation, their names with ``_TTA`` behind; {} without it."""
    if not _augmented(cfg):
        return {}
    model = model.module if isinstance(model, DistributedDataParallel) else model
    heads, tta = model.roi_heads, cfg.train.tta
    predictors = heads.box_predictor
    predictor = predictors[-1] if isinstance(predictors, nn.ModuleList) else predictors
    node = get_cfg()  # it reads these keys of a yacs config
    node.MODEL.MASK_ON = heads.mask_on
    node.MODEL.ROI_HEADS.NUM_CLASSES = heads.num_classes
    node.MODEL.ROI_HEADS.NMS_THRESH_TEST = predictor.test_nms_thresh
    node.TEST.DETECTIONS_PER_IMAGE = predictor.test_topk_per_image
    mapper = DatasetMapperTTA(list(tta.min_sizes), tta.max_size, tta.flip)
    augmented = GeneralizedRCNNWithTTA(node, model, mapper)
    results = _evaluate(cfg, augmented, f"{cfg.train.output_dir}/inference_TTA")
    return {f"{name}_TTA": result for name, result in results.items()}


def _evaluate(cfg: DictConfig, model: nn.Module, folder: str = "") -> dict[str, Any]:
    """Results of the test sets; files go to a folder other than the evaluators' if one is named."""
    if "evaluator" not in cfg.dataloader:
        return {}
    results = {}
    for name, dataloader in _test_sets(cfg):
        evaluators = dataloader.evaluator
        for node in evaluators if OmegaConf.is_list(evaluators) else [evaluators]:
            if folder and "output_dir" in node:
                node.output_dir = folder
        results[name] = inference_on_dataset(
            model,
            _built(dataloader.test, "dataloader.test"),
            _built(dataloader.evaluator, "dataloader.evaluator"),
        )
        if comm.is_main_process():
            print_csv_format(results[name])
    found = {name: result or {} for name, result in results.items()}
    # As Detectron2's: the set's name is said where there are several.
    return found if len(found) > 1 else next(iter(found.values()), {})

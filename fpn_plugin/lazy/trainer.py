"""Runs of lazy configs: training, evaluation, and what their configs need of the data."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from detectron2.config import get_cfg, instantiate
from detectron2.data.transforms import RandomFlip
from detectron2.engine import default_writers, hooks
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.modeling import DatasetMapperTTA, GeneralizedRCNNWithTTA
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fpn_plugin.data import Needs, check_channels, class_order, train_stream
from fpn_plugin.deploy.fast_training import optimize_for_training
from fpn_plugin.engine.changes import check_length
from fpn_plugin.engine.checkpoint import StrictCheckpointer
from fpn_plugin.engine.evaluation import DetectionEvaluator
from fpn_plugin.engine.hooks import TrainingHooks
from fpn_plugin.engine.results import finish
from fpn_plugin.engine.run import Run
from fpn_plugin.engine.step_trainer import step_trainer
from fpn_plugin.errors import UserError

__all__ = ["LazyRun", "build_node"]


class LazyRun(Run):
    """A run of a lazy config; see :class:`Run`."""

    def start(self) -> None:
        """See :meth:`Run.start`."""
        self.args.config_file = ""  # Detectron2 would log it as if it were YAML
        super().start()

    def needs(self, split: str) -> Needs:
        """See :meth:`Run.needs`."""
        mapper = f"dataloader.{split}.mapper"
        resized = [
            node["max_size"]
            for node in self._select(f"{mapper}.augmentations") or ()
            if isinstance(node, DictConfig) and node.get("max_size")
        ]
        has_masks = self._select("model.roi_heads.mask_head") is not None
        visible = self._select("dataloader.train.dataset.min_keypoints", 0)
        return Needs(
            max_size=min(resized, default=2**31),
            masks=self._select(f"{mapper}.instance_mask_format", "polygon") if has_masks else "",
            keypoints=self._select("model.roi_heads.keypoint_head.num_keypoints", 0),
            visible=visible if split == "train" else 1,
            training=split == "train",
        )

    def classes(self) -> tuple[str, int | None]:
        """See :meth:`Run.classes`."""
        for key in ("model.roi_heads.num_classes", "model.num_classes"):
            classes = self._select(key)
            if classes is not None:
                return key, classes
        return "", None

    def proposal_files(self, split: str) -> Sequence[str] | None:
        """See :meth:`Run.proposal_files`."""
        return self.config[f"{split}_proposals"]

    def flips(self) -> Sequence[str]:
        """See :meth:`Run.flips`."""
        return [
            way
            for node in self._select("dataloader.train.mapper.augmentations") or ()
            if OmegaConf.is_dict(node) and _is_target(node, RandomFlip)
            for way, otherwise in (("horizontal", True), ("vertical", False))
            if node.get(way, otherwise)
        ]

    def keypoint_sigmas(self) -> Sequence[float] | None:
        """See :meth:`Run.keypoint_sigmas`."""
        sigmas = [
            node.get("kpt_oks_sigmas")
            for node in _nodes(self.config.cfg.dataloader.get("evaluator"))
            if OmegaConf.is_dict(node) and _is_target(node, DetectionEvaluator)
        ]
        return next(filter(None, sigmas), ()) if sigmas else None

    def check_config(self) -> None:
        """Checks the channels of images and models, and which sets evaluators are for."""
        for split in ("train", "test") if self.training else ("test",):
            key = f"dataloader.{split}.mapper.image_format"
            keys = (key, "model.pixel_mean", "model.pixel_std")
            image_format, mean, std = map(self._select, keys)
            if None not in (image_format, mean, std):  # a user's own config may leave them out
                check_channels(image_format, mean, std, keys)
        for name, dataloader in self._test_sets():
            for node in _nodes(dataloader.get("evaluator")):
                own = node.get("dataset_name", name) if OmegaConf.is_dict(node) else name
                if own != name:
                    raise UserError(
                        f"dataloader.evaluator has dataset_name {own!r}, and "
                        f"dataloader.test.dataset.names has {name!r}: leave the evaluator's out, "
                        "it follows the other"
                    )

    def model(self) -> nn.Module:
        """See :meth:`Run.model`."""
        model = build_node(self.config.cfg.model, "model").to(self.config["device"])
        self.config.check_augmented_test(
            type(model),
            keypoints=getattr(getattr(model, "roi_heads", None), "keypoint_on", False),
            proposals=getattr(model, "proposal_generator", None) is None,
        )
        optimize_for_training(model, self.config["compile"])
        return model

    def trainer(self) -> Callable[[], dict[str, Any]]:
        """See :meth:`Run.trainer`."""
        config, train = self.config, self.config.cfg.train
        model = self.model()
        with_model = copy.deepcopy(config.cfg)
        with_model.optimizer.params.model = model
        loader = train_stream(build_node(config.cfg.dataloader.train, "dataloader.train"))
        optimizer = build_node(with_model.optimizer, "optimizer")
        trainer = step_trainer(model, loader, optimizer, config, **train.ddp)
        model = trainer.model
        checkpointer = StrictCheckpointer(
            model, train.output_dir, classes=class_order(config.names("train")[0]), trainer=trainer
        )
        results: dict[str, Any] = {}

        def evaluate() -> dict[str, Any]:
            results.update(self._evaluate(model))
            return results

        def evaluate_augmented() -> dict[str, Any]:
            found = self._evaluate_augmented(model)
            results.update(found)
            return found

        detectron2s: list[hooks.HookBase | None] = [
            hooks.IterationTimer(),
            hooks.LRScheduler(scheduler=build_node(config.cfg.lr_multiplier, "lr_multiplier")),
            hooks.EvalHook(train.eval_period, evaluate),
        ]
        if comm.is_main_process():
            writers = default_writers(train.output_dir, train.max_iter)
            detectron2s.insert(2, hooks.PeriodicCheckpointer(checkpointer, **train.checkpointer))
            detectron2s.append(hooks.PeriodicWriter(writers, period=train.log_period))
        added = TrainingHooks(trainer, config)
        trainer.register_hooks(added.around(detectron2s, evaluate_augmented, checkpointer))
        with added.resume.explained():
            checkpointer.resume_or_load(train.init_checkpoint, resume=self.args.resume)
        start = trainer.iter + 1 if self.args.resume and checkpointer.has_checkpoint() else 0
        check_length(start, train.max_iter, "train.max_iter")

        def run() -> dict[str, Any]:
            with added.explained():
                trainer.train(start, train.max_iter)
            finish(config, results)
            return results

        return run

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """See :meth:`Run.evaluate`."""
        results = self._evaluate(model)
        if self.config["augmented_test"]:
            results = {**results, **self._evaluate_augmented(model)}
        return results

    def _evaluate(self, model: nn.Module, folder: str = "") -> dict[str, Any]:
        """Results of the test sets; a folder, if given, gets the files of all evaluators."""
        if "evaluator" not in self.config.cfg.dataloader:
            return {}
        results = {}
        for name, dataloader in self._test_sets():
            for node in _nodes(dataloader.evaluator):
                if folder and "output_dir" in node:
                    node.output_dir = folder
            loader = build_node(dataloader.test, "dataloader.test")
            evaluator = build_node(dataloader.evaluator, "dataloader.evaluator")
            results[name] = inference_on_dataset(model, loader, evaluator) or {}
            if comm.is_main_process():
                print_csv_format(results[name])
        # As Detectron2's: the set is named if there are several.
        return results if len(results) > 1 else next(iter(results.values()), {})

    def _evaluate_augmented(self, model: nn.Module) -> dict[str, Any]:
        """Results with test-time augmentation, their names with ``_TTA`` at the end."""
        model = model.module if isinstance(model, DistributedDataParallel) else model
        heads, tta = model.roi_heads, self.config.cfg.train.tta
        predictors = heads.box_predictor
        predictor = predictors[-1] if isinstance(predictors, nn.ModuleList) else predictors
        node = get_cfg()  # it reads these keys of a yacs config
        node.MODEL.MASK_ON = heads.mask_on
        node.MODEL.ROI_HEADS.NUM_CLASSES = heads.num_classes
        node.MODEL.ROI_HEADS.NMS_THRESH_TEST = predictor.test_nms_thresh
        node.TEST.DETECTIONS_PER_IMAGE = predictor.test_topk_per_image
        mapper = DatasetMapperTTA(list(tta.min_sizes), tta.max_size, tta.flip)
        augmented = GeneralizedRCNNWithTTA(node, model, mapper)
        results = self._evaluate(augmented, f"{self.config['output_dir']}/inference_TTA")
        return {f"{name}_TTA": result for name, result in results.items()}

    def _test_sets(self) -> Iterator[tuple[str, DictConfig]]:
        """Each test set's name, and cfg.dataloader as it is for that set only."""
        files = self.proposal_files("test")
        for i, name in enumerate(self.config.names("test")):
            dataloader = copy.deepcopy(self.config.cfg.dataloader)
            dataloader.test.dataset.names = name
            if files is not None:
                dataloader.test.dataset.proposal_files = [files[i]]
            yield name, dataloader

    def _select(self, key: str, default: Any = None) -> Any:
        return OmegaConf.select(self.config.cfg, key, default=default)


def build_node(node: Any, key: str) -> Any:
    """What a lazy node makes.

    Args:
        node: a node of a lazy config.
        key: its key, for the message.

    Raises:
        UserError: a value that its parts cannot be made of.
    """
    try:
        return instantiate(node)
    except UserError:
        raise
    except (
        AssertionError, AttributeError, KeyError, TypeError, ValueError, OmegaConfBaseException
    ) as error:  # fmt: skip
        reason = " ".join(str(error).split())
        raise UserError(f"{key} cannot be built: {type(error).__name__}: {reason}") from error


def _nodes(evaluators: Any) -> list[Any]:
    return list(evaluators) if OmegaConf.is_list(evaluators) else [evaluators]


def _is_target(node: DictConfig, target: type) -> bool:
    """Whether a node makes this class, as LazyCall or a YAML names it."""
    given = node.get("_target_")
    return given is target or str(given).rpartition(".")[2] == target.__name__

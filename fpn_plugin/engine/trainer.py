"""FPNTrainer: Detectron2's DefaultTrainer with checked data and weights, and exact resuming."""

from __future__ import annotations

import json
import logging
import statistics
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import DefaultTrainer, HookBase, TrainerBase
from detectron2.evaluation import (
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
)
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from torch import nn

from fpn_plugin.data import ReadableImageMapper, class_order, train_stream
from fpn_plugin.data.dataset_records import config_arguments, dataset_records
from fpn_plugin.deploy.fast_training import optimize_for_training
from fpn_plugin.errors import UserError, one_line
from fpn_plugin.utils.atomic import written_whole

from .build_errors import explained_build_errors
from .changes import check_length
from .checkpoint import StrictCheckpointer
from .evaluation import DetectionEvaluator
from .hooks import TrainingHooks
from .logs import add_loggers
from .results import finish
from .run_config import RunConfig
from .segment_evaluation import SegmentProposalEvaluator
from .step_trainer import step_trainer

__all__ = ["FPNTrainer"]


class FPNTrainer(DefaultTrainer):
    """DefaultTrainer that evaluates COCO-format datasets and also trains in processes on the CPU.

    It evaluates detections with :class:`DetectionEvaluator`, a model that gives only proposals
    (RPN) by their recall, and segment proposals with :class:`SegmentProposalEvaluator`. An image
    that cannot be read and weights that do not fit are a :class:`UserError`. A resumed run equals
    the uncut run, see :class:`ResumeState`. When training ends, ``loss_curve.png`` is in
    OUTPUT_DIR.

    Args:
        cfg: the config.
    """

    def __init__(self, cfg: CfgNode) -> None:
        # DefaultTrainer's own wraps the model for distributed training on GPUs.
        TrainerBase.__init__(self)
        add_loggers("detectron2", "fpn_plugin", folder=cfg.OUTPUT_DIR)  # if no command has
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        model = self.build_model(cfg)
        optimizer = self.build_optimizer(cfg, model)
        loader = self.build_train_loader(cfg)
        config = RunConfig(cfg)
        self._trainer = step_trainer(model, loader, optimizer, config, broadcast_buffers=False)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = StrictCheckpointer(
            self._trainer.model,
            cfg.OUTPUT_DIR,
            classes=class_order(cfg.DATASETS.TRAIN[0]),
            trainer=weakref.proxy(self),
        )
        self.start_iter, self.max_iter, self.cfg = 0, cfg.SOLVER.MAX_ITER, cfg
        self._added = TrainingHooks(self._trainer, config)
        self.register_hooks(self.build_hooks())

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's hooks, and those of :class:`TrainingHooks`."""
        return self._added.around(super().build_hooks(), self._test_augmented, self.checkpointer)

    def resume_or_load(self, resume: bool = True) -> None:
        """Loads the last checkpoint or MODEL.WEIGHTS; see :meth:`DefaultTrainer.resume_or_load`.

        Raises:
            UserError: the run cannot continue from its checkpoint with this config.
        """
        with self._added.resume.explained():
            super().resume_or_load(resume=resume)
        check_length(self.start_iter, self.max_iter, "SOLVER.MAX_ITER")

    def train(self) -> Any:
        """Trains, writes the results of the last evaluation, and returns them.

        Raises:
            UserError: the disk is full, or results are not those of TEST.EXPECTED_RESULTS.
            NonFiniteError: a loss or a prediction is NaN or infinite; names the iteration and
                the batch's files.
        """
        with self._added.explained():
            # DefaultTrainer's own may exit before results are written.
            TrainerBase.train(self, self.start_iter, self.max_iter)
        finish(RunConfig(self.cfg), self.results)
        return self.results

    def state_dict(self) -> dict[str, Any]:
        """Iteration, hooks, and the optimizer, which Detectron2 0.6 leaves out."""
        return {**TrainerBase.state_dict(self), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them over."""
        TrainerBase.load_state_dict(self, state_dict)
        if "_trainer" in state_dict:
            self._trainer.load_state_dict(state_dict["_trainer"])
            return
        logging.getLogger(__name__).warning(
            "the checkpoint holds no optimizer (Detectron2 0.6 saved none): momentum begins at 0"
        )

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The config's model, made to train fast.

        Raises:
            UserError: Detectron2 cannot build it; names the key.
        """
        with explained_build_errors(cfg):
            model = super().build_model(cfg)
        optimize_for_training(model, cfg.MODEL.FPN.COMPILE)
        return model

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        """Detectron2's training loader as a :class:`TrainStream`; unreadable images are named."""
        given: dict[str, Any] = {"mapper": ReadableImageMapper(cfg, is_train=True)}
        with _explained_loading(cfg.DATASETS.TRAIN):
            given["dataset"] = dataset_records(**config_arguments(cfg, training=True))
            if cfg.DATALOADER.SAMPLER_TRAIN == "TrainingSampler":
                # Versions of Detectron2 differ in its seed; here it is drawn, as in a lazy config.
                given["sampler"] = TrainingSampler(len(given["dataset"]))
            return train_stream(build_detection_train_loader(cfg, **given))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Detectron2's test loader; unreadable images are named."""
        mapper = ReadableImageMapper(cfg, is_train=False)
        with _explained_loading(dataset_name):
            arguments = config_arguments(cfg, training=False, names=[dataset_name])
            return build_detection_test_loader(
                dataset_records(**arguments), mapper=mapper, num_workers=cfg.DATALOADER.NUM_WORKERS
            )

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """A :class:`DetectionEvaluator`, with Detectron2's two others for panoptic datasets.

        It infers from predictions whether to evaluate boxes, masks, keypoints or proposals. Segment
        proposals have a :class:`SegmentProposalEvaluator`.
        """
        output = output_folder or str(Path(cfg.OUTPUT_DIR) / "inference")
        if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "SegmentProposals":
            return SegmentProposalEvaluator(dataset_name, output)
        coco = DetectionEvaluator(
            dataset_name,
            output_dir=output,
            detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
            kpt_oks_sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )
        if MetadataCatalog.get(dataset_name).get("evaluator_type") != "coco_panoptic_seg":
            return coco
        parts = [SemSegEvaluator(dataset_name, output_dir=output), coco]
        return DatasetEvaluators([*parts, COCOPanopticEvaluator(dataset_name, output)])

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module, evaluators: Any = None) -> dict[str, Any]:
        """Detectron2's evaluation, which also writes the model's time to inference/speed.json."""
        with _timed(model) as seconds:
            results = super().test(cfg, model, evaluators)
        if comm.is_main_process() and seconds:
            folder = Path(cfg.OUTPUT_DIR) / "inference"
            folder.mkdir(parents=True, exist_ok=True)
            speed = {"calls": len(seconds), "median_seconds_per_call": statistics.median(seconds)}
            with written_whole(str(folder / "speed.json"), "w") as file:
                file.write(json.dumps(speed))
        return results

    @classmethod
    def test_with_TTA(cls, cfg: CfgNode, model: nn.Module) -> dict[str, Any]:
        """Results with test-time augmentation (TEST.AUG); each task's name ends in ``_TTA``."""
        logging.getLogger(__name__).info("Evaluating with test-time augmentation")
        folder = str(Path(cfg.OUTPUT_DIR) / "inference_TTA")
        evaluators = [cls.build_evaluator(cfg, name, folder) for name in cfg.DATASETS.TEST]
        results = super().test(cfg, GeneralizedRCNNWithTTA(cfg, model), evaluators)
        return {f"{name}_TTA": result for name, result in results.items()}

    def _test_augmented(self) -> dict[str, Any]:
        found = self.test_with_TTA(self.cfg, self.model)
        self._last_eval_results = {**self.results, **found}
        return found

    @property
    def results(self) -> dict[str, Any]:
        """Metrics of the last evaluation, by task; empty if there was none."""
        return getattr(self, "_last_eval_results", None) or {}


@contextmanager
def _explained_loading(names: object) -> Iterator[None]:
    """Within it, a dataset that Detectron2 cannot load is named, with Detectron2's reason."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        raise UserError(f"cannot load dataset {names}: {one_line(error)}") from error


@contextmanager
def _timed(model: nn.Module) -> Iterator[list[float]]:
    """Within it, each call of the model appends its seconds to the list."""
    seconds: list[float] = []

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def begin(*_: Any) -> None:
        seconds.append(-now())

    def end(*_: Any) -> None:
        seconds[-1] += now()

    hooks = [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()

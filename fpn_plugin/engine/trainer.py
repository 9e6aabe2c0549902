"""Detectron2's trainer with what FPN's tools add: COCO evaluation, checked weights and images."""

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
from unittest import mock

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, defaults
from detectron2.engine.hooks import EvalHook
from detectron2.evaluation import (
    COCOPanopticEvaluator,
    DatasetEvaluator,
    DatasetEvaluators,
    SemSegEvaluator,
)
from detectron2.modeling import GeneralizedRCNNWithTTA
from detectron2.utils import comm
from tabulate import tabulate
from torch import nn

from fpn_plugin.data import ReadableImageMapper, class_order, train_stream
from fpn_plugin.data.dataset_records import config_arguments, dataset_records
from fpn_plugin.deploy.fast_training import optimize_for_training
from fpn_plugin.errors import UserError
from fpn_plugin.utils.atomic import explained_full_disk, written_whole
from fpn_plugin.visualization import plot_losses

from .build_errors import explained_build_errors
from .changes import check_length
from .checkpoint import StrictCheckpointer
from .cpu_ddp import create_cpu_ddp_model
from .evaluation import DetectionEvaluator
from .evaluation_hook import JointEvalHook
from .expectations import verify_expected
from .level_statistics import LevelStatistics
from .nonfinite import LossWatch, SkippedSteps
from .precision import settle_precision
from .resume import ExactResume
from .settings import check_mixed_precision

__all__ = ["FPNTrainer", "LossCurve", "results_table", "save_results"]


class FPNTrainer(DefaultTrainer):
    """DefaultTrainer that evaluates COCO-format datasets and also trains in processes on the CPU.

    Detection is evaluated with :class:`DetectionEvaluator`; a model that gives proposals alone
    (RPN) is evaluated by their recall. An image that cannot be read and weights that do not fit
    are a :class:`UserError`. A resumed run is the run that was cut, see :class:`ExactResume`. When
    training ends, ``loss_curve.png`` lies in OUTPUT_DIR.

    Args:
        cfg: the config.
    """

    def __init__(self, cfg: CfgNode) -> None:
        check_mixed_precision(cfg.SOLVER.AMP.ENABLED, cfg.MODEL.DEVICE, "SOLVER.AMP.ENABLED")
        with _ddp_that_takes(cfg.MODEL.DEVICE):
            super().__init__(cfg)

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's hooks, the loss curve, what makes resuming exact, and level statistics."""
        # DefaultTrainer has no method that builds its checkpointer; the hooks are the first to
        # use it.
        self.checkpointer = StrictCheckpointer(
            self._trainer.model,
            self.cfg.OUTPUT_DIR,
            classes=class_order(self.cfg.DATASETS.TRAIN[0]),
            trainer=weakref.proxy(self),
        )
        hooks: list[HookBase | None] = []
        for hook in super().build_hooks():
            if not isinstance(hook, EvalHook):
                hooks.append(hook)
                continue
            hooks.append(JointEvalHook(self.cfg.TEST.EVAL_PERIOD, hook._func))
            if self.cfg.TEST.AUG.ENABLED:
                hooks.append(JointEvalHook(0, self._test_augmented))  # when training ends
        self._exact = ExactResume(
            self.cfg.SEED, self._trainer.data_loader, self.cfg.OUTPUT_DIR, self.cfg, self.optimizer
        )
        hooks.insert(0, self._exact)
        if isinstance(self._trainer, AMPTrainer):
            settle_precision(self._trainer, self.cfg.SOLVER.AMP.DTYPE, "SOLVER.AMP.DTYPE")
            if self._trainer.grad_scaler.is_enabled():
                # Before the checkpointer, which keeps the count.
                hooks.insert(1, SkippedSteps(self.optimizer, self._trainer.grad_scaler))
        self._watch = LossWatch(
            self._trainer.model,
            f"a SOLVER.BASE_LR below {self.cfg.SOLVER.BASE_LR:g}, a longer SOLVER.WARMUP_ITERS or "
            "SOLVER.CLIP_GRADIENTS.ENABLED True",
        )
        self._trainer.register_hooks([self._watch])
        if comm.is_main_process():
            hooks.append(LossCurve(Path(self.cfg.OUTPUT_DIR)))
        if self.cfg.MODEL.FPN.LEVEL_STATS_PERIOD:
            hooks.insert(
                0, LevelStatistics(self._trainer.model, self.cfg.MODEL.FPN.LEVEL_STATS_PERIOD)
            )
        return hooks

    def resume_or_load(self, resume: bool = True) -> None:
        """Loads the last checkpoint or MODEL.WEIGHTS; see :meth:`DefaultTrainer.resume_or_load`.

        A run goes on with this config, where :class:`ExactResume` does not say otherwise.

        Raises:
            UserError: the run cannot go on from its checkpoint with this config.
        """
        with self._exact.explained():
            super().resume_or_load(resume=resume)
        check_length(self.start_iter, self.max_iter, "SOLVER.MAX_ITER")

    def train(self) -> Any:
        """Trains; see :meth:`DefaultTrainer.train`. Results of the last evaluation are written.

        Returns:
            These results; empty where there are none.

        Raises:
            UserError: the disk is full, or results are not those of TEST.EXPECTED_RESULTS.
            NonFiniteError: a loss or a prediction is NaN or infinite; names the iteration and
                the batch's files.
        """
        remedy = "make room, then go on with --resume"
        full = explained_full_disk(f"to {self.cfg.OUTPUT_DIR}", remedy)
        with full, self._watch.explained():
            # DefaultTrainer's own would exit before results are written.
            super(DefaultTrainer, self).train(self.start_iter, self.max_iter)
        if comm.is_main_process():
            save_results(self.results, self.cfg.OUTPUT_DIR)
            expected = self.cfg.TEST.EXPECTED_RESULTS
            verify_expected("TEST.EXPECTED_RESULTS", expected, self.results)
        return self.results

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """The config's model, made to train fast.

        Raises:
            UserError: a key that Detectron2 only asserts on, or a level that is not there.
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
                # Named, as Detectron2s differ in its seed: it is drawn, as a lazy config's is.
                given["sampler"] = TrainingSampler(len(given["dataset"]))
            return train_stream(build_detection_train_loader(cfg, **given))

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> Any:
        """Detectron2's test loader, whose unreadable images are named."""
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
        """DetectionEvaluator, which infers from predictions whether to evaluate boxes, masks,
        keypoints or proposals; for panoptic datasets, Detectron2's two others as well.
        """
        output = output_folder or str(Path(cfg.OUTPUT_DIR) / "inference")
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
        """Detectron2's evaluation; how long the model took goes to inference/speed.json."""
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
        """Evaluates with test-time augmentation, TEST.AUG, as Detectron2's train_net.py does.

        Returns:
            The results, by their names with ``_TTA`` behind.
        """
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
        """Metrics of the last evaluation, by task; empty where there was none."""
        return getattr(self, "_last_eval_results", None) or {}


class LossCurve(HookBase):
    """Draws the losses when training ends.

    Args:
        output_dir: has the metrics.json to draw, and gets loss_curve.png.
    """

    def __init__(self, output_dir: Path) -> None:
        self._output_dir = output_dir

    def after_train(self) -> None:
        """Draws them."""
        metrics = self._output_dir / "metrics.json"
        if metrics.is_file():
            picture = plot_losses(metrics, self._output_dir / "loss_curve.png")
            logging.getLogger(__name__).info("Loss curve in %s", picture)


@contextmanager
def _explained_loading(names: object) -> Iterator[None]:
    """Within it, a dataset that Detectron2 cannot load is named, with what it said."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AssertionError) as error:
        told = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"cannot load dataset {names}: {told}") from error


@contextmanager
def _timed(model: nn.Module) -> Iterator[list[float]]:
    """Within it, the list given has the seconds of each call of the model, its results ready."""
    seconds: list[float] = []
    begun = 0.0

    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def begin(*_: Any) -> None:
        nonlocal begun
        begun = now()

    def end(*_: Any) -> None:
        seconds.append(now() - begun)

    hooks = [model.register_forward_pre_hook(begin), model.register_forward_hook(end)]
    try:
        yield seconds
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _ddp_that_takes(device: str) -> Iterator[None]:
    """DefaultTrainer wraps models for distributed training as if each had a GPU of its own;
    torch wants ``device_ids=None`` for models on the CPU.
    """
    if device.startswith("cuda"):
        yield
        return
    with mock.patch.object(defaults, "create_ddp_model", create_cpu_ddp_model):
        yield


def results_table(results: dict[str, Any]) -> str:
    """The metrics of an evaluation as a Markdown table a task, categories left out.

    Args:
        results: ``{task: {metric: value}}``, or that by dataset where there are several.
    """
    tables = []
    found = list(_tasks(results))
    for name, metrics in found:
        overall = {key: value for key, value in metrics.items() if "-" not in key}
        table = tabulate(
            [list(overall.values())], headers=list(overall), tablefmt="github", floatfmt=".1f"
        )
        tables.append(f"{name}\n\n{table}\n")
    if any("@" in name for name, _ in found):
        tables.append(
            "Where a task is there twice, the first is COCO's, which takes at most 100 detections "
            "of a category in an image, and 20 with keypoints. The one with @ takes all that the "
            "model may give for an image.\n"
        )
    return "\n".join(tables)


def _tasks(results: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, float]]]:
    for name, content in results.items():
        if content and all(isinstance(value, dict) for value in content.values()):
            yield from _tasks(content, f"{prefix}{name} ")
        elif content:
            yield prefix + name, content


def save_results(results: dict[str, Any], output_dir: str) -> None:
    """Writes results.json and results.md to a folder and prints the latter, where there are any."""
    if not results:
        return
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    table = results_table(results)
    for name, text in (("results.json", json.dumps(results, indent=1)), ("results.md", table)):
        with written_whole(str(folder / name), "w") as file:
            file.write(text)
    print(f"\n{table}", flush=True)

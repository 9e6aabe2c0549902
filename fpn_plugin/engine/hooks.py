"""The hooks of a training, the same for yacs and lazy configs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.engine import AMPTrainer, HookBase, SimpleTrainer
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm
from torch import nn
from torch.optim import Optimizer

from fpn_plugin.utils.atomic import explained_full_disk
from fpn_plugin.visualization import plot_losses

from .cpu_ddp import distributed_model
from .evaluation_hook import JointEvalHook
from .level_statistics import LevelStatistics
from .nonfinite import NonFiniteCheck, SkippedSteps
from .precision import settle_precision
from .resume import ResumeState
from .run_config import RunConfig
from .settings import check_mixed_precision

__all__ = ["LossCurve", "TrainingHooks", "step_trainer"]


class LossCurve(HookBase):
    """Draws the losses when training ends.

    Args:
        output_dir: has the metrics.json to draw, and gets loss_curve.png.
    """

    def __init__(self, output_dir: str) -> None:
        self._output_dir = Path(output_dir)

    def after_train(self) -> None:
        """Draws them."""
        metrics = self._output_dir / "metrics.json"
        if metrics.is_file():
            picture = plot_losses(metrics, self._output_dir / "loss_curve.png")
            logging.getLogger(__name__).info("Loss curve in %s", picture)


def step_trainer(
    model: nn.Module, loader: Any, optimizer: Optimizer, config: RunConfig, **ddp: Any
) -> SimpleTrainer:
    """Detectron2's trainer of single steps, in the precision that the config names.

    Args:
        model: wrapped for distributed training if there are several processes.
        loader: gives the batches.
        optimizer: of the model's parameters.
        config: of the run.
        ddp: arguments of Detectron2's ``create_ddp_model``.

    Raises:
        UserError: the device or this Detectron2 cannot train in that precision.
    """
    check_mixed_precision(config["amp"], config["device"], config.key("amp"))
    model = distributed_model(model, config["device"], **ddp)
    if not config["amp"]:
        return SimpleTrainer(model, loader, optimizer)
    trainer = AMPTrainer(model, loader, optimizer)
    settle_precision(trainer, config["amp_dtype"], config.key("amp_dtype"))
    return trainer


class TrainingHooks:
    """What this plugin adds to the hooks of a training.

    Args:
        step: Detectron2's trainer of single steps.
        config: of the run, as its user gave it.
    """

    def __init__(self, step: SimpleTrainer, config: RunConfig) -> None:
        self._step, self._config = step, config
        self.resume = ResumeState(
            config["seed"], step.data_loader, config["output_dir"], config.cfg, step.optimizer
        )
        remedy = (
            "a lower optimizer.lr or a longer lr_multiplier.warmup_length"
            if config.is_lazy
            else f"a SOLVER.BASE_LR below {config['learning_rate']:g}, a longer "
            "SOLVER.WARMUP_ITERS or SOLVER.CLIP_GRADIENTS.ENABLED True"
        )
        self._nonfinite = NonFiniteCheck(step.model, remedy)
        # Only the trainer of single steps calls it between backward pass and optimizer.
        step.register_hooks([self._nonfinite])

    def around(
        self, hooks: Sequence[HookBase | None], augmented: Callable[[], dict[str, Any]]
    ) -> list[HookBase | None]:
        """All hooks of the training, in their order.

        Args:
            hooks: Detectron2's; each EvalHook becomes a :class:`JointEvalHook`.
            augmented: evaluates with test-time augmentation, once, when training ends.
        """
        step, config = self._step, self._config
        scaler = getattr(step, "grad_scaler", None)
        period = config["level_stats_period"]
        found: list[HookBase | None] = [
            LevelStatistics(step.model, period) if period else None,
            self.resume,
            # Before the checkpointer, which keeps its count.
            SkippedSteps(step.optimizer, scaler) if scaler and scaler.is_enabled() else None,
        ]
        for hook in hooks:
            if not isinstance(hook, EvalHook):
                found.append(hook)
                continue
            found.append(JointEvalHook(hook._period, hook._func))
            if config["augmented_test"]:
                found.append(JointEvalHook(0, augmented))
        return [*found, LossCurve(config["output_dir"]) if comm.is_main_process() else None]

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Within it, the training runs; a full disk and a number that is not finite are reported.

        Raises:
            UserError: the disk is full.
            NonFiniteError: a loss or a prediction is NaN or infinite; names the iteration and
                the batch's files.
        """
        remedy = "make room, then go on with --resume"
        full = explained_full_disk(f"to {self._config['output_dir']}", remedy)
        with full, self._nonfinite.explained():
            yield

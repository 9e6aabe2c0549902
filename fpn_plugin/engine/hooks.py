"""The hooks of a training, the same for yacs and lazy configs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm

from fpn_plugin.utils.atomic import explained_full_disk
from fpn_plugin.visualization import plot_losses

from .level_statistics import LevelStatistics
from .nonfinite import NonFiniteCheck, SkippedSteps
from .resume import ResumeState
from .run_config import RunConfig

__all__ = ["JointEvalHook", "LossCurve", "TrainingHooks"]


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


class JointEvalHook(EvalHook):
    """Detectron2's EvalHook for several processes.

    All of them evaluate the model that a checkpoint would hold, with the main process's buffers.
    Statistics of batch normalisation that is not frozen are each process's own, because Detectron2
    trains with ``broadcast_buffers=False``.

    After an iteration that failed, nothing is evaluated. Detectron2's hook evaluates after the last
    iteration even if one process failed in it, and the others then wait for that process.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._finished = True

    def before_step(self) -> None:
        """Notes that an iteration has begun."""
        self._finished = False

    def after_step(self) -> None:
        """Evaluates if the period says so."""
        self._finished = True
        super().after_step()

    def after_train(self) -> None:
        """Evaluates if all iterations are done."""
        if self._finished:
            super().after_train()

    def _do_eval(self) -> None:
        if comm.get_world_size() > 1:
            for buffer in self.trainer.model.buffers():
                dist.broadcast(buffer, src=0)
        super()._do_eval()


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
        remedy = "make room, then continue with --resume"
        full = explained_full_disk(f"to {self._config['output_dir']}", remedy)
        with full, self._nonfinite.explained():
            yield

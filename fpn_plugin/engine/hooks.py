"""The hooks of a training, the same for yacs and lazy configs."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch.distributed as dist
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm

from fpn_plugin.errors import UserError, near_names
from fpn_plugin.utils.atomic import explained_full_disk, written_whole
from fpn_plugin.visualization import plot_losses

from .checkpoint import StrictCheckpointer
from .level_statistics import LevelStatistics
from .nonfinite import NonFiniteCheck, SkippedSteps
from .progress import TrainingProgress
from .resume import ResumeState
from .run_config import RunConfig

__all__ = ["BestModel", "JointEvalHook", "LossCurve", "TrainingHooks"]

_LOGGER = logging.getLogger(__name__)
_NO_RESULT = -1.0  # of a metric that is not a number, because nothing is labelled; below any AP


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
            _LOGGER.info("Loss curve in %s", picture)


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


class _Ended(UserError):
    """Ends a training that no longer improves."""


class BestModel(HookBase):
    """Keeps the best model as model_best.pth, and ends a run that does not improve any more.

    best.json has the metric of each evaluation, and a resumed run continues with it. Detectron2's
    BestCheckpointer forgets the best result when a run is resumed. It also makes the run resume
    from its best model instead of its last.

    Args:
        checkpointer: of the run.
        config: of the run: the metric, such as "bbox/AP", when it evaluates, and its patience.
    """

    def __init__(self, checkpointer: StrictCheckpointer, config: RunConfig) -> None:
        self._checkpointer = checkpointer
        self._key, self._metric = config.key("best_metric"), config["best_metric"]
        self._period, self._patience = config["eval_period"], config["patience"]
        self._file = Path(config["output_dir"]) / "best.json"
        self._values: dict[int, float] = {}  # by iteration

    def before_train(self) -> None:
        """Reads the earlier results of a resumed run; ends it again if it had ended.

        Raises:
            UserError: best.json has something else.
        """
        if comm.is_main_process() and self.trainer.iter and self._file.is_file():
            try:
                earlier = json.loads(self._file.read_text()).get(self._metric, {})
                values = {int(iteration): float(value) for iteration, value in earlier.items()}
            except (AttributeError, TypeError, ValueError) as error:
                raise UserError(
                    f"{self._file} has no results of evaluations: delete it, and the run forgets "
                    "which model was the best"
                ) from error
            self._values = {i: value for i, value in values.items() if i < self.trainer.iter}
        self._end_without_improvement()

    def after_step(self) -> None:
        """Compares the results, if there was an evaluation.

        Raises:
            UserError: the metric is not among them.
        """
        done = self.trainer.iter + 1
        if self._period and done % self._period == 0 and done < self.trainer.max_iter:
            self._compare()
            self._end_without_improvement()

    def after_train(self) -> None:
        """Compares the results of the last evaluation, which a run that failed does not have."""
        if self.trainer.iter >= self.trainer.max_iter:
            self._compare()

    def _compare(self) -> None:
        if not comm.is_main_process():
            return
        latest = {
            name: value
            for name, (value, iteration) in self.trainer.storage.latest().items()
            if iteration == self.trainer.iter and "/" in name
        }
        if self._metric not in latest:
            raise UserError(
                f"{self._key} is {self._metric!r}, and the evaluation has no such result; "
                f"{near_names(self._metric, latest)}"
            )
        now = min(self.trainer.iter, self.trainer.max_iter - 1)  # max_iter after the last
        value = latest[self._metric]
        best = max(self._values.values(), default=_NO_RESULT)
        self._values[now] = value if math.isfinite(value) else _NO_RESULT
        if self._values[now] > best:
            self._checkpointer.save("model_best", iteration=now)
        with written_whole(str(self._file), "w") as file:
            file.write(json.dumps({self._metric: self._values}))

    def _end_without_improvement(self) -> None:
        """Ends the training if patience is exhausted, in every process."""
        values = list(self._values.values())
        since = len(values) - 1 - values.index(max(values)) if values else 0
        if not comm.all_gather(0 < self._patience <= since)[0]:
            return
        if self.trainer.iter in self._values:  # not if a resumed run had ended before
            self._checkpointer.save("model_final", iteration=self.trainer.iter)
        _LOGGER.info(
            "%s was not better in the last %d evaluations: the training ends. Its best model is "
            "model_best.pth",
            self._metric,
            since,
        )
        raise _Ended


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
        self,
        hooks: Sequence[HookBase | None],
        augmented: Callable[[], dict[str, Any]],
        checkpointer: StrictCheckpointer,
    ) -> list[HookBase | None]:
        """All hooks of the training, in their order.

        Args:
            hooks: Detectron2's; each EvalHook becomes a :class:`JointEvalHook`.
            augmented: evaluates with test-time augmentation, once, when training ends.
            checkpointer: of the run.
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
            if config["best_metric"] and config.names("test"):
                found.append(BestModel(checkpointer, config))
        if comm.is_main_process():
            found.append(TrainingProgress(config["best_metric"], config["output_dir"]))
            found.append(LossCurve(config["output_dir"]))
        return found

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Within it, the training runs; a full disk and a number that is not finite are reported.

        A training that ends because it no longer improves leaves it without an error.

        Raises:
            UserError: the disk is full.
            NonFiniteError: a loss or a prediction is NaN or infinite; names the iteration and
                the batch's files.
        """
        remedy = "make room, then continue with --resume"
        full = explained_full_disk(f"to {self._config['output_dir']}", remedy)
        with full, self._nonfinite.explained(), suppress(_Ended):
            yield

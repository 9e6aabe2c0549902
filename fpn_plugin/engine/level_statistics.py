"""LevelStatistics: a training hook that logs what each pyramid level does."""

from __future__ import annotations

from contextlib import ExitStack

from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import nn

from fpn_plugin.errors import UserError
from fpn_plugin.inspection.level_observer import observed_levels
from fpn_plugin.inspection.level_tally import LevelTally, level_scalars

__all__ = ["LevelStatistics"]


class LevelStatistics(HookBase):
    """Logs the figures of :func:`.level_scalars` to Detectron2's event storage, whence they go to
    TensorBoard and metrics.json, of every so many iterations.

    The last iteration of each period is observed; others run as if the hook was not there. Figures
    are those of that iteration's batch, of all processes together, and are not smoothed. Every
    process needs the hook, before any that writes.

    Args:
        model: the one that is trained.
        period: iterations; MODEL.FPN.LEVEL_STATS_PERIOD.

    Raises:
        UserError: the period is below 1.
    """

    def __init__(self, model: nn.Module, period: int) -> None:
        if period < 1:
            raise UserError(
                f"MODEL.FPN.LEVEL_STATS_PERIOD is {period}; it must be a number of iterations, or "
                "0 for no statistics"
            )
        self._model = model
        self._period = period
        self._observing = ExitStack()
        self._tally: LevelTally | None = None

    def before_step(self) -> None:
        """Begins to observe where this iteration is one to log."""
        if (self.trainer.iter + 1) % self._period == 0:
            self._tally = self._observing.enter_context(observed_levels(self._model))

    def after_step(self) -> None:
        """Logs what was observed."""
        if self._tally is None:
            return
        self._observing.close()
        processes = comm.gather(self._tally.sums())
        self._tally = None
        for name, value in level_scalars(processes).items():
            self.trainer.storage.put_scalar(name, value, smoothing_hint=False)

    def after_train(self) -> None:
        """Leaves the model as it was, also where a step failed."""
        self._observing.close()
        self._tally = None

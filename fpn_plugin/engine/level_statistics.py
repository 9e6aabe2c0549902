"""A training hook that logs what each pyramid level does."""

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
    """Logs the figures of :func:`.level_scalars` once a period to TensorBoard and metrics.json.

    It observes the last iteration of each period; others run as without the hook. Figures are of
    that iteration's batch in all processes, and are not smoothed. Every process needs the hook,
    before hooks that write.

    Args:
        model: the one that is trained.
        period: number of iterations, MODEL.FPN.LEVEL_STATS_PERIOD.

    Raises:
        UserError: the period is below 1.
    """

    def __init__(self, model: nn.Module, period: int) -> None:
        if period < 1:
            raise UserError(
                f"MODEL.FPN.LEVEL_STATS_PERIOD is {period}, expected a number of iterations, or 0 "
                "for no statistics"
            )
        self._model = model
        self._period = period
        self._observing = ExitStack()
        self._tally: LevelTally | None = None

    def before_step(self) -> None:
        """Begins to observe if this iteration is the last of its period."""
        if (self.trainer.iter + 1) % self._period == 0:
            self._tally = self._observing.enter_context(observed_levels(self._model))

    def after_step(self) -> None:
        """Logs the figures of an observed iteration."""
        if self._tally is None:
            return
        self._observing.close()
        processes = comm.gather(self._tally.sums())
        self._tally = None
        for name, value in level_scalars(processes).items():
            self.trainer.storage.put_scalar(name, value, smoothing_hint=False)

    def after_train(self) -> None:
        """Removes the hooks, also after a step that failed."""
        self._observing.close()
        self._tally = None

"""What makes a run that was cut the same run, bit for bit on a CPU, as one that was not."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.solver import LRMultiplier
from detectron2.utils import comm
from omegaconf import DictConfig
from torch.optim import Optimizer

from fpn_plugin.data.stream import TrainStream
from fpn_plugin.errors import UserError
from fpn_plugin.utils.seeding import seed_rngs

from .changes import Change, changes, flat_config, summary

__all__ = ["ResumeState"]


class ResumeState(HookBase):
    """Makes data and random numbers of each iteration a function of the seed and the iteration.

    So a checkpoint, whose iteration, weights, optimizer and schedule Detectron2 keeps, says all
    of a run, in every process and whatever else draws random numbers, as evaluation does. It
    keeps the seed too: ``SEED: -1`` is resumed with the seed that was drawn. Checkpoints without
    it, such as plain Detectron2's, go on at their place of this config's stream. With another
    number of processes or another batch it is another run, which the log says.

    It keeps the config as well. Where a run goes on with another, that one holds from there on,
    rates and schedule included, and the log names each key; :data:`.changes.FATES` has those that
    are not taken. Detectron2 by itself goes on with the checkpoint's rates, whatever the config.

    Args:
        seed: the config's; below 0, one is drawn, the same in all processes.
        loader: the trainer's; its place is set if it is a :class:`TrainStream`.
        output_dir: rows that its metrics.json has of iterations to come are dropped.
        cfg: the run's config, yacs or lazy.
        optimizer: as the config has it, nothing loaded yet.
    """

    # Detectron2 keeps a hook's state in checkpoints under this name; earlier ones have it.
    __qualname__ = "ExactResume"

    def __init__(
        self,
        seed: int,
        loader: Any,
        output_dir: str,
        cfg: CfgNode | DictConfig,
        optimizer: Optimizer,
    ) -> None:
        self._given_seed = seed
        self._seed = seed if seed >= 0 else comm.shared_random_seed()
        self._stream = loader if isinstance(loader, TrainStream) else None
        self._metrics = Path(output_dir) / "metrics.json"
        self._config = flat_config(cfg)
        self._optimizer = optimizer
        self._settings = [
            {
                "initial_lr": group["lr"],  # before a schedule is made
                **{name: value for name, value in group.items() if name != "params"},
            }
            for group in optimizer.param_groups
        ]
        self._changes: list[Change] | None = None  # not known

    def before_train(self) -> None:
        """Sets the stream to the iteration that training begins with, and the config's rates."""
        if self._stream is not None:
            self._stream.seed, self._stream.start = self._seed, self.trainer.iter
        if self.trainer.iter == 0:
            return
        if comm.is_main_process():
            _drop_rows_from(self._metrics, self.trainer.iter)
            self._report_changes()
        if self._changes != []:
            self._apply_settings()

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Within it, a checkpoint is loaded; if it does not fit, the message says which keys
        of the config are others than the checkpoint's.
        """
        try:
            yield
        except UserError as error:
            if not self._changes or any(change.fate.refused for change in self._changes):
                raise
            keys = ", ".join(change.text for change in self._changes)
            raise UserError(
                f"{error}. Keys of another value than the checkpoint's: {keys}"
            ) from error

    def _report_changes(self) -> None:
        logger = logging.getLogger(__name__)
        at = f"resumed at iteration {self.trainer.iter}"
        if self._changes is None:
            logger.warning(
                "%s from a checkpoint that does not hold its config: this one holds from here on, "
                "rates and schedule included",
                at,
            )
        elif self._changes:
            logger.warning(
                "%s with another config than the checkpoint's; %s", at, summary(self._changes)
            )

    def _apply_settings(self) -> None:
        """Gives the optimizer and its schedule the config's settings: theirs are the checkpoint's.

        The state that the optimizer has gathered, its momentum, stays.
        """
        for group, settings in zip(self._optimizer.param_groups, self._settings, strict=True):
            group.update(settings)
        schedule = getattr(self.trainer, "scheduler", None)  # a lazy trainer makes its own later
        if not isinstance(schedule, LRMultiplier):
            return
        schedule.base_lrs = [settings["initial_lr"] for settings in self._settings]
        if self.trainer.iter < self.trainer.max_iter:
            rates = schedule.get_lr()
            for group, rate in zip(self._optimizer.param_groups, rates, strict=True):
                group["lr"] = rate

    def before_step(self) -> None:
        """Seeds the generators."""
        seed_rngs(self._seed, comm.get_rank(), self.trainer.iter)

    def state_dict(self) -> dict[str, Any]:
        """Seed, config, what the sampler drew, and what else an iteration's images depend on."""
        return {
            "seed": self._seed,
            "stream": {} if self._stream is None else self._stream.state_dict(),
            "sizes": self._sizes(),
            "config": self._config,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes seed and draws over; warns where the rest is not this run's.

        Raises:
            UserError: a key has another value with which the run cannot go on.
        """
        if "config" in state:
            self._changes = changes(state["config"], self._config)
        refused = [change for change in self._changes or () if change.fate.refused]
        if refused:
            raise UserError(
                f"{summary(refused)}. Give the earlier value, or begin another run "
                "from the checkpoint's weights, in a folder of its own"
            )
        if self._given_seed < 0:
            self._seed = state["seed"]
        redraws = any(change.fate.redraws for change in self._changes or ())
        if self._stream is not None and not redraws:
            self._stream.load_state_dict(state["stream"])
        theirs, ours = state.get("sizes", {}), self._sizes()
        changed = [name for name in ours if theirs.get(name, ours[name]) != ours[name]]
        if changed and comm.is_main_process():
            sizes = ", ".join(f"{name}: {ours[name]}, was {theirs[name]}" for name in changed)
            logging.getLogger(__name__).warning(
                "resumed as another run than the one that was cut (%s): it goes on with other "
                "images and other random numbers",
                sizes,
            )

    def _sizes(self) -> dict[str, int]:
        """Processes, and images a batch of all of them if that is known."""
        processes = comm.get_world_size()
        if self._stream is None:
            return {"processes": processes}
        return {"processes": processes, "images a batch": self._stream.batch_size * processes}


def _drop_rows_from(metrics: Path, iteration: int) -> None:
    """Cuts a file of JSON lines before the first that is half written or will be written again.

    In place, because Detectron2's writer has it open for appending.
    """
    if not metrics.is_file():
        return
    kept = 0
    with open(metrics, "rb") as file:
        for line in file:
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not line.endswith(b"\n") or row.get("iteration", -1) >= iteration:
                break
            kept += len(line)
    if kept < metrics.stat().st_size:
        os.truncate(metrics, kept)

"""Resuming: a run that was cut equals the uncut run, bit for bit on a CPU."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
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

    Detectron2's checkpoints keep the iteration, weights, optimizer and schedule. With the seed,
    which this hook adds, they determine the rest of the run in every process, whatever else draws
    random numbers. ``SEED: -1`` resumes with the seed that was drawn. A checkpoint without a seed,
    such as plain Detectron2's, continues at its iteration with this config's seed. If the number
    of processes or the batch size differs, the log says that the run is another one. It also says
    if the number of threads on the CPU differs, on which the rounding of sums depends.

    Checkpoints keep the config too. A run that resumes with another config uses it from there on,
    rates and schedule included, and the log names each key that differs. :data:`.changes.FATES`
    has the exceptions. Detectron2 itself keeps the checkpoint's rates, whatever the config says.

    Args:
        seed: the config's; below 0, one is drawn, the same in all processes.
        loader: the trainer's; its position is set if it is a :class:`TrainStream`.
        output_dir: its metrics.json loses the rows of iterations that run again.
        cfg: the run's config, yacs or lazy.
        optimizer: as the config has it, before a checkpoint is loaded.
    """

    # Checkpoints keep a hook's state under this name, and earlier versions have used it.
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
        on_cpu = optimizer.param_groups[0]["params"][0].is_cpu
        self._threads = torch.get_num_threads() if on_cpu else None
        self._changes: list[Change] | None = None  # unknown

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
        """Within it, a checkpoint is loaded; if it does not fit, the error names changed keys."""
        try:
            yield
        except UserError as error:
            if not self._changes or any(change.fate.refused for change in self._changes):
                raise
            keys = ", ".join(change.text for change in self._changes)
            raise UserError(f"{error}. Keys that differ from the checkpoint's: {keys}") from error

    def _report_changes(self) -> None:
        if self._changes == []:
            return
        how = "from a checkpoint without a config; from here on this one holds, with its schedule"
        if self._changes:
            how = f"with another config than the checkpoint's; {summary(self._changes)}"
        logging.getLogger(__name__).warning("resumed at iteration %d %s", self.trainer.iter, how)

    def _apply_settings(self) -> None:
        """Replaces the checkpoint's rates and settings by the config's; the momentum stays."""
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
        """Seeds the random number generators."""
        seed_rngs(self._seed, comm.get_rank(), self.trainer.iter)

    def state_dict(self) -> dict[str, Any]:
        """Seed, config, the sampler's state, and what else an iteration's images depend on."""
        return {
            "seed": self._seed,
            "stream": {} if self._stream is None else self._stream.state_dict(),
            "sizes": self._sizes(),
            "threads": self._threads,
            "config": self._config,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes the seed and the sampler's state; warns if the images cannot be the same.

        Raises:
            UserError: a key has another value, with which the run cannot continue.
        """
        if "config" in state:
            self._changes = changes(state["config"], self._config)
        refused = [change for change in self._changes or () if change.fate.refused]
        if refused:
            raise UserError(
                f"{summary(refused)}. Give the earlier value, or start another run from the "
                "checkpoint's weights, in another OUTPUT_DIR"
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
                "resumed as another run than the one that was cut (%s): it continues with other "
                "images and other random numbers",
                sizes,
            )
        threads = state.get("threads")
        if threads and self._threads not in (None, threads) and comm.is_main_process():
            logging.getLogger(__name__).warning(
                "resumed with other threads than the run that was cut (%d, was %d): sums are "
                "rounded differently. OMP_NUM_THREADS=%d gives the same bits",
                self._threads,
                threads,
                threads,
            )

    def _sizes(self) -> dict[str, int]:
        """The number of processes, and the size of their common batch if it is known."""
        processes = comm.get_world_size()
        if self._stream is None:
            return {"processes": processes}
        return {"processes": processes, "images a batch": self._stream.batch_size * processes}


def _drop_rows_from(metrics: Path, iteration: int) -> None:
    """Cuts a file of JSON lines before the first that is half written or will be written again.

    It does so in place, because Detectron2's writer has the file open for appending.
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

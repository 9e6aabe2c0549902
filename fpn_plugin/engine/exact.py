"""What makes a run that was cut the same run, bit for bit on a CPU, as one that was not."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

from detectron2.engine import HookBase
from detectron2.utils import comm

from fpn_plugin.data.stream import TrainStream
from fpn_plugin.seeding import seed_rngs

__all__ = ["ExactResume"]


class ExactResume(HookBase):
    """Makes data and random numbers of each iteration a function of the seed and the iteration.

    So a checkpoint, whose iteration, weights, optimizer and schedule Detectron2 keeps, says all
    of a run, in every process and whatever else draws random numbers, as evaluation does. It
    keeps the seed too: ``SEED: -1`` is resumed with the seed that was drawn. Checkpoints without
    it, such as plain Detectron2's, go on at their place of this config's stream. With another
    number of processes or another batch it is another run, which the log says.

    Args:
        seed: the config's; below 0, one is drawn, the same in all processes.
        loader: the trainer's; its place is set where it is a :class:`TrainStream`.
        output_dir: rows that its metrics.json has of iterations to come are dropped.
    """

    def __init__(self, seed: int, loader: Any, output_dir: str) -> None:
        self._seed = seed if seed >= 0 else comm.shared_random_seed()
        self._stream = loader if isinstance(loader, TrainStream) else None
        self._metrics = Path(output_dir) / "metrics.json"

    def before_train(self) -> None:
        """Sets the stream to the iteration that training begins with."""
        if self._stream is not None:
            self._stream.seed, self._stream.start = self._seed, self.trainer.iter
        if self.trainer.iter > 0 and comm.is_main_process():
            _drop_rows_from(self._metrics, self.trainer.iter)

    def before_step(self) -> None:
        """Seeds the generators."""
        seed_rngs(self._seed, comm.get_rank(), self.trainer.iter)

    def state_dict(self) -> dict[str, Any]:
        """The seed, what the sampler drew, and what else an iteration's images depend on."""
        stream = {} if self._stream is None else self._stream.state_dict()
        return {"seed": self._seed, "stream": stream, "sizes": self._sizes()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes seed and draws over; warns where the rest is not this run's."""
        self._seed = state["seed"]
        if self._stream is not None:
            self._stream.load_state_dict(state["stream"])
        theirs, ours = state.get("sizes", {}), self._sizes()
        changed = [name for name in ours if theirs.get(name, ours[name]) != ours[name]]
        if changed and comm.is_main_process():
            told = ", ".join(f"{name}: {ours[name]}, was {theirs[name]}" for name in changed)
            logging.getLogger(__name__).warning(
                "resumed as another run than the one that was cut (%s): it goes on with other "
                "images and other random numbers",
                told,
            )

    def _sizes(self) -> dict[str, int]:
        """Processes, and images a batch of all of them where that is known."""
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

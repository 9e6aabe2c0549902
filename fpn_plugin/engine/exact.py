"""What makes a run that was cut the same run, bit for bit on a CPU, as one that was not."""

from __future__ import annotations

import json
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
    it, such as plain Detectron2's, go on at their place of this config's stream.

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
        """The seed, and what the sampler drew."""
        stream = {} if self._stream is None else self._stream.state_dict()
        return {"seed": self._seed, "stream": stream}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes both over."""
        self._seed = state["seed"]
        if self._stream is not None:
            self._stream.load_state_dict(state["stream"])


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

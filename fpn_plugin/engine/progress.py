"""The line of a terminal that shows how far a training or an evaluation is."""

from __future__ import annotations

import math
import os
import re
import sys
from pathlib import Path

from detectron2.engine import HookBase
from tqdm import tqdm

from fpn_plugin.utils.metrics import metric_rows

from .logs import on_terminal

__all__ = ["ProgressLine", "TrainingProgress"]

_WINDOW = 20  # iterations of the loss's median, as in Detectron2's log lines


class ProgressLine(tqdm):
    """A line that is updated in place; nothing if the run is not on a terminal.

    A second line takes the place of the first until it is closed.

    Args:
        what: its first word.
        total: steps of the work.
        initial: steps done before.
        stays: whether the line stays when it is closed.
    """

    monitor_interval = 0  # no thread: loaders fork this process

    def __init__(self, what: str, total: int, initial: int = 0, *, stays: bool = False) -> None:
        shown = on_terminal()
        # Some terminals, such as those of scripts, report a size of 0.
        has_size = shown and os.get_terminal_size(sys.stdout.fileno()).columns > 0
        super().__init__(
            desc=what,
            total=total,
            initial=initial,
            file=sys.stdout,
            disable=not shown,
            leave=stays,
            position=0,
            dynamic_ncols=has_size,
            ncols=None if has_size else 80,
            nrows=None if has_size else 24,
            smoothing=0,  # the mean over all steps: evaluations are part of the time that is left
            # First the code that empties the line.
            bar_format="\x1b[K{desc} {n_fmt}/{total_fmt} |{bar}|{postfix}, {remaining} left",
        )


class TrainingProgress(HookBase):
    """Shows a training's loss, its last and best result, and the time that is left.

    Args:
        metric: the result, such as "bbox/AP"; "" for the first AP or AR of the evaluations.
        output_dir: has the metrics.json with results from before a run was resumed.
    """

    def __init__(self, metric: str, output_dir: str) -> None:
        self._metric, self._file = metric, Path(output_dir) / "metrics.json"
        self._results: dict[int, float] = {}  # by iteration
        self._line: ProgressLine | None = None

    def before_train(self) -> None:
        """Shows the line, and reads the earlier results of a resumed run."""
        if not on_terminal():
            return
        start = self.trainer.iter
        for row in metric_rows(self._file) if start else ():
            for name, value in row.items():
                self._note(name, value, int(row["iteration"]))
        self._line = ProgressLine("training", self.trainer.max_iter, start, stays=True)

    def after_step(self) -> None:
        """Updates the line."""
        if self._line is not None:
            self._update()
            self._line.update()

    def after_train(self) -> None:
        """Leaves the line as it is after the last evaluation."""
        if self._line is not None:
            self._update()
            self._line.close()

    def _update(self) -> None:
        for name, (value, iteration) in self.trainer.storage.latest().items():
            self._note(name, value, iteration)
        loss = self.trainer.storage.histories().get("total_loss")
        shown = [] if loss is None else [f"loss {loss.median(_WINDOW):.3f}"]
        if self._results:
            last, best = list(self._results.values())[-1], max(self._results.values())
            name = self._metric.rpartition("/")[2]
            shown.append(f"{name} {last:.1f} ({f'best {best:.1f}' if last < best else 'the best'})")
        self._line.set_postfix_str(", ".join(shown), refresh=False)

    def _note(self, name: str, value: float, iteration: int) -> None:
        if not self._metric and re.search(r"/A[PR][^/]*$", name):
            self._metric = name
        if name == self._metric and math.isfinite(value):
            self._results[iteration] = value

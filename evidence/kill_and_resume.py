"""``python -m evidence.kill_and_resume``: kills a training many times, and resumes it."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from fpn_plugin.cli.common import ToolParser, at_least, output_folder
from fpn_plugin.engine import run_tool
from fpn_plugin.errors import UserError
from fpn_plugin.utils.atomic import PARTIAL
from fpn_plugin.utils.weight_files import read_checkpoint

from .checkpoint_kills import MOMENTS
from .tiny import make_new_folder, make_squares, tiny_options

__all__ = ["differing_tensors", "kill_and_resume", "kill_main"]

_TRAIN = "from evidence.checkpoint_kills import train_until; train_until()"
_STARTED = re.compile(r"Starting training from iteration (\d+)")
_CONFIG = ".hooks.ExactResume.config."
_LONGEST_SECONDS = 3600
"""After this time, a training counts as hanging."""


def kill_main(argv: Sequence[str] | None = None) -> None:
    """Kills and resumes a tiny training, and prints the result.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: the folder exists or cannot be made, a training failed, or the two differ.
    """
    parser = ToolParser(
        description="Kill (SIGKILL) a tiny training at random moments, resume it each time, and "
        "compare its weights with those of a training that was not killed."
    )
    parser.add_argument("--kills", type=at_least(1), default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--workers", type=at_least(0, 1024), default=1, help="DATALOADER.NUM_WORKERS"
    )
    parser.add_argument(
        "--output", type=output_folder, default="output/kill_and_resume", help="folder to make"
    )
    args = parser.parse_args(argv)
    folder = Path(args.output)
    report = kill_and_resume(folder, args.kills, args.seed, args.workers)
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))
    if report["differing_tensors"] or report["unreadable_checkpoints"]:
        raise UserError(f"the killed training differs from the one without kills: see {folder}")


def kill_and_resume(folder: Path, kills: int, seed: int = 0, workers: int = 1) -> dict[str, Any]:
    """Trains twice on the same data, once without being killed.

    Half of the kills come while a checkpoint is written. A quarter come at any moment of the
    process, also during imports and loading, and a quarter in training.

    Args:
        folder: to make.
        kills: how many.
        seed: of the moments.
        workers: processes that load images.

    Returns:
        ``kills`` by kind, those in a write by its progress; ``resumed_at``: iterations at which
        processes started; ``checkpoints_read``: how many times last_checkpoint named one after a
        kill; ``unreadable_checkpoints``; ``half_written``: incomplete files after kills in a write;
        ``differing_tensors``: of weights, optimizer and schedule.

    Raises:
        UserError: the folder exists or cannot be made, the training failed, or it ended before all
            kills.
    """
    make_new_folder(folder)
    dataset = make_squares(folder / "data")
    iterations = 8 * (kills + 1)
    solver = ["SOLVER.MAX_ITER", str(iterations), "SOLVER.CHECKPOINT_PERIOD", "2"]
    solver += ["SOLVER.WARMUP_ITERS", "5"]
    uncut = _Run(folder / "uncut", [*tiny_options(dataset, folder / "uncut", workers), *solver])
    begin, end = uncut.finish()
    four = 4 * (end - begin) / iterations
    run = _Run(folder / "cut", [*tiny_options(dataset, folder / "cut", workers), *solver])
    draw = random.Random(seed)
    found: Counter[str] = Counter()
    with tqdm(total=kills, unit="kill") as bar:
        for number in range(kills):
            if number % 2 == 0:
                moment = MOMENTS[number // 2 % len(MOMENTS)]
                kind = f"in a write, {moment}"
                run.start(moment, draw.randint(1, 2), draw.random())
                run.wait(-signal.SIGKILL)
                found["half written"] += run.half_written()
            else:
                kind = "anywhere" if number % 4 == 1 else "in training"
                run.start()
                run.kill(draw.uniform(0, four + begin), kind == "in training", four)
            found[kind] += 1
            found[run.read_last_checkpoint()] += 1
            bar.update()
    run.finish()
    final = (folder / name / "model_final.pth" for name in ("uncut", "cut"))
    return {
        "kills": {kind: found[kind] for kind in sorted(found) if kind.startswith(("in ", "any"))},
        "iterations": iterations,
        "workers": workers,
        "resumed_at": run.began_at(),
        "half_written": found["half written"],
        "checkpoints_read": found["read"],
        "unreadable_checkpoints": found["unreadable"],
        "differing_tensors": differing_tensors(*final),
    }


def differing_tensors(one: Path, other: Path) -> list[str]:
    """Names of the tensors and numbers that differ in any bit between two checkpoint files.

    Their configs are not compared: each run has its own folder.
    """
    left, right = (dict(_leaves(read_checkpoint(path), "")) for path in (one, other))
    names = sorted(name for name in set(left) | set(right) if _CONFIG not in name)
    return [name for name in names if not _same(left.get(name), right.get(name))]


def _leaves(value: Any, name: str) -> Any:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}")
    elif isinstance(value, list | tuple):
        for key, inner in enumerate(value):
            yield from _leaves(inner, f"{name}.{key}")
    else:
        yield name, value


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, torch.Tensor) or not isinstance(other, torch.Tensor):
        return type(one) is type(other) and one == other
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    as_bytes = (t.contiguous().flatten().view(torch.uint8) for t in (one, other))
    return torch.equal(*as_bytes)


class _Run:
    """A training with --resume, in a process that can be killed."""

    def __init__(self, output: Path, args: list[str]) -> None:
        self._output, self._args = output, args
        self._log = output.with_name(output.name + ".log")
        self._process: subprocess.Popen | None = None
        self._begun = 0.0
        self._log_begin = 0

    def start(self, moment: str = "never", nth: int = 0, fraction: float = 0.0) -> None:
        """Starts or resumes it; see :func:`evidence.checkpoint_kills.train_until`."""
        self._log_begin = self._log.stat().st_size if self._log.is_file() else 0
        self._begun = time.monotonic()
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _TRAIN, moment, str(nth), str(fraction), *self._args],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self) -> tuple[float, float]:
        """Runs it to its end: the seconds until it trained, and until its end.

        Raises:
            UserError: it ended otherwise.
        """
        self.start()
        begin = self._wait_until_it_trains()
        self.wait(0)
        return begin, time.monotonic() - self._begun

    def wait(self, expected: int) -> None:
        """Waits for its end.

        Raises:
            UserError: it ended with another status than expected.
        """
        status = self._process.wait(timeout=_LONGEST_SECONDS)
        if status != expected:
            raise UserError(f"the training ended with status {status}: see {self._log}")

    def kill(self, after: float, in_training: bool, longest: float) -> None:
        """Kills it some seconds after its start or, in training, at most ``longest`` seconds after
        training started.

        Raises:
            UserError: it had already ended.
        """
        if in_training:
            self._wait_until_it_trains()
            after = min(after, longest)
        time.sleep(after)
        if self._process.poll() is not None:
            raise UserError(f"the training ended before it was killed: see {self._log}")
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def half_written(self) -> bool:
        """Whether there is a checkpoint that is not complete."""
        return any(self._output.glob(f"*.pth{PARTIAL}"))

    def read_last_checkpoint(self) -> str:
        """Reads the file that last_checkpoint names: "read", "unreadable", or "none" without one.
        Deletes earlier checkpoints.
        """
        last = self._output / "last_checkpoint"
        if not last.is_file():
            return "none"
        named = self._output / last.read_text()
        for other in self._output.glob("model_*.pth"):
            if other.name < named.name:
                other.unlink()
        try:
            return "read" if "model" in read_checkpoint(named) else "unreadable"
        except UserError:
            return "unreadable"

    def began_at(self) -> list[int]:
        """The first iteration of each of its processes that came to training."""
        return [int(found) for found in _STARTED.findall(self._log.read_text())]

    def _wait_until_it_trains(self) -> float:
        while self._process.poll() is None:
            with open(self._log) as log:
                log.seek(self._log_begin)
                if _STARTED.search(log.read()):
                    break
            if time.monotonic() - self._begun > _LONGEST_SECONDS:
                os.killpg(self._process.pid, signal.SIGKILL)
                raise UserError(f"the training hangs: see {self._log}")
            time.sleep(0.01)
        return time.monotonic() - self._begun


if __name__ == "__main__":
    run_tool(kill_main)

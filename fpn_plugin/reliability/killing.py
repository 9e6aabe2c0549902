"""What tools/kill_and_resume.py does: kills a training again and again, and resumes it."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
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

from fpn_plugin.engine.atomic import PARTIAL
from fpn_plugin.engine.checkpoint import read_checkpoint
from fpn_plugin.errors import UserError

from .tiny import make_squares, tiny_options

__all__ = ["differing_tensors", "kill_and_resume", "kill_main"]

_TRAIN = (
    "from fpn_plugin.engine import run_tool; from fpn_plugin.engine.training import train_main; "
    "run_tool(train_main)"
)
_STARTED = "Starting training from iteration"
_LONGEST_SECONDS = 3600
"""A training that does nothing for so long is taken to hang."""


def kill_main(argv: Sequence[str] | None = None) -> None:
    """Kills and resumes a tiny training, and prints what came of it.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: the folder is there; or the run was not the uncut one.
    """
    parser = argparse.ArgumentParser(
        description="Kill (SIGKILL) a tiny training at random moments, resume it each time, and "
        "compare its weights with those of a training that was not killed."
    )
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--workers", type=int, default=1, help="DATALOADER.NUM_WORKERS")
    parser.add_argument("--output", default="output/kill_and_resume", help="folder to make")
    args = parser.parse_args(argv)
    folder = Path(args.output)
    if folder.exists():
        raise UserError(f"{folder} is there already: name a new folder with --output")
    report = kill_and_resume(folder, args.kills, args.seed, args.workers)
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))
    if report["differing_tensors"] or report["unreadable_checkpoints"]:
        raise UserError(f"the training that was killed is not the uncut one: see {folder}")


def kill_and_resume(folder: Path, kills: int, seed: int = 0, workers: int = 1) -> dict[str, Any]:
    """Trains twice on the same data, once without being killed.

    Half of the kills come while a checkpoint is being written; of the others every second one
    at any moment of the process, as while it imports or loads, and every second while it trains.

    Args:
        folder: is made.
        kills: how many.
        seed: of the moments.
        workers: processes that load images.

    Returns:
        ``kills``, by kind; ``iterations``, ``checkpoints_read``: how many times last_checkpoint
        named one after a kill; ``unreadable_checkpoints``; ``killed_inside_a_write``: half
        written files that were found; ``differing_tensors`` of weights and optimizer.
    """
    folder.mkdir(parents=True)
    dataset = make_squares(folder / "data")
    # Each kind of kill lets the run go on by one or two checkpoints in the mean.
    iterations, period = 2 * (kills + 4), 2
    solver = ["SOLVER.MAX_ITER", str(iterations), "SOLVER.CHECKPOINT_PERIOD", str(period)]
    solver += ["SOLVER.WARMUP_ITERS", "5"]
    draw = random.Random(seed)
    found: Counter[str] = Counter()
    uncut = _Run(folder / "uncut", [*tiny_options(dataset, folder / "uncut", workers), *solver])
    seconds = uncut.finish()
    run = _Run(folder / "cut", [*tiny_options(dataset, folder / "cut", workers), *solver])
    kinds = ["in a write", "anywhere", "in a write", "training"]
    with tqdm(total=kills, unit="kill") as bar:
        for number in range(kills):
            kind = kinds[number % len(kinds)]
            run.start()
            if not run.kill(kind, draw, seconds):
                break  # it reached the end before
            found[kind] += 1
            found["killed_inside_a_write"] += run.half_written()
            found[run.read_last_checkpoint()] += 1
            bar.update()
    run.finish()
    differing = differing_tensors(
        folder / "uncut" / "model_final.pth", folder / "cut" / "model_final.pth"
    )
    return {
        "kills": {kind: found[kind] for kind in sorted(set(kinds))},
        "iterations": iterations,
        "workers": workers,
        "killed_inside_a_write": found["killed_inside_a_write"],
        "checkpoints_read": found["read"],
        "unreadable_checkpoints": found["unreadable"],
        "differing_tensors": differing,
    }


def differing_tensors(one: Path, other: Path) -> list[str]:
    """Names of the tensors and numbers in which two checkpoints differ in any bit.

    Args:
        one: of torch.save.
        other: likewise.
    """
    left, right = (dict(_leaves(read_checkpoint(path), "")) for path in (one, other))
    names = sorted(set(left) | set(right))
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
        self._log_begin = 0
        self._started_ns = 0

    def start(self) -> None:
        """Starts it, or goes on."""
        self._log_begin = self._log.stat().st_size if self._log.is_file() else 0
        self._started_ns = time.time_ns()
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", _TRAIN, *self._args],
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def finish(self) -> float:
        """Lets it reach its end; seconds that this took.

        Raises:
            UserError: it ended otherwise.
        """
        begun = time.monotonic()
        self.start()
        status = self._process.wait(timeout=_LONGEST_SECONDS)
        if status:
            raise UserError(f"the training ended with status {status}: see {self._log}")
        return time.monotonic() - begun

    def kill(self, kind: str, draw: random.Random, uncut_seconds: float) -> bool:
        """Waits for a moment of this kind and kills it there; False where it ended before.

        Raises:
            UserError: it failed by itself.
        """
        if kind == "in a write":
            # The second write from here, so that the run goes on; anywhere within it.
            alive = self._wait_for(self.half_written) and self._wait_for(self._no_write)
            alive = alive and self._wait_for(self.half_written)
            time.sleep(draw.uniform(0, 0.02))
        elif kind == "training":
            alive = self._wait_for(self._trains)
            time.sleep(draw.uniform(0, uncut_seconds / 10))
        else:
            alive = True
            time.sleep(draw.uniform(0, uncut_seconds / 2))
        if not alive or self._process.poll() is not None:
            if self._process.wait():
                raise UserError(f"the training failed by itself: see {self._log}")
            return False
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        return True

    def half_written(self) -> bool:
        """Whether this process has begun a checkpoint that is not complete."""
        if not self._output.is_dir():
            return False
        for entry in os.scandir(self._output):
            if entry.name.endswith(".pth" + PARTIAL):
                # It may get its name meanwhile; those of processes killed before stay.
                with contextlib.suppress(FileNotFoundError):
                    return entry.stat().st_mtime_ns >= self._started_ns
        return False

    def read_last_checkpoint(self) -> str:
        """Reads what last_checkpoint names: "read", "unreadable", or "none" where there is none.

        Earlier ones are deleted.
        """
        last = self._output / "last_checkpoint"
        if not last.is_file():
            return "none"
        named = self._output / last.read_text()
        for other in self._output.glob("model_*.pth"):
            if other != named:
                other.unlink()
        try:
            return "read" if "model" in read_checkpoint(named) else "unreadable"
        except UserError:
            return "unreadable"

    def _no_write(self) -> bool:
        return not self.half_written()

    def _trains(self) -> bool:
        with open(self._log, "rb") as log:
            log.seek(self._log_begin)
            return _STARTED.encode() in log.read()

    def _wait_for(self, happened: Any) -> bool:
        """Watches until it happened; False where the process ended before."""
        limit = time.monotonic() + _LONGEST_SECONDS
        while not happened():
            if self._process.poll() is not None:
                return False
            if time.monotonic() > limit:
                os.killpg(self._process.pid, signal.SIGKILL)
                raise UserError(f"the training hangs: see {self._log}")
            time.sleep(0.0005)
        return True

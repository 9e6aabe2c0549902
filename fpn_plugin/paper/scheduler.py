"""Trainings and dumps of proposals, each in its own process, in the order of their needs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode
from tqdm import tqdm

from fpn_plugin.errors import UserError

from .runs import RunFolder

__all__ = ["Task", "gpus_of", "run_tasks", "tasks_for", "visible_gpus"]

_POLL_SECONDS = 1.0


@dataclass(frozen=True)
class Task:
    """One process: the training and evaluation of a run, or the dump of its proposals.

    Attributes:
        folder: the run's.
        dump: False for the training.
        after: tasks that must be done first.
    """

    folder: RunFolder
    dump: bool
    after: tuple[Task, ...] = ()

    @property
    def name(self) -> str:
        """As the progress line shows it."""
        run = f"{self.folder.run.name} seed {self.folder.seed}"
        return f"{run} proposals" if self.dump else run

    @property
    def done(self) -> bool:
        """Whether its results exist."""
        if self.dump:
            return all(self.folder.proposals(name).is_file() for name in self._datasets())
        return self.folder.finished

    def needs(self, tasks: Container[Task]) -> bool:
        """Whether any of some tasks must be done first."""
        return any(task in tasks or task.needs(tasks) for task in self.after)

    @property
    def log(self) -> Path:
        """The file that its process writes to."""
        return self.folder.path / ("dump.log" if self.dump else "train.log")

    def _datasets(self) -> list[str]:
        datasets = self.folder.config().DATASETS
        return [*datasets.TRAIN, *datasets.TEST]

    def command(self, num_gpus: int) -> list[str]:
        """Its command line."""
        path = self.folder.path
        if self.dump:
            args = ["dump-proposals", "--config-file", str(path / "config.yaml")]
            args += ["--splits", *self._datasets(), "--output", str(path / "proposals")]
            opts = ["MODEL.WEIGHTS", str(path / "model_final.pth")]
        else:
            args = ["train", "--config-file", self.folder.config_name, "--resume"]
            opts = self.folder.all_opts()
        args += ["--num-gpus", str(max(1, num_gpus)), "--dist-url", "auto", *opts]
        return [sys.executable, "-m", "fpn_plugin", *args]


def tasks_for(folders: Sequence[RunFolder]) -> list[Task]:
    """Trainings of runs, and the dumps of proposals that other runs read, in order.

    Args:
        folders: runs, each after those it depends on.
    """
    read = {(f.run.proposals_from, f.seed) for f in folders}
    tasks: dict[tuple[str | None, int, bool], Task] = {}  # by run, seed and dump
    for folder in folders:
        run, seed = folder.run, folder.seed
        needed = ((run.proposals_from, seed, True), (run.weights_from, seed, False))
        after = tuple(tasks[key] for key in needed if key[0])
        training = tasks[run.name, seed, False] = Task(folder, dump=False, after=after)
        if (run.name, seed) in read:
            tasks[run.name, seed, True] = Task(folder, dump=True, after=(training,))
    return list(tasks.values())


def run_tasks(tasks: Sequence[Task], at_once: int) -> None:
    """Runs the tasks that are not done; a line shows which run, how far they are, the time left.

    If a task fails, those that do not need it go on.

    Args:
        tasks: each after those it needs.
        at_once: how many processes; they share the GPUs, or the CPU's threads.

    Raises:
        UserError: a process failed; names its log. It is the first of several.
    """
    failed: dict[Task, UserError] = {}
    waiting = [task for task in tasks if not task.done]
    slots = list(range(at_once))
    running: dict[Task, tuple[subprocess.Popen[bytes], int]] = {}
    lengths = {task: int(task.folder.config().SOLVER.MAX_ITER) for task in tasks if not task.dump}
    reached = {task: n if task.done else task.folder.iteration() for task, n in lengths.items()}
    total, initial = sum(lengths.values()), sum(reached.values())
    bar = tqdm(total=total, initial=initial, unit="it", smoothing=0.02)
    # SIGTERM also ends the processes below: two must never share a run's folder.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while waiting or running:
            for task in [t for t in waiting if all(before.done for before in t.after)]:
                if not slots:
                    break
                slot = slots.pop(0)
                with _interrupts_after():  # else a process that just started could not be ended
                    running[task] = (_start(task, slot, at_once), slot)
                waiting.remove(task)
            for task, (process, _) in list(running.items()):
                if process.poll() is not None:
                    try:
                        _check(task, process)
                    except UserError as error:
                        failed[task] = error
                        waiting = [other for other in waiting if not other.needs(failed)]
                    slots.append(running.pop(task)[1])
                if task in lengths:
                    reached[task] = lengths[task] if task.done else task.folder.iteration()
            progress = [
                f"{task.name} {reached[task]}/{lengths[task]}" if task in lengths else task.name
                for task in running
            ]
            bar.set_description_str(" | ".join(progress), refresh=False)
            bar.set_postfix_str(f"{len(waiting)} to start", refresh=False)
            bar.n = sum(reached.values())
            bar.refresh()
            time.sleep(_POLL_SECONDS if running else 0)
        for error in failed.values():
            raise error
    finally:
        signal.signal(signal.SIGTERM, before)
        bar.close()
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()


@contextmanager
def _interrupts_after() -> Iterator[None]:
    """Raises an interrupt that arrives inside it at its end; an ignored one stays ignored."""
    arrived: list[int] = []
    handled = [s for s in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(s) != signal.SIG_IGN]
    before = {s: signal.signal(s, lambda number, _: arrived.append(number)) for s in handled}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if arrived:
        raise KeyboardInterrupt


def _start(task: Task, slot: int, at_once: int) -> subprocess.Popen[bytes]:
    if not task.dump:
        task.folder.claim()
    environment = dict(os.environ)
    gpus = gpus_of(task.folder.config(), visible_gpus(), slot, at_once)
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    elif at_once > 1:
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // at_once))
    with task.log.open("ab") as log:
        return subprocess.Popen(
            task.command(len(gpus)), stdout=log, stderr=subprocess.STDOUT, env=environment
        )


def visible_gpus() -> list[str]:
    """The GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    named = [gpu for gpu in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if gpu.strip()]
    return named[:count] if named else [str(gpu) for gpu in range(count)]


def gpus_of(cfg: CfgNode, gpus: Sequence[str], slot: int, at_once: int) -> list[str]:
    """The GPUs of one of the runs that train at the same time; none on the CPU.

    Detectron2 needs a batch that its GPUs divide evenly. A network that trains its batch norms gets
    one GPU, so that each batch is normalised as a whole on every machine.

    Args:
        cfg: of the run.
        gpus: that may be used.
        slot: number of the run among those at the same time.
        at_once: how many those are.
    """
    if not gpus or not cfg.MODEL.DEVICE.startswith("cuda"):
        return []
    each = max(1, len(gpus) // at_once)
    batch = 1 if cfg.MODEL.RESNETS.NORM == "BN" else cfg.SOLVER.IMS_PER_BATCH
    used = max(n for n in range(1, each + 1) if batch % n == 0)
    return [gpus[(slot * each + i) % len(gpus)] for i in range(used)]


def _check(task: Task, process: subprocess.Popen[bytes]) -> None:
    if process.returncode == 0 and task.done:
        task.folder.tidy()
        return
    lines = task.log.read_text(errors="replace").strip().splitlines()
    raise UserError(
        f"{task.name} ended with status {process.returncode}: {lines[-1] if lines else ''} "
        f"(full log: {task.log}). The same command continues with what is left"
    )

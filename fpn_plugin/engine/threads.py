"""Threads of work on the CPU: no more than there are CPUs for it."""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

import torch
from detectron2.utils import comm

__all__ = ["allowed_cpus", "limit_threads"]

_LOGGER = logging.getLogger(__name__)


def limit_threads() -> None:
    """Limits torch's threads to the CPUs that this process may use, and logs their number.

    These are the CPUs of its affinity, or of its control group's quota if that is less, shared
    with the other processes of the run. OMP_NUM_THREADS stays if it is set.

    Other programs do not change the number: sums would be rounded differently, and a run with the
    same seed, or a resumed run, would give other bits. A warning says if other programs keep CPUs
    busy. A thread that waits for another keeps its own CPU busy, which the other one may need: a
    training can be many times slower. With OMP_WAIT_POLICY=PASSIVE waiting threads sleep, and the
    bits are the same. OpenMP reads it when torch is imported.
    """
    if os.environ.get("OMP_NUM_THREADS"):
        return
    processes, cpus = comm.get_local_size(), os.cpu_count() or 1
    threads = max(1, min(torch.get_num_threads(), allowed_cpus() // processes))
    torch.set_num_threads(threads)
    # Of the mean of the last minute, what this run has not used itself.
    busy = min(os.getloadavg()[0] - processes * time.process_time() / 60, cpus)
    spins = threads > 1 and os.environ.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE"
    if not spins or round(cpus - busy) >= threads * processes:
        _LOGGER.info("number of threads: %d; OMP_NUM_THREADS sets another", threads)
        return
    _LOGGER.warning(
        "%d threads, and other programs keep %.1f of %d CPUs busy: this can be many times slower. "
        "Stop, and begin the command with OMP_WAIT_POLICY=PASSIVE, which gives the same results, "
        "or with OMP_NUM_THREADS=1",
        threads,
        busy,
        cpus,
    )


def allowed_cpus(groups: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs of this process's affinity, or of its control group's quota if that is less.

    Args:
        groups: the folder of control groups.
    """
    has_affinity = hasattr(os, "sched_getaffinity")  # Linux
    cpus = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    try:
        if (groups / "cpu.max").is_file():  # version 2
            quota, period = (groups / "cpu.max").read_text().split()
        else:
            names = ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")
            quota, period = ((groups / name).read_text() for name in names)
        limit = int(quota) / int(period)
    except (OSError, ValueError):  # no groups, or "max"
        return cpus
    return max(1, min(cpus, round(limit))) if limit > 0 else cpus

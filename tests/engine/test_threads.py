"""Threads on the CPU: what limits their number, and what is only reported."""

import logging
import os
import time

import pytest
import torch

from fpn_plugin.engine import threads
from fpn_plugin.engine.threads import allowed_cpus, limit_threads


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "200000 100000\n"}, 2),
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "50000 100000"}, 1),
        ({"cpu.max": "max 100000"}, 6),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 6),
        ({"cpu.max": "1600000 100000"}, 6),
        ({}, 6),
    ],
)
def test_cpus_are_those_of_affinity_and_quota(files, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(6)), raising=False)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert allowed_cpus(tmp_path) == expected


@pytest.fixture
def machine(monkeypatch):
    """Sets what there is: CPUs of the machine and of this process, and processes of the run."""
    numbers: list[int] = []

    def make(cpus: int, allowed: int, load: float, processes: int = 1) -> list[int]:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: cpus)
        monkeypatch.setattr(os, "getloadavg", lambda: (load, 9.0, 9.0))
        monkeypatch.setattr(time, "process_time", lambda: 30.0)  # half of the last minute
        monkeypatch.setattr(threads, "allowed_cpus", lambda: allowed)
        monkeypatch.setattr(threads.comm, "get_local_size", lambda: processes)
        monkeypatch.setattr(torch, "get_num_threads", lambda: cpus)
        monkeypatch.setattr(torch, "set_num_threads", numbers.append)
        return numbers

    return make


@pytest.mark.parametrize(
    ("given", "number", "busy"),
    [
        ((2, 2, 0.6), 2, None),
        ((2, 2, 2.0), 2, "1.5 of 2"),
        ((2, 2, 9.0), 2, "2.0 of 2"),  # the load does not change the number
        ((64, 4, 0.5), 4, None),
        ((64, 4, 40.0), 4, None),
        ((64, 64, 40.0), 64, "39.5 of 64"),
        ((8, 8, 1.0, 2), 4, None),
        ((8, 8, 3.0, 2), 4, "2.0 of 8"),
        ((2, 2, 9.0, 4), 1, None),  # one thread does not wait for another
    ],
)
def test_limits_set_the_number_and_other_programs_are_reported(
    given, number, busy, machine, caplog
):
    numbers = machine(*given)
    with caplog.at_level(logging.INFO):
        limit_threads()
    assert numbers == [number]
    [record] = caplog.records
    shown = f"{number} threads, and other" if busy else f"number of threads: {number}; OMP_NUM"
    assert record.getMessage().startswith(shown)
    assert record.levelno == (logging.WARNING if busy else logging.INFO)
    assert busy is None or f"keep {busy} CPUs busy" in record.getMessage()
    assert busy is None or "OMP_WAIT_POLICY=PASSIVE" in record.getMessage()


def test_what_the_user_has_set_stays(machine, monkeypatch, caplog):
    numbers = machine(2, 1, 9.0)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    limit_threads()
    assert numbers == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    machine_of_two = machine(2, 2, 9.0)
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    limit_threads()
    assert machine_of_two == [2]
    assert not [each for each in caplog.records if each.levelno > logging.INFO]

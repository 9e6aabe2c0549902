"""Random numbers that depend only on a seed and a position."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

__all__ = ["rng_replayed", "rng_state", "seed_rngs", "seeded"]


def seed_rngs(*entropy: int) -> None:
    """Seeds the generators of Python, numpy and torch, also a used GPU's.

    Different tuples give unrelated streams; sums of seed and position would not.

    Args:
        entropy: not negative; for example seed, rank and iteration.
    """
    _seed_cpu(*entropy)
    # Not torch.manual_seed: on a machine with an unused GPU, it stores a traceback of each call.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(torch.default_generator.initial_seed())


def _seed_cpu(*entropy: int) -> None:
    words = np.random.SeedSequence(entropy).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed((int(words[2]) << 31) ^ int(words[3]))


def rng_state() -> tuple[Any, ...]:
    """The state of the generators of Python, numpy and torch, also a used GPU's."""
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), gpu


def _set_rng_state(state: tuple[Any, ...]) -> None:
    python, numpy, cpu, gpu = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if gpu is not None:
        torch.cuda.set_rng_state(gpu)


@contextmanager
def rng_replayed(state: tuple[Any, ...] | None = None) -> Iterator[None]:
    """Within it, random numbers follow ``state`` or the current one; later ones do not change."""
    current = rng_state()
    if state is not None:
        _set_rng_state(state)
    try:
        yield
    finally:
        _set_rng_state(current)


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Within it, the CPU's generators are seeded as by :func:`seed_rngs`.

    Later random numbers do not change, except in processes that load data: they draw none outside.
    """
    with rng_replayed() if get_worker_info() is None else nullcontext():
        _seed_cpu(*entropy)
        yield

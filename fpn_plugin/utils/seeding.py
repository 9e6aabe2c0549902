"""Random numbers that depend only on a seed and a position."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import get_worker_info

__all__ = ["rng_replayed", "rng_state", "seed_rngs", "seeded"]


def seed_rngs(*entropy: int) -> None:
    """Seeds the generators of Python, numpy and torch, a used GPU's too.

    Different tuples give unrelated streams, which sums of seed and position do not.

    Args:
        entropy: not negative; for example seed, rank and iteration.
    """
    _seed_cpu(*entropy)
    # Not torch.manual_seed: on a machine with an unused GPU, it keeps a stack of each call.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(torch.default_generator.initial_seed())


def _seed_cpu(*entropy: int) -> None:
    words = np.random.SeedSequence(entropy).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed((int(words[2]) << 31) ^ int(words[3]))


def rng_state() -> tuple[Any, ...]:
    """The state of the generators of Python, numpy and torch, a used GPU's too."""
    gpu = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), gpu


def _set_rng_state(state: tuple[Any, ...]) -> None:
    random.setstate(state[0])
    np.random.set_state(state[1])
    torch.set_rng_state(state[2])
    if state[3] is not None:
        torch.cuda.set_rng_state(state[3])


@contextmanager
def rng_replayed(state: tuple[Any, ...] | None = None) -> Iterator[None]:
    """Random numbers within it are those that followed ``state``; later ones are unaffected.

    Args:
        state: of :func:`rng_state`; None for the current one.
    """
    current = rng_state()
    if state is not None:
        _set_rng_state(state)
    try:
        yield
    finally:
        _set_rng_state(current)


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Within it, the CPU's generators are seeded as by :func:`seed_rngs`; later random numbers are
    unaffected, except in processes that load data, which draw none in between.

    Args:
        entropy: not negative.
    """
    if get_worker_info() is not None:
        _seed_cpu(*entropy)
        yield
        return
    with rng_replayed():
        _seed_cpu(*entropy)
        yield

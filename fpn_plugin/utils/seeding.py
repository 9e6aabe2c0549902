"""Random numbers as a function of a seed and a position, so that nothing has to be remembered."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch.utils.data import get_worker_info

__all__ = ["seed_rngs", "seeded"]


def seed_rngs(*entropy: int) -> None:
    """Seeds the generators of Python, numpy and torch, a used GPU's too, from some numbers.

    Unlike sums of seed and position, different tuples give unrelated streams.

    Args:
        entropy: not negative; for example seed, rank and iteration.
    """
    _seed_cpu(*entropy)
    # Not torch.manual_seed: where a GPU is there and not used, that keeps a stack a call.
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(torch.default_generator.initial_seed())


def _seed_cpu(*entropy: int) -> None:
    words = np.random.SeedSequence(entropy).generate_state(4)
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed((int(words[2]) << 31) ^ int(words[3]))


@contextmanager
def seeded(*entropy: int) -> Iterator[None]:
    """Within it, the CPU's generators are seeded as by :func:`seed_rngs`; after it, as before, but
    for processes that load data, which draw nothing in between.

    Args:
        entropy: not negative.
    """
    if get_worker_info() is not None:
        _seed_cpu(*entropy)
        yield
        return
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    _seed_cpu(*entropy)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])

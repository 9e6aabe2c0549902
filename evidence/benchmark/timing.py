"""A/B timings: both sides in turn, medians and spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

__all__ = ["Comparison", "compare", "seconds_of"]


@dataclass(frozen=True)
class Comparison:
    """Seconds of two ways to do one thing, taken in pairs."""

    name: str
    baseline: str
    baseline_seconds: list[float]
    seconds: list[float]
    target: float | None = None
    limit: float | None = None

    @property
    def met(self) -> bool | None:
        """Whether the aims are met; None without one."""
        if self.target is None:
            return None
        fast_enough = self.limit is None or statistics.median(self.seconds) <= self.limit
        return self.ratio >= self.target and fast_enough

    @property
    def ratio(self) -> float:
        """How many times faster than the baseline: median of the pairs' ratios."""
        return statistics.median(self.ratios)

    @property
    def ratios(self) -> list[float]:
        """Of each pair."""
        return [a / b for a, b in zip(self.baseline_seconds, self.seconds, strict=True)]


def seconds_of(call: Callable[[], object]) -> float:
    """Seconds of a call, with its work on a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def compare(
    name: str,
    baseline_name: str,
    baseline: Callable[[], object],
    ours: Callable[[], object],
    *,
    pairs: int,
    target: float | None = None,
    limit: float | None = None,
) -> Comparison:
    """Times two calls in turn. The call that comes first changes from pair to pair.

    Args:
        name: of the comparison.
        baseline_name: of the baseline.
        baseline: its call.
        ours: the plugin's call.
        pairs: how many are timed, after one that is not.
        target: the ratio to reach.
        limit: the seconds to reach.
    """
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for pair in tqdm(range(pairs + 1), desc=name, unit="pair", leave=False):
        for which in (False, True) if pair % 2 else (True, False):
            taken = seconds_of(ours if which else baseline)
            if pair:
                seconds[which].append(taken)
    return Comparison(name, baseline_name, seconds[False], seconds[True], target, limit)

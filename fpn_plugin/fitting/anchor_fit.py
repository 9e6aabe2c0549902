"""Anchor sizes and ratios that overlap a dataset's boxes best, by coordinate ascent on IoU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .matching import GridOffsets
from .pyramid import Pyramid
from .resizing import InputBoxes

__all__ = ["fit_anchors"]

_SAMPLE = 3_000  # boxes that are fitted to
_STEPS = (1.0, 0.5, 0.25, 0.1, 0.04)  # in log2, coarse to fine
_LEAST_GAIN = 1e-5  # of mean IoU, for a sweep to be followed by another
# Anchors between one and sixteen strides of their level; the paper's are of eight.
_LEAST_STRIDES, _MOST_STRIDES = 1.0, 16.0
_MOST_ASPECT = 20.0
_LEAST_SHARE = 0.005  # of boxes, for a level to count as one that boxes decide on


def fit_anchors(
    inputs: InputBoxes, pyramid: Pyramid, num_sizes: int, *, ratios_too: bool = False
) -> Pyramid:
    """Fits anchors to boxes: what is raised is the mean over boxes of the best IoU on the grid.

    Sizes are free at each level, from 1 to 16 strides or as far as the config's reach; ratios,
    where they are fitted, are shared by all levels. Sizes and ratios are moved one at a time, by
    steps that shrink, wherever that raises the mean; the best of several starts is kept: the
    config's own anchors where their number is the one asked for, and k-means by IoU of the boxes'
    shapes. Boxes beyond 3,000 are sampled. A level whose anchors fit hardly any box best gets the
    sizes of its neighbour an octave on.

    Args:
        inputs: the boxes as the network sees them.
        pyramid: whose levels, offset, padding and number of ratios hold.
        num_sizes: sizes at each level.
        ratios_too: fit ratios as well, rather than keep the pyramid's.

    Returns:
        The pyramid with fitted sizes, ascending at each level, and fitted ratios, ascending.
    """
    problem = _Problem(inputs.sample(_SAMPLE), pyramid, ratios_too)
    found = [problem.climb(start) for start in _starts(problem, num_sizes)]
    best = max(found, key=lambda pair: pair[0])[1]
    settled = problem.settled(best)
    ratios = _rounded(settled.ratios) if ratios_too else pyramid.ratios
    return replace(pyramid, sizes=_rounded(settled.sizes), ratios=ratios)


@dataclass
class _Anchors:
    """Logarithms to base 2 of sizes, ``(levels, S)``, and ratios, ``(levels, R)``."""

    sizes: np.ndarray
    ratios: np.ndarray


def _rounded(logarithms: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Ascending, to three significant digits: more would only look exact."""
    values = 2.0 ** np.sort(logarithms, axis=1)
    return tuple(tuple(float(f"{value:.3g}") for value in each) for each in values)


class _Problem:
    """Boxes, and the IoU that anchors have with them."""

    def __init__(self, inputs: InputBoxes, pyramid: Pyramid, ratios_too: bool) -> None:
        self.grid = GridOffsets(inputs, pyramid.anchor_levels, pyramid.offset, pyramid.divisibility)
        self.levels = pyramid.anchor_levels
        self.given, self.ratios_too = pyramid, ratios_too
        strides = 2.0 ** np.array(self.levels)
        # As far as the config's own reach: a pyramid of one level has all sizes there.
        own = np.array(pyramid.sizes)
        self.low = np.log2(np.minimum(strides * _LEAST_STRIDES, own.min(axis=1)))
        self.high = np.log2(np.maximum(strides * _MOST_STRIDES, own.max(axis=1)))

    def iou(self, level: int, size: float, ratios: np.ndarray) -> np.ndarray:
        """Best IoU of each box with each anchor, ``(N, ratios)``; arguments are logarithms."""
        size, ratio = 2.0**size, 2.0 ** (ratios / 2)
        shapes = np.column_stack([size / ratio, size * ratio])
        return self.grid.iou(self.levels[level], shapes)

    def climb(self, at: _Anchors) -> tuple[float, _Anchors]:
        """Moves one value at a time until none is left whose move raises the mean IoU."""
        table = np.stack(
            [
                np.stack([self.iou(level, size, at.ratios[level]) for size in of_level])
                for level, of_level in enumerate(at.sizes)
            ]
        )  # (levels, S, N, R)
        score = table.max(axis=(0, 1, 3)).mean()
        for step in _STEPS:
            while True:
                before = score
                score = self._sweep_sizes(at, table, score, step)
                if self.ratios_too:
                    score = self._sweep_ratios(at, table, score, step)
                if score < before + _LEAST_GAIN:
                    break
        return float(score), at

    def settled(self, at: _Anchors) -> _Anchors:
        """The same anchors, with an octave between levels where boxes did not decide."""
        best = np.stack(
            [
                np.max(
                    [self.iou(level, size, at.ratios[level]).max(axis=1) for size in of_level],
                    axis=0,
                )
                for level, of_level in enumerate(at.sizes)
            ]
        )
        share = np.bincount(best.argmax(axis=0), minlength=len(best)) / best.shape[1]
        used = np.flatnonzero(share >= _LEAST_SHARE)
        sizes = at.sizes.copy()
        for level in range(used[-1] + 1, len(sizes)):
            sizes[level] = np.clip(sizes[level - 1] + 1, self.low[level], self.high[level])
        for level in range(used[0] - 1, -1, -1):
            sizes[level] = np.clip(sizes[level + 1] - 1, self.low[level], self.high[level])
        return _Anchors(sizes, at.ratios)

    def _sweep_sizes(self, at: _Anchors, table: np.ndarray, score: float, step: float) -> float:
        for level, number in np.ndindex(at.sizes.shape):
            kept = table[level, number].copy()
            table[level, number] = 0
            others = table.max(axis=(0, 1, 3))
            table[level, number] = kept
            for move in (-step, step):
                size = at.sizes[level, number] + move
                if not self.low[level] <= size <= self.high[level]:
                    continue
                trial = self.iou(level, size, at.ratios[level])
                reached = np.maximum(others, trial.max(axis=1)).mean()
                if reached > score:
                    score, at.sizes[level, number] = reached, size
                    table[level, number] = trial
                    break
        return score

    def _sweep_ratios(self, at: _Anchors, table: np.ndarray, score: float, step: float) -> float:
        for number in range(at.ratios.shape[1]):
            others = np.delete(table, number, axis=3).max(axis=(0, 1, 3), initial=0)
            for move in (-step, step):
                ratio = at.ratios[0, number] + move
                if abs(ratio) > np.log2(_MOST_ASPECT):
                    continue
                trial = np.stack(
                    [
                        np.stack([self.iou(level, size, ratio[None])[:, 0] for size in of_level])
                        for level, of_level in enumerate(at.sizes)
                    ]
                )
                reached = np.maximum(others, trial.max(axis=(0, 1))).mean()
                if reached > score:
                    score, at.ratios[:, number] = reached, ratio
                    table[:, :, :, number] = trial
                    break
        return score


def _starts(problem: _Problem, num_sizes: int) -> Iterator[_Anchors]:
    given = problem.given
    bounds = problem.low[:, None], problem.high[:, None]
    levels = len(problem.levels)
    ratios = np.log2(np.array(given.ratios))
    if len(given.sizes[0]) == num_sizes and not (
        problem.ratios_too and np.ptp(ratios, axis=0).any()
    ):
        yield _Anchors(np.log2(np.array(given.sizes)).clip(*bounds), ratios.copy())
    sides = problem.grid.sides
    if problem.ratios_too:
        aspects = np.log2(sides[:, 1] / sides[:, 0])
        centers = _kmeans(np.column_stack([-aspects / 2, aspects / 2]), ratios.shape[1])
        ratios = np.tile(centers[:, 1] - centers[:, 0], (levels, 1))
    log_sizes = np.log2(sides).mean(axis=1)
    # The finest levels share the boxes, coarser ones go on.
    for fitted in range(min(2, levels), levels + 1):
        centers = _kmeans(np.column_stack([log_sizes, log_sizes]), fitted * num_sizes)[:, 0]
        centers = np.sort(centers).reshape(fitted, num_sizes)
        beyond = centers[-1] + np.arange(1, levels - fitted + 1)[:, None]
        yield _Anchors(np.concatenate([centers, beyond]).clip(*bounds), ratios.copy())


def _kmeans(shapes: np.ndarray, clusters: int, rounds: int = 30) -> np.ndarray:
    """k-means of shapes, log2 of width and height ``(N, 2)``, where 1 - IoU is the distance."""
    order = np.argsort(shapes @ np.array([1.0, 1.0]) + 1e-3 * shapes[:, 1])
    if np.ptp(shapes.sum(axis=1)) < 1e-9:
        order = np.argsort(shapes[:, 1])
    places = (np.arange(clusters) + 0.5) / clusters * len(shapes)
    centers = shapes[order[places.astype(int)]]
    for _ in range(rounds):
        overlap = np.exp2(np.minimum(shapes[:, None], centers[None]).sum(axis=2))
        union = np.exp2(shapes.sum(axis=1))[:, None] + np.exp2(centers.sum(axis=1))[None] - overlap
        nearest = (overlap / union).argmax(axis=1)
        moved = np.stack(
            [
                np.median(shapes[nearest == k], axis=0) if (nearest == k).any() else centers[k]
                for k in range(clusters)
            ]
        )
        if np.allclose(moved, centers):
            break
        centers = moved
    return centers

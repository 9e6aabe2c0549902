"""Anchors and boxes: the best IoU over the grid, and sizes and ratios fitted by it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from .pyramid import Pyramid
from .resizing import InputBoxes

__all__ = ["GridOffsets", "best_anchors", "fit_anchors"]

_CHUNK = 200_000  # boxes that are matched at a time
_SAMPLE = 3_000  # boxes that anchors are fitted to
_STEPS = (1.0, 0.5, 0.25, 0.1, 0.04)  # in log2, coarse to fine
_LEAST_GAIN = 1e-5  # of mean IoU; after a smaller gain no further sweep follows
# Sizes of anchors in strides of their level; the paper's are of eight.
_LEAST_STRIDES, _MOST_STRIDES = 1.0, 16.0
_MOST_ASPECT = 20.0
_LEAST_SHARE = 0.005  # of boxes; the sizes of a level with fewer follow its neighbour's


class GridOffsets:
    """How far the centre of each box is from the nearest anchor centre of each level.

    Anchors of level k are centred at ((i + offset) 2^k, (j + offset) 2^k) for the cells (i, j) of
    its map. The IoU of an anchor of any shape with a box falls with the distance of their centres
    along each axis. So the nearest centre is the best place, and the best IoU is exact. The map is
    that of the box's own image, padded as Detectron2 pads a batch of one.

    Args:
        inputs: the boxes.
        levels: of the anchors.
        offset: MODEL.ANCHOR_GENERATOR.OFFSET.
        divisibility: the padded input's sides are multiples of it, in pixels.
    """

    def __init__(
        self, inputs: InputBoxes, levels: Sequence[int], offset: float, divisibility: int
    ) -> None:
        self.sides = inputs.sides
        self._areas = self.sides.prod(axis=1)
        centers = inputs.boxes[:, :2] + self.sides / 2
        padded = -(-inputs.shapes[:, ::-1] // divisibility) * divisibility
        self._distance = {}
        for level in levels:
            stride = 2**level
            last = -(-padded // stride) - 1
            cell = np.clip(np.round(centers / stride - offset), 0, last)
            self._distance[level] = np.abs(centers - (cell + offset) * stride)

    def iou(self, level: int, shapes: np.ndarray) -> np.ndarray:
        """Best IoU of each box with each anchor shape of a level, over all its places.

        Args:
            level: one of the constructor's.
            shapes: float ``(A, 2)``, widths and heights in input pixels.

        Returns:
            float64 ``(N, A)``.
        """
        intersection = 1.0
        for axis in (0, 1):
            side, shape = self.sides[:, axis, None], shapes[None, :, axis]
            overlap = (side + shape) / 2 - self._distance[level][:, axis, None]
            overlap = np.minimum(np.minimum(overlap, side), shape)
            intersection = intersection * np.maximum(overlap, 0)
        return intersection / (self._areas[:, None] + shapes.prod(axis=1) - intersection)


def best_anchors(inputs: InputBoxes, pyramid: Pyramid) -> tuple[np.ndarray, np.ndarray]:
    """The anchor of a pyramid that fits each box best.

    Returns:
        float64 ``(N,)``, its IoU, and int64 ``(N,)``, its level.
    """
    shapes = pyramid.anchor_shapes()
    best, level_of = [], []
    for start in range(0, len(inputs.boxes), _CHUNK):
        part = inputs.part(slice(start, start + _CHUNK))
        grid = GridOffsets(part, pyramid.anchor_levels, pyramid.offset, pyramid.divisibility)
        pairs = zip(pyramid.anchor_levels, shapes, strict=True)
        by_level = np.stack([grid.iou(level, of_level).max(axis=1) for level, of_level in pairs])
        best.append(by_level.max(axis=0))
        level_of.append(np.array(pyramid.anchor_levels)[by_level.argmax(axis=0)])
    return np.concatenate(best), np.concatenate(level_of)


def fit_anchors(
    inputs: InputBoxes, pyramid: Pyramid, num_sizes: int, *, ratios_too: bool = False
) -> Pyramid:
    """Fits anchors to boxes: maximizes the mean over boxes of the best IoU on the grid.

    Sizes are free at each level, from 1 to 16 strides, or as far as the config's own. Fitted
    ratios are the same at all levels. Coordinate ascent moves one size or ratio at a time, by
    shrinking steps. It starts from the config's own anchors, if their number is the one asked for,
    and from k-means by IoU of the boxes' shapes; the best result is kept. Of more than 3,000 boxes
    a sample is used. A level whose anchors are the best for hardly any box gets its neighbour's
    sizes, an octave apart.

    Args:
        inputs: the boxes as the network sees them.
        pyramid: its levels, offset, padding and number of ratios are kept.
        num_sizes: sizes at each level.
        ratios_too: fit ratios as well.

    Returns:
        The pyramid with fitted sizes, ascending at each level, and fitted ratios, ascending.
    """
    problem = _Problem(inputs.sample(_SAMPLE), pyramid, ratios_too)
    found = [(problem.climb(*start), *start) for start in _starts(problem, num_sizes)]
    _, sizes, ratios = max(found, key=lambda each: each[0])
    fitted = _rounded(ratios) if ratios_too else pyramid.ratios
    return replace(pyramid, sizes=_rounded(problem.settled(sizes, ratios)), ratios=fitted)


def _rounded(logarithms: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Ascending, to three significant digits."""
    values = 2.0 ** np.sort(logarithms, axis=1)
    return tuple(tuple(float(f"{value:.3g}") for value in each) for each in values)


class _Problem:
    """Boxes, and the IoU of anchors with them.

    Anchors are logarithms to base 2 of sizes, ``(levels, S)``, and of ratios, ``(levels, R)``.
    """

    def __init__(self, inputs: InputBoxes, pyramid: Pyramid, ratios_too: bool) -> None:
        self.grid = GridOffsets(inputs, pyramid.anchor_levels, pyramid.offset, pyramid.divisibility)
        self.levels = pyramid.anchor_levels
        self.given, self.ratios_too = pyramid, ratios_too
        strides = 2.0 ** np.array(self.levels)
        # As far as the config's own: a pyramid of one level has all sizes there.
        own = np.array(pyramid.sizes)
        self.low = np.log2(np.minimum(strides * _LEAST_STRIDES, own.min(axis=1)))
        self.high = np.log2(np.maximum(strides * _MOST_STRIDES, own.max(axis=1)))

    def iou(self, level: int, size: float, ratios: np.ndarray) -> np.ndarray:
        """Best IoU of each box with each anchor, ``(N, ratios)``; arguments are logarithms."""
        size, ratio = 2.0**size, 2.0 ** (ratios / 2)
        shapes = np.column_stack([size / ratio, size * ratio])
        return self.grid.iou(self.levels[level], shapes)

    def _table(self, sizes: np.ndarray, ratios: np.ndarray) -> np.ndarray:
        """IoU of each box with each anchor, ``(levels, S, N, R)``."""
        return np.array(
            [
                [self.iou(level, size, ratios[level]) for size in of_level]
                for level, of_level in enumerate(sizes)
            ]
        )

    def climb(self, sizes: np.ndarray, ratios: np.ndarray) -> float:
        """Moves one value at a time, in place, until no move raises the mean IoU; returns it."""
        table = self._table(sizes, ratios)
        score = table.max(axis=(0, 1, 3)).mean()
        for step in _STEPS:
            while True:
                before = score
                score = self._sweep_sizes(sizes, ratios, table, score, step)
                if self.ratios_too:
                    score = self._sweep_ratios(sizes, ratios, table, score, step)
                if score < before + _LEAST_GAIN:
                    break
        return float(score)

    def settled(self, sizes: np.ndarray, ratios: np.ndarray) -> np.ndarray:
        """The sizes, with an octave between levels that hardly any box uses."""
        best = self._table(sizes, ratios).max(axis=(1, 3))
        share = np.bincount(best.argmax(axis=0), minlength=len(best)) / best.shape[1]
        used = np.flatnonzero(share >= _LEAST_SHARE)
        sizes = sizes.copy()
        for level in range(used[-1] + 1, len(sizes)):
            sizes[level] = np.clip(sizes[level - 1] + 1, self.low[level], self.high[level])
        for level in range(used[0] - 1, -1, -1):
            sizes[level] = np.clip(sizes[level + 1] - 1, self.low[level], self.high[level])
        return sizes

    def _sweep_sizes(
        self, sizes: np.ndarray, ratios: np.ndarray, table: np.ndarray, score: float, step: float
    ) -> float:
        for level, number in np.ndindex(sizes.shape):
            kept = table[level, number].copy()
            table[level, number] = 0
            others = table.max(axis=(0, 1, 3))
            table[level, number] = kept
            for move in (-step, step):
                size = sizes[level, number] + move
                if not self.low[level] <= size <= self.high[level]:
                    continue
                trial = self.iou(level, size, ratios[level])
                reached = np.maximum(others, trial.max(axis=1)).mean()
                if reached > score:
                    score, sizes[level, number] = reached, size
                    table[level, number] = trial
                    break
        return score

    def _sweep_ratios(
        self, sizes: np.ndarray, ratios: np.ndarray, table: np.ndarray, score: float, step: float
    ) -> float:
        for number in range(ratios.shape[1]):
            others = np.delete(table, number, axis=3).max(axis=(0, 1, 3), initial=0)
            for move in (-step, step):
                ratio = ratios[0, number] + move
                if abs(ratio) > np.log2(_MOST_ASPECT):
                    continue
                trial = self._table(sizes, np.full((len(sizes), 1), ratio))[..., 0]
                reached = np.maximum(others, trial.max(axis=(0, 1))).mean()
                if reached > score:
                    score, ratios[:, number] = reached, ratio
                    table[:, :, :, number] = trial
                    break
        return score


def _starts(problem: _Problem, num_sizes: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Sizes and ratios to begin at, each of its own arrays."""
    given = problem.given
    bounds = problem.low[:, None], problem.high[:, None]
    levels = len(problem.levels)
    ratios = np.log2(np.array(given.ratios))
    shared = not (problem.ratios_too and np.ptp(ratios, axis=0).any())
    if shared and len(given.sizes[0]) == num_sizes:
        yield np.log2(np.array(given.sizes)).clip(*bounds), ratios.copy()
    sides = problem.grid.sides
    if problem.ratios_too:
        aspects = np.log2(sides[:, 1] / sides[:, 0])
        centers = _kmeans(np.column_stack([-aspects / 2, aspects / 2]), ratios.shape[1])
        ratios = np.tile(centers[:, 1] - centers[:, 0], (levels, 1))
    log_sizes = np.log2(sides).mean(axis=1)
    # The finest levels share the boxes; coarser ones continue in octaves.
    for fitted in range(min(2, levels), levels + 1):
        centers = _kmeans(np.column_stack([log_sizes, log_sizes]), fitted * num_sizes)[:, 0]
        centers = np.sort(centers).reshape(fitted, num_sizes)
        beyond = centers[-1] + np.arange(1, levels - fitted + 1)[:, None]
        yield np.concatenate([centers, beyond]).clip(*bounds), ratios.copy()


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
        moved = centers.copy()
        for k in np.unique(nearest):
            moved[k] = np.median(shapes[nearest == k], axis=0)
        if np.allclose(moved, centers):
            break
        centers = moved
    return centers

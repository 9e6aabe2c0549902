"""RoIAlign over a pyramid on a CPU: torchvision's values, as sums of rows of a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["pyramid_roi_align"]

# Terms held at a time, at most, unless a single box has more: 12 bytes each.
_MOST_TERMS = 1 << 21
# Values of a table or of sums at a time, at most, unless 16 channels or a single box have more.
_MOST_VALUES = 1 << 22


def pyramid_roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    scales: Sequence[float],
    output_size: tuple[int, int],
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """:func:`.roi_align.pyramid_roi_align` for tensors on the CPU.

    RoIAlign averages bilinear samples, so an output cell is a weighted sum of feature cells, and
    samples share cells: g x g of them read (g + 1) x (g + 1) cells, not 4 g g. Each weight is a
    product of one factor per axis. ``embedding_bag`` then sums rows of a ``(cells, C)`` table with
    vector instructions on all threads. The gradient is the same sum with cells and output cells
    exchanged.

    ``features`` and ``rois`` are float32 or float64, ``levels`` are int64. Maps that are not
    channels last are copied. Values are torchvision's but for the order of summation.
    """
    sampling = _Sampling(tuple(output_size), tuple(scales), sampling_ratio, aligned)
    return _PyramidRoIAlign.apply(rois, levels, sampling, *features)


class _Sampling(NamedTuple):
    output_size: tuple[int, int]
    scales: tuple[float, ...]
    sampling_ratio: int
    aligned: bool


class _Terms(NamedTuple):
    """What the output cells of n boxes on one level are sums of, K terms each."""

    level: int
    boxes: Tensor  # int64 (n,)
    cells: Tensor  # int32 (n * output cells, K): rows of the level's table
    weights: Tensor  # (n * output cells, K)


class _PyramidRoIAlign(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rois: Tensor, levels: Tensor, sampling: _Sampling, *features: Tensor
    ) -> Tensor:
        ctx.save_for_backward(rois, levels)
        ctx.sampling, ctx.shapes = sampling, [level.shape for level in features]
        ctx.channels_last = [_is_channels_last(level) for level in features]
        channels, outputs = features[0].shape[1], sampling.output_size[0] * sampling.output_size[1]
        pooled = features[0].new_empty(len(rois), channels, outputs)
        without = torch.ones(len(rois), dtype=torch.bool)
        for group in _groups(_terms(rois, levels, ctx.shapes, sampling)):
            level = group[0].level
            whole = ctx.channels_last[level]
            for part in [slice(None)] if whole else _parts(ctx.shapes[level]):
                table = _table(features[level][:, part])
                for terms in group:
                    sums = F.embedding_bag(
                        terms.cells, table, mode="sum", per_sample_weights=terms.weights
                    )
                    pooled[terms.boxes, part] = sums.view(-1, outputs, table.shape[1]).mT
            for terms in group:
                without[terms.boxes] = False
        if without.any():
            pooled[without] = 0
        return pooled.view(len(rois), channels, *sampling.output_size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rois, levels = ctx.saved_tensors
        grads: dict[int, Tensor] = {}
        for group in _groups(_terms(rois, levels, ctx.shapes, ctx.sampling)):
            level = group[0].level
            first = level not in grads
            if first:
                grads[level] = _empty(ctx.shapes[level], ctx.channels_last[level], grad)
            _add_gradient(grads[level], group, grad.flatten(2), first)
        for level, last in enumerate(ctx.channels_last):
            if level not in grads:
                grads[level] = _empty(ctx.shapes[level], last, grad).zero_()
        return None, None, None, *(grads[level] for level in range(len(grads)))


def _add_gradient(into: Tensor, group: list[_Terms], grad: Tensor, first: bool) -> None:
    """Adds to a level's gradient, ``(N, C, H, W)``, that of some boxes, ``(M, C, output cells)``.

    ``first`` overwrites it.
    """
    images, _, height, width = into.shape
    outputs = grad.shape[2]
    boxes = torch.cat([terms.boxes for terms in group])
    cells = torch.cat([terms.cells.flatten() for terms in group])
    weights = torch.cat([terms.weights.flatten() for terms in group])
    rows_of = torch.arange(len(boxes) * outputs, dtype=torch.int32)
    rows_of = rows_of.split([len(terms.cells) for terms in group])
    sources = torch.cat(
        [
            of_some[:, None].expand_as(terms.cells).flatten()
            for of_some, terms in zip(rows_of, group, strict=True)
        ]
    )
    read = weights.nonzero().squeeze(1)
    cells, weights, sources = cells[read], weights[read], sources[read]
    # By feature cell instead of by output cell; a cell that no box reads has an empty bag.
    counts = torch.bincount(cells, minlength=images * height * width)
    bags = (counts.cumsum(0) - counts).int()
    order = cells.sort().indices
    sources, weights = sources[order], weights[order]
    for part in _parts(into.shape):
        rows = grad[boxes, part].mT.reshape(len(boxes) * outputs, -1)
        sums = F.embedding_bag(sources, rows, bags, mode="sum", per_sample_weights=weights)
        tables = sums.view(images, height * width, -1)
        for of_image, table in zip(into[:, part], tables, strict=True):
            if first:
                of_image.flatten(1).copy_(table.t())
            else:
                of_image.flatten(1).add_(table.t())


def _groups(terms: Iterator[_Terms]) -> Iterator[list[_Terms]]:
    """Terms of one level together, as many as fit into memory at a time."""
    group: list[_Terms] = []
    for each in terms:
        held = sum(of_some.cells.numel() for of_some in group)
        if group and (each.level != group[0].level or held > _MOST_TERMS):
            yield group
            group = []
        group.append(each)
    if group:
        yield group


def _parts(shape: torch.Size) -> list[slice]:
    """Channels in parts whose tables are small.

    New memory from the system costs more than the computation: a part reuses the memory of the one
    before.
    """
    images, channels, height, width = shape
    each = max(16, _MOST_VALUES // (images * height * width) // 16 * 16)
    return [slice(first, first + each) for first in range(0, channels, each)]


def _terms(
    rois: Tensor, levels: Tensor, shapes: Sequence[torch.Size], sampling: _Sampling
) -> Iterator[_Terms]:
    """The terms of all boxes, for one level and number of samples at a time.

    Boxes without a sample are left out: those of negative extent, if the number of samples adapts.
    """
    size, sampling_ratio = sampling.output_size, sampling.sampling_ratio
    # In torchvision's order of operations: a rounding error could change the number of samples.
    scales = rois.new_tensor(sampling.scales)[levels, None]
    corners = rois[:, 1:] * scales - (0.5 if sampling.aligned else 0.0)
    start, extent = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not sampling.aligned:
        extent = extent.clamp(min=1)
    bins = extent / extent.new_tensor([size[1], size[0]])
    samples = torch.full_like(bins, sampling_ratio) if sampling_ratio > 0 else bins.ceil()
    # Samples at most a cell apart share cells: n of them read n + 1. Others share none.
    close = (bins >= 0) & (bins <= samples)
    kinds, of_box = torch.cat(
        [levels[:, None].to(samples), _rounded_up(samples), close.to(samples)], dim=1
    ).unique(dim=0, return_inverse=True)
    members = of_box.argsort(stable=True).split(
        torch.bincount(of_box, minlength=len(kinds)).tolist()
    )
    for kind, of_kind in zip(kinds.long().tolist(), members, strict=True):
        level, most_x, most_y, close_x, close_y = kind
        if most_x <= 0 or most_y <= 0:
            continue
        channels, height, width = shapes[level][1:]
        terms_x = most_x + 1 if close_x else 2 * most_x
        terms_y = most_y + 1 if close_y else 2 * most_y
        each = terms_x * terms_y
        most = min(_MOST_TERMS // each, _MOST_VALUES // channels) // (size[0] * size[1])
        for boxes in of_kind.split(max(1, most)):
            (start_x, start_y), (step_x, step_y) = start[boxes].unbind(1), bins[boxes].unbind(1)
            of_x, of_y = samples[boxes].unbind(1)
            x, weights_x = _axis(start_x, step_x, size[1], of_x, most_x, bool(close_x), width)
            y, weights_y = _axis(start_y, step_y, size[0], of_y, most_y, bool(close_y), height)
            y = y * width + (rois[boxes, 0].int() * (height * width))[:, None, None]
            cells = y[:, :, None, :, None] + x[:, None, :, None, :]
            weights = weights_y[:, :, None, :, None] * weights_x[:, None, :, None, :]
            yield _Terms(level, boxes, cells.view(-1, each), weights.view(-1, each))


def _rounded_up(samples: Tensor) -> Tensor:
    """To 1, 2, 3, 4, 6, 8, 12, ...: fewer kinds of boxes save more time than fewer samples."""
    power = torch.exp2(samples.clamp(min=1).log2().floor())
    return torch.where(
        samples <= power, samples, torch.where(samples <= 1.5 * power, 1.5 * power, 2 * power)
    ).ceil()


def _axis(
    start: Tensor, step: Tensor, outputs: int, samples: Tensor, most: int, close: bool, size: int
) -> tuple[Tensor, Tensor]:
    """Feature cells that each output cell reads along one axis, and the weight of each.

    Args:
        start: ``(n,)``, first edge of each box, in feature cells.
        step: ``(n,)``, extent of an output cell, in feature cells.
        outputs: number of output cells.
        samples: ``(n,)``, samples in each output cell of a box.
        most: largest number of samples; samples that a box does not have weigh nothing.
        close: whether samples are at most one feature cell apart.
        size: number of feature cells.

    Returns:
        Cells, int32, and weights, both ``(n, outputs, K)``; K is ``most`` + 1 if close, else twice
        ``most``. Weights of an output cell sum to the share of its samples on the map.
    """
    output = torch.arange(outputs, dtype=step.dtype)
    sample = torch.arange(most, dtype=step.dtype) + 0.5
    edge = start[:, None] + output * step[:, None]
    at = edge[:, :, None] + (sample * step[:, None] / samples[:, None])[:, None, :]
    counted = (at >= -1) & (at <= size) & (sample < samples[:, None])[:, None, :]
    at = at.clamp_(0, size - 1)
    low = at.floor()
    if close:
        read = low[:, :, :1] + torch.arange(most + 1, dtype=step.dtype)
        # Bilinear interpolation: a cell's weight falls from 1 to 0 over one cell's distance.
        near = 1 - (at[:, :, :, None] - read[:, :, None, :]).abs_()
        weights = (near.clamp_(min=0) * counted[:, :, :, None]).sum(dim=2)
    else:
        read = torch.stack([low, low + 1], dim=3).flatten(2)
        beyond = at - low
        weights = (torch.stack([1 - beyond, beyond], dim=3) * counted[:, :, :, None]).flatten(2)
    return read.clamp_(max=size - 1).int(), weights / samples[:, None, None]


def _is_channels_last(level: Tensor) -> bool:
    return level.is_contiguous(memory_format=torch.channels_last) and not level.is_contiguous()


def _table(level: Tensor) -> Tensor:
    """``(N, C, H, W)`` as ``(N * H * W, C)``, in row-major order."""
    images, channels, height, width = level.shape
    if level.is_contiguous(memory_format=torch.channels_last):
        return level.permute(0, 2, 3, 1).reshape(-1, channels)
    # An image at a time: torch transposes matrices in blocks, four dimensions cell by cell.
    table = level.new_empty(images, height * width, channels)
    for rows, of_image in zip(table, level, strict=True):
        rows.copy_(of_image.flatten(1).t())
    return table.view(-1, channels)


def _empty(shape: torch.Size, channels_last: bool, like: Tensor) -> Tensor:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, memory_format=layout)

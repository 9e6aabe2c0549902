"""RoIAlign over a pyramid on a CPU: torchvision's values, as sums of rows of a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = ["pyramid_roi_align"]

# Terms held at a time, at most, unless one box alone has more: 12 bytes each.
_MOST_TERMS = 1 << 21


def pyramid_roi_align(
    features: Sequence[Tensor],
    rois: Tensor,
    levels: Tensor,
    output_size: tuple[int, int],
    scales: Sequence[float],
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """:func:`torchvision.ops.roi_align` of each box on its level, for tensors on the CPU.

    RoIAlign averages bilinear samples, so an output cell is a weighted sum of feature cells, and
    samples share cells: g x g of them read (g + 1) x (g + 1) cells, not 4 g g. Each weight is a
    product of one factor per axis. What remains is to sum rows of a ``(cells, C)`` table, which
    ``embedding_bag`` does with vector instructions on all threads; the gradient is the same sum
    with the roles of cells and output cells exchanged.

    Args:
        features: one ``(N, C, H, W)`` map per level, float32 or float64; channels-last maps are
            read where they are, others are copied.
        rois: ``(M, 5)`` of the same dtype: image index and XYXY in pixels of the network's input.
        levels: int64 ``(M,)``, indices into ``features``.
        output_size: height and width of the output, in cells.
        scales: feature cells per pixel, of each level.
        sampling_ratio: samples per output cell and axis, 0 for as many as there are feature
            cells.
        aligned: whether cell centres lie at half pixels (ROIAlignV2).

    Returns:
        ``(M, C, *output_size)``, torchvision's values but for the order of summation. Gradients
        go to the features alone, as there.
    """
    how = _How(tuple(output_size), tuple(scales), sampling_ratio, aligned)
    return _PyramidRoIAlign.apply(rois, levels, how, *features)


class _How(NamedTuple):
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
    def forward(ctx: Any, rois: Tensor, levels: Tensor, how: _How, *features: Tensor) -> Tensor:
        ctx.save_for_backward(rois, levels)
        ctx.how, ctx.shapes = how, [level.shape for level in features]
        ctx.channels_last = [_is_channels_last(level) for level in features]
        channels = features[0].shape[1]
        pooled = features[0].new_empty(len(rois), channels, how.output_size[0] * how.output_size[1])
        without = torch.ones(len(rois), dtype=torch.bool)
        tables: dict[int, Tensor] = {}
        for level, boxes, cells, weights in _terms(rois, levels, ctx.shapes, how):
            if level not in tables:
                tables[level] = _table(features[level])
            sums = F.embedding_bag(cells, tables[level], mode="sum", per_sample_weights=weights)
            pooled[boxes] = sums.view(len(boxes), -1, channels).transpose(1, 2)
            without[boxes] = False
        pooled[without] = 0
        return pooled.view(len(rois), channels, *how.output_size)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rois, levels = ctx.saved_tensors
        channels, outputs = grad.shape[1], grad.shape[2] * grad.shape[3]
        rows = grad.new_empty(len(grad), outputs, channels)
        rows.copy_(grad.flatten(2).transpose(1, 2))
        sums: dict[int, Tensor] = {}
        pending: list[_Terms] = []
        for terms in _terms(rois, levels, ctx.shapes, ctx.how):
            held = sum(each.cells.numel() for each in pending)
            if pending and (terms.level != pending[0].level or held > _MOST_TERMS):
                _add_gradient(sums, pending, ctx.shapes, rows)
                pending = []
            pending.append(terms)
        if pending:
            _add_gradient(sums, pending, ctx.shapes, rows)
        grads = [
            _map(sums.get(level), grad, shape, last)
            for level, (shape, last) in enumerate(zip(ctx.shapes, ctx.channels_last, strict=True))
        ]
        return None, None, None, *grads


def _add_gradient(
    sums: dict[int, Tensor], terms: list[_Terms], shapes: list[torch.Size], rows: Tensor
) -> None:
    """Adds to a level's table of gradients what some boxes on it give.

    Args:
        sums: by level, ``(cells, C)``; the terms' level is added to it.
        terms: all of one level.
        shapes: of the feature maps.
        rows: ``(M, output cells, C)``, gradients of the output.
    """
    level = terms[0].level
    images, channels, height, width = shapes[level]
    outputs = rows.shape[1]
    cells = torch.cat([each.cells.flatten() for each in terms])
    weights = torch.cat([each.weights.flatten() for each in terms])
    sources = torch.cat(
        [
            (each.boxes.int()[:, None] * outputs + torch.arange(outputs, dtype=torch.int32))
            .view(-1, 1)
            .expand_as(each.cells)
            .flatten()
            for each in terms
        ]
    )
    # By feature cell instead of by output cell; a cell that no box reads has an empty bag.
    counts = torch.bincount(cells, minlength=images * height * width)
    order = cells.sort().indices
    gradient = F.embedding_bag(
        sources[order],
        rows.view(-1, channels),
        (counts.cumsum(0) - counts).int(),
        mode="sum",
        per_sample_weights=weights[order],
    )
    sums[level] = sums[level].add_(gradient) if level in sums else gradient


def _terms(
    rois: Tensor, levels: Tensor, shapes: Sequence[torch.Size], how: _How
) -> Iterator[_Terms]:
    """The terms of all boxes, level by level, boxes of one number of samples at a time.

    Boxes without a sample (of negative extent, where the number of samples adapts) are left out.
    """
    size, sampling_ratio = how.output_size, how.sampling_ratio
    # In torchvision's order of operations: a rounding error could change the number of samples.
    scales = rois.new_tensor(how.scales)[levels, None]
    corners = rois[:, 1:] * scales - (0.5 if how.aligned else 0.0)
    start, extent = corners[:, :2], corners[:, 2:] - corners[:, :2]
    if not how.aligned:
        extent = extent.clamp(min=1)
    bins = extent / extent.new_tensor([size[1], size[0]])
    samples = torch.full_like(bins, sampling_ratio) if sampling_ratio > 0 else bins.ceil()
    # Samples at most a cell apart share cells: n of them read n + 1. Others share none.
    close = (bins >= 0) & (bins <= samples)
    kinds, of_box = torch.cat(
        [levels[:, None].to(samples), samples, close.to(samples)], dim=1
    ).unique(dim=0, return_inverse=True)
    members = of_box.argsort(stable=True).split(
        torch.bincount(of_box, minlength=len(kinds)).tolist()
    )
    for kind, of_kind in zip(kinds.long().tolist(), members, strict=True):
        level, samples_x, samples_y, close_x, close_y = kind
        if samples_x <= 0 or samples_y <= 0:
            continue
        height, width = shapes[level][2:]
        terms_x = samples_x + 1 if close_x else 2 * samples_x
        terms_y = samples_y + 1 if close_y else 2 * samples_y
        each = terms_x * terms_y
        for boxes in of_kind.split(max(1, _MOST_TERMS // (each * size[0] * size[1]))):
            first, step = start[boxes], bins[boxes]
            x, weights_x = _axis(first[:, 0], step[:, 0], size[1], samples_x, bool(close_x), width)
            y, weights_y = _axis(first[:, 1], step[:, 1], size[0], samples_y, bool(close_y), height)
            y = y * width + (rois[boxes, 0].int() * (height * width))[:, None, None]
            cells = y[:, :, None, :, None] + x[:, None, :, None, :]
            weights = weights_y[:, :, None, :, None] * weights_x[:, None, :, None, :]
            yield _Terms(level, boxes, cells.view(-1, each), weights.view(-1, each))


def _axis(
    start: Tensor, step: Tensor, outputs: int, samples: int, close: bool, size: int
) -> tuple[Tensor, Tensor]:
    """Feature cells that each output cell reads along one axis, and the weight of each.

    Args:
        start: ``(n,)``, first edge of each box, in feature cells.
        step: ``(n,)``, extent of an output cell, in feature cells.
        outputs: output cells.
        samples: samples in each of them.
        close: whether samples are at most one feature cell apart.
        size: feature cells there are.

    Returns:
        Cells, int32, and weights, both ``(n, outputs, K)``; K is samples + 1 where they are
        close, else twice the samples. Weights of an output cell add up to the share of its
        samples that lie on the map.
    """
    output = torch.arange(outputs, dtype=step.dtype)
    sample = torch.arange(samples, dtype=step.dtype) + 0.5
    edge = start[:, None] + output * step[:, None]
    at = edge[:, :, None] + (sample * step[:, None] / samples)[:, None, :]
    on_map = (at >= -1) & (at <= size)
    at = at.clamp_(0, size - 1)
    low = at.floor()
    if close:
        read = low[:, :, :1] + torch.arange(samples + 1, dtype=step.dtype)
        # Bilinear interpolation: a cell's weight falls from 1 to 0 over one cell's distance.
        near = 1 - (at[:, :, :, None] - read[:, :, None, :]).abs_()
        weights = (near.clamp_(min=0) * on_map[:, :, :, None]).sum(dim=2)
    else:
        read = torch.stack([low, low + 1], dim=3).flatten(2)
        beyond = at - low
        weights = (torch.stack([1 - beyond, beyond], dim=3) * on_map[:, :, :, None]).flatten(2)
    return read.clamp_(max=size - 1).int(), weights / samples


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


def _map(table: Tensor | None, like: Tensor, shape: torch.Size, channels_last: bool) -> Tensor:
    """The inverse of :func:`_table`, in the layout that the level had; zeros without a table."""
    images, channels, height, width = shape
    if channels_last:
        if table is None:
            table = like.new_zeros(images * height * width, channels)
        return table.view(images, height, width, channels).permute(0, 3, 1, 2)
    if table is None:
        return like.new_zeros(shape)
    level = table.new_empty(shape)
    for of_image, rows in zip(level, table.view(images, -1, channels), strict=True):
        of_image.flatten(1).copy_(rows.t())
    return level

"""RoIAlign over a pyramid on a GPU: all levels in one launch, forward and backward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .levels import LevelRule, thresholds
from .roi_align import MOST_LEVELS

__all__ = ["pyramid_roi_align"]

_UNSPECIALISED = [f"{name}{level}" for name in "hw" for level in range(MOST_LEVELS)]
"""Sizes of maps, which vary between images: one kernel is compiled for all."""


class _Sampling(NamedTuple):
    scales: tuple[float, ...]
    output_size: tuple[int, int]
    sampling_ratio: int
    aligned: bool


def pyramid_roi_align(
    levels: Sequence[Tensor],
    rois: Tensor,
    level_of: Tensor | LevelRule,
    scales: Sequence[float],
    output_size: tuple[int, int],
    sampling_ratio: int,
    aligned: bool,
    non_finite: Tensor | None = None,
) -> Tensor:
    """:func:`.roi_align.pyramid_roi_align` of at most six levels on a GPU."""
    sampling = _Sampling(tuple(map(float, scales)), tuple(output_size), sampling_ratio, aligned)
    rois = rois.float().contiguous()
    if isinstance(level_of, Tensor):
        level_of = level_of.contiguous()
    if torch.is_grad_enabled() and any(level.requires_grad for level in levels):
        return _PyramidRoIAlign.apply(rois, level_of, non_finite, sampling, *levels)
    return _pooled(rois, level_of, non_finite, sampling, *_in_one_layout(levels))


class _PyramidRoIAlign(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rois: Tensor,
        level_of: Tensor | LevelRule,
        non_finite: Tensor | None,
        sampling: _Sampling,
        *levels: Tensor,
    ) -> Tensor:
        last, maps = _in_one_layout(levels)
        ctx.save_for_backward(rois)
        ctx.level_of, ctx.sampling, ctx.last = level_of, sampling, last
        ctx.dtype, ctx.shapes = levels[0].dtype, [level.shape for level in maps]
        return _pooled(rois, level_of, non_finite, sampling, last, maps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rois,) = ctx.saved_tensors
        layout = torch.channels_last if ctx.last else torch.contiguous_format
        # Many values are added to one cell: sums are float32.
        sums = [_empty(shape, rois, ctx.last).zero_() for shape in ctx.shapes]
        grad = grad.contiguous(memory_format=layout)
        _launch(sums, rois, ctx.level_of, None, grad, ctx.sampling, ctx.last, backward=True)
        return None, None, None, None, *(of_level.to(ctx.dtype) for of_level in sums)


def _in_one_layout(levels: Sequence[Tensor]) -> tuple[bool, Sequence[Tensor]]:
    """Whether maps are channels last, and the maps; copied if layouts are mixed or others."""
    for last, layout in ((True, torch.channels_last), (False, torch.contiguous_format)):
        if all(level.is_contiguous(memory_format=layout) for level in levels):
            return last, levels
    return True, [level.contiguous(memory_format=torch.channels_last) for level in levels]


def _empty(shape: Sequence[int], like: Tensor, last: bool) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _pooled(
    rois: Tensor,
    level_of: Tensor | LevelRule,
    non_finite: Tensor | None,
    sampling: _Sampling,
    last: bool,
    maps: Sequence[Tensor],
) -> Tensor:
    pooled = _empty((len(rois), maps[0].shape[1], *sampling.output_size), maps[0], last)
    _launch(maps, rois, level_of, non_finite, pooled, sampling, last)
    return pooled


def _launch(
    maps: Sequence[Tensor],
    rois: Tensor,
    level_of: Tensor | LevelRule,
    non_finite: Tensor | None,
    pooled: Tensor,
    sampling: _Sampling,
    last: bool,
    backward: bool = False,
) -> None:
    """Runs the kernel over all boxes and cells, from maps to ``pooled`` or, backward, to maps."""
    if pooled.numel() == 0:
        return
    channels, outputs = maps[0].shape[1], sampling.output_size[0] * sampling.output_size[1]
    # 1,024 values a program, next to each other in memory as far as the layout allows.
    if last:
        block = min(triton.next_power_of_2(channels), 256)
        cells = min(1024 // block, triton.next_power_of_2(outputs))
    else:
        cells = min(triton.next_power_of_2(outputs), 64)
        block = min(1024 // cells, triton.next_power_of_2(channels))
    each = [*range(len(maps)), *[0] * (MOST_LEVELS - len(maps))]
    by_rule, steps = isinstance(level_of, LevelRule), [math.inf] * MOST_LEVELS
    if by_rule:
        # Torch divides a tensor on a GPU by a number in this way.
        steps[0] = float(1 / np.float32(level_of.canonical_box_size))
        steps[1 : len(maps)] = thresholds(level_of, rois.device)
    _align[(len(rois) * triton.cdiv(outputs, cells), triton.cdiv(channels, block))](
        *(maps[level] for level in each),
        *(maps[level].shape[2] for level in each),
        *(maps[level].shape[3] for level in each),
        *(sampling.scales[level] for level in each),
        *steps,
        rois,
        rois if by_rule else level_of,
        rois if non_finite is None else non_finite,
        pooled,
        BY_RULE=by_rule,
        CHECKED=non_finite is not None,
        C=channels,
        PH=sampling.output_size[0],
        PW=sampling.output_size[1],
        RATIO=sampling.sampling_ratio,
        ALIGNED=sampling.aligned,
        LAST=last,
        CELLS=cells,
        BLOCK=block,
        BACKWARD=backward,
        num_warps=4,
        # With a product and a sum rounded once, coordinates and samples could differ.
        enable_fp_fusion=False,
    )


@triton.jit
def _pick(level, of0, of1, of2, of3, of4, of5):
    """The value of a level."""
    of0 = tl.where(level == 1, of1, of0)
    of0 = tl.where(level == 2, of2, of0)
    of0 = tl.where(level == 3, of3, of0)
    of0 = tl.where(level == 4, of4, of0)
    return tl.where(level == 5, of5, of0)


@triton.jit
def _size(left, top, right, bottom):
    """sqrt(w h) of Eq. (1), as :func:`.levels.levels_of` computes it."""
    width = tl.minimum(tl.maximum(right, -1e18), 1e18) - tl.minimum(tl.maximum(left, -1e18), 1e18)
    height = tl.minimum(tl.maximum(bottom, -1e18), 1e18) - tl.minimum(tl.maximum(top, -1e18), 1e18)
    return tl.sqrt_rn(tl.maximum(width, 0.0) * tl.maximum(height, 0.0))


@triton.jit
def _extent(begin, end, scale, OUTPUTS: tl.constexpr, RATIO: tl.constexpr, ALIGNED: tl.constexpr):
    """First edge of a box along an axis, extent of an output cell, both in feature cells, and the
    number of samples in it, in torchvision's order of operations.
    """
    begin = begin * scale
    end = end * scale
    if ALIGNED:
        begin = begin - 0.5
        end = end - 0.5
    extent = end - begin
    if not ALIGNED:
        extent = tl.maximum(extent, 1.0)
    step = tl.div_rn(extent, OUTPUTS * 1.0)
    samples = tl.ceil(step)
    if RATIO > 0:
        samples = samples * 0.0 + RATIO
    return begin, step, samples


@triton.jit
def _between(begin, step, cell, sample, samples, size):
    """The two feature cells around a sample, their weights, and whether it counts."""
    # Rounded as torchvision's kernel is by its compiler.
    at = tl.fma(cell.to(tl.float32), step, begin) + tl.div_rn((sample + 0.5) * step, samples)
    counted = (at >= -1.0) & (at <= size)
    at = tl.minimum(tl.maximum(at, 0.0), size - 1.0)
    low = tl.floor(at)
    beyond = at - low
    low = low.to(tl.int32)
    return low, tl.minimum(low + 1, size - 1), 1.0 - beyond, beyond, counted


@triton.jit(do_not_specialize=_UNSPECIALISED)
def _align(
    p0, p1, p2, p3, p4, p5,
    h0, h1, h2, h3, h4, h5,
    w0, w1, w2, w3, w4, w5,
    s0, s1, s2, s3, s4, s5,
    inverse, t1, t2, t3, t4, t5,
    rois, level_of, non_finite, pooled,
    BY_RULE: tl.constexpr, CHECKED: tl.constexpr,
    C: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, RATIO: tl.constexpr,
    ALIGNED: tl.constexpr, LAST: tl.constexpr, CELLS: tl.constexpr, BLOCK: tl.constexpr,
    BACKWARD: tl.constexpr,
):  # fmt: skip
    """Some channels of some output cells of one box: means of the maps' samples to ``pooled`` or,
    backward, ``pooled`` shared among the samples' cells.
    """
    blocks: tl.constexpr = (PH * PW + CELLS - 1) // CELLS
    roi = tl.program_id(0) // blocks
    cell = (tl.program_id(0) % blocks * CELLS + tl.arange(0, CELLS))[:, None]
    channel = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    there = (cell < PH * PW) & (channel < C)

    left = tl.load(rois + roi * 5 + 1)
    top = tl.load(rois + roi * 5 + 2)
    right_edge = tl.load(rois + roi * 5 + 3)
    bottom = tl.load(rois + roi * 5 + 4)
    # 0, or NaN if a coordinate is not finite: such a box has no samples.
    unknown = left * 0.0 + top * 0.0 + right_edge * 0.0 + bottom * 0.0
    if CHECKED:
        tl.store(non_finite, 1, mask=unknown != 0)
    if BY_RULE:
        size = _size(left, top, right_edge, bottom) * inverse + 1e-8
        level = (size >= t1).to(tl.int32) + (size >= t2).to(tl.int32) + (size >= t3).to(tl.int32)
        level += (size >= t4).to(tl.int32) + (size >= t5).to(tl.int32)
    else:
        level = tl.load(level_of + roi)
    height = _pick(level, h0, h1, h2, h3, h4, h5)
    width = _pick(level, w0, w1, w2, w3, w4, w5)
    scale = _pick(level, s0, s1, s2, s3, s4, s5)
    image = tl.load(rois + roi * 5).to(tl.int64)
    maps = _pick(level, p0, p1, p2, p3, p4, p5) + image * (height * width) * C
    if LAST:
        maps = maps + channel
        right: tl.constexpr = C  # to the next feature cell in memory
    else:
        maps = maps + channel * (height * width)
        right: tl.constexpr = 1
    pooled = pooled + roi.to(tl.int64) * (PH * PW * C)
    pooled = pooled + (cell * C + channel if LAST else channel * (PH * PW) + cell)

    begin_x, step_x, samples_x = _extent(left, right_edge, scale, PW, RATIO, ALIGNED)
    begin_y, step_y, samples_y = _extent(top, bottom, scale, PH, RATIO, ALIGNED)
    count = tl.maximum(samples_y * samples_x, 1.0)
    most_y = tl.where(unknown == 0, samples_y, 0.0).to(tl.int32)
    most_x = tl.where(unknown == 0, samples_x, 0.0).to(tl.int32)

    if BACKWARD:
        value = tl.load(pooled, mask=there, other=0.0).to(tl.float32) / count
    else:
        value = tl.zeros([CELLS, BLOCK], dtype=tl.float32)
    for iy in range(0, most_y):
        y, next_y, near_y, far_y, in_y = _between(
            begin_y, step_y, cell // PW, iy, samples_y, height
        )
        for ix in range(0, most_x):
            x, next_x, near_x, far_x, in_x = _between(
                begin_x, step_x, cell % PW, ix, samples_x, width
            )
            read = there & in_y & in_x
            nn = maps + (y * width + x) * right
            nf = maps + (y * width + next_x) * right
            fn = maps + (next_y * width + x) * right
            ff = maps + (next_y * width + next_x) * right
            if BACKWARD:
                tl.atomic_add(nn, value * (near_y * near_x), mask=read, sem="relaxed")
                read_x = read & (far_x > 0)
                read_y = read & (far_y > 0)
                tl.atomic_add(nf, value * (near_y * far_x), mask=read_x, sem="relaxed")
                tl.atomic_add(fn, value * (far_y * near_x), mask=read_y, sem="relaxed")
                tl.atomic_add(ff, value * (far_y * far_x), mask=read_y & read_x, sem="relaxed")
            else:
                # All four are loaded before the first is needed.
                nn = tl.load(nn, mask=read, other=0.0).to(tl.float32)
                nf = tl.load(nf, mask=read, other=0.0).to(tl.float32)
                fn = tl.load(fn, mask=read, other=0.0).to(tl.float32)
                ff = tl.load(ff, mask=read, other=0.0).to(tl.float32)
                value = tl.fma(nn, near_y * near_x, value)
                value = tl.fma(nf, near_y * far_x, value)
                value = tl.fma(fn, far_y * near_x, value)
                value = tl.fma(ff, far_y * far_x, value)
    if not BACKWARD:
        value = value / count + unknown
        tl.store(pooled, value.to(pooled.dtype.element_ty), mask=there)

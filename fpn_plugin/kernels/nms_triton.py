"""Greedy suppression on a GPU: overlaps as bits, then one scan of each list."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["nms_mask"]

_WORD = 64  # boxes whose overlaps with one are the bits of an int64


def nms_mask(boxes: Tensor, valid: Tensor, threshold: float, groups: Tensor | None) -> Tensor:
    """The first result of :func:`.nms.nms_mask`, always exact."""
    lists, length = valid.shape
    keep = torch.empty_like(valid, memory_format=torch.contiguous_format)
    if keep.numel() == 0:
        return keep
    blocks = triton.cdiv(length, _WORD)
    # [.., i, k]: which of boxes 64 k ... 64 k + 63 come after box i and overlap it.
    words = torch.empty((lists, blocks * _WORD, blocks), dtype=torch.int64, device=boxes.device)
    boxes = boxes.float().contiguous()
    grouped = groups is not None
    groups = groups.contiguous() if grouped else boxes
    _overlaps[(blocks, blocks, lists)](
        boxes,
        groups,
        words,
        length,
        blocks,
        threshold,
        GROUPED=grouped,
        WORD=_WORD,
        num_warps=4,
        enable_fp_fusion=False,  # torchvision's arithmetic
    )
    most = triton.next_power_of_2(blocks)
    _scan[(lists,)](
        words,
        valid.contiguous(),
        keep,
        length,
        blocks,
        WORD=_WORD,
        MOST=most,
        num_warps=min(max(most // 16, 1), 16),
    )
    return keep


@triton.jit
def _or(a, b):
    return a | b


@triton.jit(do_not_specialize=["length", "blocks"])
def _overlaps(
    boxes, groups, words, length, blocks, threshold,
    GROUPED: tl.constexpr, WORD: tl.constexpr,
):  # fmt: skip
    """Which of 64 boxes overlap which of 64 others that come after them."""
    first = tl.program_id(0)
    second = tl.program_id(1)
    if second >= first:
        at = tl.program_id(2).to(tl.int64) * length
        i = first * WORD + tl.arange(0, WORD)
        j = second * WORD + tl.arange(0, WORD)
        # Boxes i next to each other: their words are sums within threads.
        a = boxes + (at + i) * 4
        b = boxes + (at + j) * 4
        x0 = tl.load(a, mask=i < length, other=0.0)[None, :]
        y0 = tl.load(a + 1, mask=i < length, other=0.0)[None, :]
        x1 = tl.load(a + 2, mask=i < length, other=0.0)[None, :]
        y1 = tl.load(a + 3, mask=i < length, other=0.0)[None, :]
        u0 = tl.load(b, mask=j < length, other=0.0)[:, None]
        v0 = tl.load(b + 1, mask=j < length, other=0.0)[:, None]
        u1 = tl.load(b + 2, mask=j < length, other=0.0)[:, None]
        v1 = tl.load(b + 3, mask=j < length, other=0.0)[:, None]
        width = tl.maximum(tl.minimum(x1, u1) - tl.maximum(x0, u0), 0.0)
        height = tl.maximum(tl.minimum(y1, v1) - tl.maximum(y0, v0), 0.0)
        common = width * height
        union = (x1 - x0) * (y1 - y0) + (u1 - u0) * (v1 - v0) - common
        hit = (tl.div_rn(common, union) > threshold) & (i[None, :] < j[:, None])
        if GROUPED:
            of_a = tl.load(groups + at + i, mask=i < length, other=0)
            of_b = tl.load(groups + at + j, mask=j < length, other=0)
            hit = hit & (of_a[None, :] == of_b[:, None])
        bits = tl.full([WORD], 1, tl.int64) << tl.arange(0, WORD).to(tl.int64)
        word = tl.sum(tl.where(hit, bits[:, None], 0), axis=0)
        row = tl.program_id(2).to(tl.int64) * blocks * WORD + i
        tl.store(words + row * blocks + second, word)


@triton.jit(do_not_specialize=["length", "blocks"])
def _scan(words, valid, keep, length, blocks, WORD: tl.constexpr, MOST: tl.constexpr):
    """Scans one list, 64 boxes at a time; the bits of ``gone`` are the suppressed boxes."""
    at = tl.program_id(0).to(tl.int64)
    words += at * blocks * WORD * blocks
    valid += at * length
    keep += at * length
    lane = tl.arange(0, WORD)
    block = tl.arange(0, MOST)
    gone = tl.zeros([MOST], dtype=tl.int64)
    own = tl.load(words + lane * blocks)
    for k in range(0, blocks):
        i = k * WORD + lane
        # Which box of the next 64 overlaps which of them; loaded before it is needed.
        later = tl.load(
            words + (i + WORD) * blocks + k + 1, mask=lane * 0 + k + 1 < blocks, other=0
        )
        hidden = tl.sum(tl.where(block == k, gone, 0), axis=0)
        alive = tl.load(valid + i, mask=i < length, other=0) != 0
        alive = alive & (((hidden >> lane) & 1) == 0)
        # kept = alive and not suppressed by a kept box: true of the greedy set only. After n
        # rounds the first n boxes are right, after a round without change all.
        kept = alive
        before = tl.sum(lane.to(tl.int64) * 0, axis=0)
        hidden = tl.reduce(tl.where(kept, own, 0), 0, _or)
        while hidden != before:
            kept = alive & (((hidden >> lane) & 1) == 0)
            before = hidden
            hidden = tl.reduce(tl.where(kept, own, 0), 0, _or)
        tl.store(keep + i, kept, mask=i < length)
        rows = words + i[:, None] * blocks + block[None, :]
        read = kept[:, None] & (block > k)[None, :] & (block < blocks)[None, :]
        gone = gone | tl.reduce(tl.load(rows, mask=read, other=0), 0, _or)
        own = later

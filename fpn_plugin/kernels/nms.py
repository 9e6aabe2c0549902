"""Non-maximum suppression of many lists of boxes at once, exactly greedy."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torchvision import ops

from .fallback import triton_or_plain

__all__ = ["nms_fixpoint", "nms_mask"]


@torch.compiler.disable
@torch.no_grad()
def nms_mask(
    boxes: Tensor, valid: Tensor, threshold: float, groups: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Which boxes greedy suppression keeps, of B lists at once.

    A box is kept unless a box before it in its list is kept and overlaps it by more than
    ``threshold``. This is torchvision's ``nms``, in the arithmetic of its operator for CPUs.
    Nothing waits for a GPU, and all shapes are fixed, so that a CUDA graph can contain it.

    Args:
        boxes: float32 ``(B, K, 4)`` XYXY, each list in order of falling score.
        valid: bool ``(B, K)``; boxes that are not valid are not kept and suppress none.
        threshold: largest intersection over union that two kept boxes may have.
        groups: int ``(B, K)``: only boxes of one group suppress each other; None for one group.

    Returns:
        Bool ``(B, K)``, the boxes kept; and bool ``(B,)``, whether that is exact. Only
        :func:`nms_fixpoint`, which is used on a GPU without Triton, may not be.
    """
    if boxes.device.type == "cpu":
        return _one_by_one(boxes, valid, threshold, groups)

    def kernel() -> tuple[Tensor, Tensor]:
        from . import nms_triton

        keep = nms_triton.nms_mask(boxes, valid, rounded_down(threshold), groups)
        return keep, valid.new_ones(len(valid))

    def plain() -> tuple[Tensor, Tensor]:
        return nms_fixpoint(boxes, valid, threshold, groups)

    return triton_or_plain(boxes, kernel, plain)


@torch.no_grad()
def nms_fixpoint(
    boxes: Tensor, valid: Tensor, threshold: float, groups: Tensor | None = None, rounds: int = 24
) -> tuple[Tensor, Tensor]:
    """:func:`nms_mask` in plain torch, on any device: a fixpoint, searched in at most ``rounds``.

    Greedy suppression keeps the only set with this property: a box is in it if no earlier box of
    the set overlaps it. The search begins with all boxes. After n rounds, a box is right if its
    chain of suppressors is no longer than n. A round without change has found the set; if the last
    one changes something, the result is not exact.
    """
    x0, y0, x1, y1 = boxes.float().unbind(2)
    area = (x1 - x0) * (y1 - y0)
    width = (_pairs(torch.minimum, x1) - _pairs(torch.maximum, x0)).clamp_(min=0)
    height = (_pairs(torch.minimum, y1) - _pairs(torch.maximum, y0)).clamp_(min=0)
    common = width * height
    overlap = common / (_pairs(torch.add, area) - common) > rounded_down(threshold)
    if groups is not None:
        overlap &= _pairs(torch.eq, groups)
    # [.., i, j]: box j, before box i, suppresses it. Half precision: sums need not be exact.
    dtype = torch.float16 if boxes.is_cuda else torch.float32
    suppresses = overlap.tril(-1).to(dtype)
    keep = before = valid
    for _ in range(rounds):
        before = keep
        keep = valid & ~(torch.matmul(suppresses, keep.to(dtype)[:, :, None])[:, :, 0] > 0)
    return keep, (keep == before).all(dim=1)


def rounded_down(threshold: float) -> float:
    """The largest float32 that is no larger than the threshold.

    torchvision compares float32 overlaps with a float64 threshold; this one gives the same results.
    """
    nearest = np.float32(threshold)
    if float(nearest) > threshold:
        nearest = np.nextafter(nearest, np.float32(-np.inf))
    return float(nearest)


def _pairs(function: Callable[[Tensor, Tensor], Tensor], values: Tensor) -> Tensor:
    """A function of all pairs of values of a list: ``(B, K, K)``."""
    return function(values[:, :, None], values[:, None, :])


def _one_by_one(
    boxes: Tensor, valid: Tensor, threshold: float, groups: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The fastest way on a CPU: torchvision's operator, list after list."""
    keep = torch.zeros_like(valid)
    falling = -torch.arange(valid.shape[1], dtype=torch.float32)
    for row in range(len(valid)):
        if groups is None:
            parts = [valid[row]]
        else:
            there = groups[row][valid[row]].unique()
            parts = [valid[row] & (groups[row] == group) for group in there]
        for part in parts:
            members = part.nonzero()[:, 0]
            kept = ops.nms(boxes[row, members].float(), falling[members], threshold)
            keep[row, members[kept]] = True
    return keep, valid.new_ones(len(valid))

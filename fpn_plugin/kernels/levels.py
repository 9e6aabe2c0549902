"""Eq. (1) in plain torch, and as thresholds that a kernel compares sizes with."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["LevelRule", "levels_of", "thresholds"]

_STEPS = 256  # float32 numbers below a power of two, of which log2 may round to the next level


class LevelRule(NamedTuple):
    """The constants of Eq. (1), and the levels of the pyramid."""

    min_level: int
    max_level: int
    canonical_box_size: float
    canonical_level: int


def levels_of(
    boxes: Tensor, min_level: int, max_level: int, canonical_box_size: float, canonical_level: int
) -> Tensor:
    """:func:`fpn_plugin.modeling.levels.assign_levels` for a tensor of finite coordinates.

    ``(N, 5)`` are rotated boxes: centre x and y, width, height, angle.
    """
    # Beyond 1e18 px an area would overflow float32, and infinity times zero is NaN.
    boxes = boxes.float().clamp(-1e18, 1e18)
    if boxes.shape[1] == 5:
        width, height = boxes[:, 2], boxes[:, 3]
    else:
        width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    size = (width.clamp(min=0) * height.clamp(min=0)).sqrt()
    # The 1e-8 keeps size 0 off log2(0), and the rounding Detectron2's.
    level = torch.floor(canonical_level + torch.log2(size / canonical_box_size + 1e-8))
    return level.clamp(min_level, max_level).to(torch.int64)


@functools.lru_cache
def thresholds(rule: LevelRule, device: torch.device) -> list[float]:
    """For each level but the finest, the least x = size / s0 + 1e-8 that :func:`levels_of` puts on
    it or on a coarser one; float32, of a device's own log2.

    It lies a few roundings below a power of two.
    """
    k0, found = rule.canonical_level, []
    for level in range(rule.min_level + 1, rule.max_level + 1):
        power = torch.tensor(math.ldexp(1.0, level - k0), device=device)
        below = power.view(torch.int32) - torch.arange(_STEPS, device=device, dtype=torch.int32)
        x = below.view(torch.float32)
        found.append(x[torch.floor(k0 + torch.log2(x)) >= level].min().item())
    return found

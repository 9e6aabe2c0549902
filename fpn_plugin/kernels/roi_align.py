"""RoIAlign of boxes on the levels of a pyramid, on every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from . import roi_align_cpu
from .fallback import triton_or_plain, triton_runs
from .levels import LevelRule, levels_of

__all__ = ["pays", "pyramid_roi_align", "pyramid_roi_align_by_level"]

MOST_LEVELS = 6  # of the kernel
_KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@torch.compiler.disable
def pyramid_roi_align(
    levels: Sequence[Tensor],
    rois: Tensor,
    level_of: Tensor | LevelRule,
    scales: Sequence[float],
    output_size: tuple[int, int],
    sampling_ratio: int = 0,
    aligned: bool = True,
    non_finite: Tensor | None = None,
) -> Tensor:
    """:func:`torchvision.ops.roi_align` of each box on its level.

    On a GPU one kernel launch reads maps of float32, float16 or bfloat16 without a copy, channels
    last or not, and computes in float32. Nothing waits for the device, so that a CUDA graph can
    contain it. The backward pass is one launch too and, as torchvision's, adds in any order. With
    :func:`torch.use_deterministic_algorithms` torchvision's deterministic operator is used. On a
    CPU see :mod:`.roi_align_cpu`. On other devices, without Triton, and in float64 it is
    :func:`pyramid_roi_align_by_level`.

    Args:
        levels: one ``(N, C, H, W)`` map per level, finest first, all of one dtype.
        rois: ``(M, 5)``: image index and XYXY in pixels of the network's input; float32, or
            float64 for maps of float64.
        level_of: ``(M,)``, int: an index into ``levels`` for each box; or Eq. (1), by which the
            kernel finds it.
        scales: feature cells per pixel, of each level.
        output_size: height and width of the output, in cells.
        sampling_ratio: samples per output cell and axis, 0 for as many as there are feature
            cells.
        aligned: whether cell centres lie at half pixels (ROIAlignV2).
        non_finite: int32 ``(1,)`` in pinned memory of the host, or on the device. It becomes 1 if
            a coordinate is not finite.

    Returns:
        ``(M, C, *output_size)`` in the maps' dtype; on a GPU channels last if the maps are. A
        box with a coordinate that is not finite gives NaN. Only the maps get gradients.
    """
    arguments = (scales, output_size, sampling_ratio, aligned)

    def kernel() -> Tensor:
        from . import roi_align_triton

        return roi_align_triton.pyramid_roi_align(levels, rois, level_of, *arguments, non_finite)

    def plain() -> Tensor:
        if non_finite is not None and not torch.isfinite(rois).all():
            non_finite.fill_(1)
        return pyramid_roi_align_by_level(levels, rois, level_of, *arguments)

    if not pays(levels, len(rois)):
        return plain()
    if levels[0].is_cuda:
        return triton_or_plain(levels[0], kernel, plain)
    if not torch.isfinite(rois).all():
        return plain()
    exact = torch.promote_types(levels[0].dtype, torch.float32)
    maps = [level.to(exact) for level in levels]
    pooled = roi_align_cpu.pyramid_roi_align(
        maps, rois.to(exact), _indices(rois, level_of), *arguments
    )
    return pooled.to(levels[0].dtype)


def pays(levels: Sequence[Tensor], boxes: int) -> bool:
    """Whether :func:`pyramid_roi_align` is faster than torchvision's operator, level after level.

    Args:
        levels: the maps.
        boxes: how many boxes there are.
    """
    if levels[0].is_cuda:
        return (
            len(levels) <= MOST_LEVELS
            and levels[0].dtype in _KERNEL_DTYPES
            and not torch.are_deterministic_algorithms_enabled()
            and triton_runs(levels[0])
        )
    if levels[0].device.type != "cpu":
        return False
    if all(level.is_contiguous(memory_format=torch.channels_last) for level in levels):
        return True
    # Other maps are copied first. For 500 to 1,000 cells that takes as long as torchvision's
    # operator takes for a box.
    return boxes * 500 >= sum(level[:, 0].numel() for level in levels)


def pyramid_roi_align_by_level(
    levels: Sequence[Tensor],
    rois: Tensor,
    level_of: Tensor | LevelRule,
    scales: Sequence[float],
    output_size: tuple[int, int],
    sampling_ratio: int = 0,
    aligned: bool = True,
) -> Tensor:
    """:func:`pyramid_roi_align` by torchvision's operator, level after level, on any device.

    Boxes of other levels are made empty, so that shapes do not depend on the boxes and nothing
    waits for a device.
    """
    level_of = _indices(rois, level_of)
    exact = torch.promote_types(levels[0].dtype, torch.float32)
    rois = rois.to(exact)
    finite = torch.isfinite(rois).all(dim=1, keepdim=True)
    rois = torch.where(finite, rois, 0.0)
    if sampling_ratio == 0:
        # A box turned around has no samples; torchvision's operator fails on it on a CPU.
        rois = torch.cat([rois[:, :3], torch.maximum(rois[:, 1:3], rois[:, 3:])], dim=1)
    empty = F.pad(rois[:, :1], (0, 4))
    pooled = levels[0].new_zeros((len(rois), levels[0].shape[1], *output_size), dtype=exact)
    for index, (level, scale) in enumerate(zip(levels, scales, strict=True)):
        here = (level_of == index)[:, None]
        boxes = torch.where(here, rois, empty)
        of_level = roi_align(level.to(exact), boxes, output_size, scale, sampling_ratio, aligned)
        pooled = torch.where(here[:, :, None, None], of_level, pooled)
    return pooled.masked_fill(~finite[:, :, None, None], torch.nan).to(levels[0].dtype)


def _indices(rois: Tensor, level_of: Tensor | LevelRule) -> Tensor:
    if isinstance(level_of, LevelRule):
        return levels_of(rois[:, 1:], *level_of) - level_of.min_level
    return level_of.long()

"""PyramidROIPooler: regions pooled from the level that Eq. (1) names (paper, section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor

from fpn_plugin.errors import UserError, near_names

from .levels import check_finite, levels_of
from .roi_align import pyramid_roi_align

__all__ = ["PyramidROIPooler"]

_POOLER_TYPES = ("ROIAlign", "ROIAlignV2", "ROIPool", "ROIAlignRotated")


class PyramidROIPooler(ROIPooler):
    """Pools each box from one level of a feature pyramid; may stand wherever ROIPooler does.

    Same constructor and call as :class:`detectron2.modeling.poolers.ROIPooler`, same values and
    gradients, on a CPU up to the order of summation. Beyond it:

    * ROIAlign on a CPU is vectorised and uses all threads, see :mod:`.roi_align`;
    * non-square output over several levels;
    * box coordinates are never rounded to the features' dtype: where features are float16 or
      bfloat16, pooling is done in float32 and its result returned in the features' dtype;
    * NaN and infinite coordinates are an error, not a row of zeros; in a trace and in an exported
      program, which cannot raise one, a row of NaN.

    Args:
        output_size: height and width of the pooled region, in cells; one int for both.
        scales: 1 / stride of each feature map, finest first: 1/4, 1/8, ...
        sampling_ratio: of ROIAlign: samples per output cell and axis, 0 for as many as there are
            feature cells.
        pooler_type: "ROIAlign", "ROIAlignV2", "ROIPool" or "ROIAlignRotated".
        canonical_box_size: s0 of Eq. (1), in pixels of the network's input.
        canonical_level: k0 of Eq. (1).

    Raises:
        UserError: an argument that is none of these.

    Example::

        >>> pooler = PyramidROIPooler(7, [1 / 4, 1 / 8], 0, "ROIAlignV2")
        >>> features = [torch.rand(1, 16, 64, 64), torch.rand(1, 16, 32, 32)]
        >>> pooler(features, [Boxes(torch.tensor([[8.0, 8, 90, 70]]))]).shape
        torch.Size([1, 16, 7, 7])
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        scales: Sequence[float],
        sampling_ratio: int,
        pooler_type: str,
        canonical_box_size: float = 224,
        canonical_level: int = 4,
    ) -> None:
        sides = (output_size,) * 2 if isinstance(output_size, int) else tuple(output_size)
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise UserError(
                f"`output_size` is {output_size!r}; it must be a positive int or two of them"
            )
        if pooler_type not in _POOLER_TYPES:
            raise UserError(
                f"`pooler_type` {pooler_type!r} is unknown: "
                f"{near_names(str(pooler_type), _POOLER_TYPES)}"
            )
        levels = [-math.log2(scale) if scale > 0 else math.nan for scale in scales]
        pyramid = [levels[0] + i for i in range(len(levels))] if levels else [math.nan]
        if levels != pyramid or levels[0] != int(levels[0]) or levels[0] < 0:
            strides = [1 / scale if scale > 0 else math.inf for scale in scales]
            raise UserError(
                f"`scales` of feature maps of strides {strides} are not a pyramid: strides must "
                "be powers of 2, each twice the one before"
            )
        if not canonical_box_size > 0:
            raise UserError(f"`canonical_box_size` is {canonical_box_size}; it must be above 0")
        super().__init__(
            sides, scales, sampling_ratio, pooler_type, canonical_box_size, canonical_level
        )

    # torch.jit.script takes one kind of boxes: of RotatedBoxes only the docstring speaks.
    def forward(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        """Pools every box of every image.

        Args:
            x: one ``(N, C, H, W)`` map per scale, finest first.
            box_lists: N entries, the boxes of each image, in pixels of the network's input;
                ``RotatedBoxes`` for "ROIAlignRotated".

        Returns:
            ``(M, C, *output_size)`` in the features' dtype; M boxes, in the order given.

        Raises:
            UserError: maps or images do not fit the pooler or each other.
            NonFiniteError: a coordinate is NaN or infinite.
        """
        if torch.jit.is_scripting():
            return self._pool_in_a_graph(x, [boxes.tensor for boxes in box_lists])
        return self._pool(x, box_lists)

    @torch.jit.unused
    def _pool(self, x: list[Tensor], box_lists: list[Boxes]) -> Tensor:
        if torch.jit.is_tracing() or _is_exporting():
            return self._pool_in_a_graph(x, [boxes.tensor for boxes in box_lists])
        if len(x) != len(self.level_poolers):
            raise UserError(
                f"got {len(x)} feature maps, but this pooler was built for "
                f"{len(self.level_poolers)} levels, p{self.min_level} to p{self.max_level}"
            )
        if len(box_lists) != x[0].shape[0]:
            raise UserError(f"got boxes of {len(box_lists)} images and features of {x[0].shape[0]}")
        dtype = x[0].dtype
        # Half precision would move a corner by up to a pixel, bfloat16 by four.
        x = [level.to(torch.promote_types(level.dtype, torch.float32)) for level in x]
        if len(box_lists) == 0:
            return x[0].new_zeros((0, x[0].shape[1], *self.output_size), dtype=dtype)

        rois = _with_image_indices([boxes.tensor for boxes in box_lists]).to(x[0].dtype)
        if len(x) == 1:
            check_finite(rois[:, 1:])
            levels = rois.new_zeros(len(rois), dtype=torch.int64)
            counts = [len(rois)]
        else:
            levels, counts = self._levels_and_counts(rois)
        if self._is_fast_on_cpu(x, len(rois)):
            pooled = self._pool_on_cpu(x, rois, levels)
        else:
            pooled = self._pool_by_level(x, rois, levels, counts)
        return pooled.to(dtype)

    def _pool_in_a_graph(self, x: list[Tensor], boxes: list[Tensor]) -> Tensor:
        """For scripts, traces and exported programs: nothing of it is decided in Python."""
        dtype = x[0].dtype
        if dtype != torch.float64:
            x = [level.float() for level in x]
        rois = _with_image_indices(boxes).to(x[0].dtype)
        if torch.jit.is_scripting():
            check_finite(rois[:, 1:])
        finite = torch.isfinite(rois).all(dim=1)
        size = float(self.canonical_box_size)
        levels = levels_of(rois[:, 1:], self.min_level, self.max_level, size, self.canonical_level)
        shape = (1, x[0].shape[1], self.output_size[0], self.output_size[1])
        pooled = torch.full_like(rois[:, 0], math.nan)[:, None, None, None].repeat(shape)
        for i, pool in enumerate(self.level_poolers):
            of_level = (finite & (levels == self.min_level + i)).nonzero()[:, 0]
            pooled = pooled.index_put((of_level,), pool(x[i], rois[of_level]))
        return pooled.to(dtype)

    def _levels_and_counts(self, rois: Tensor) -> tuple[Tensor, list[int]]:
        """Indices of levels, and how many boxes each has: one transfer from the device."""
        levels = levels_of(
            rois[:, 1:],
            self.min_level,
            self.max_level,
            self.canonical_box_size,
            self.canonical_level,
        )
        levels -= self.min_level
        indices = torch.arange(len(self.level_poolers), device=levels.device)
        per_level = (levels[:, None] == indices).sum(dim=0)
        finite = torch.isfinite(rois[:, 1:]).all()
        *counts, all_finite = torch.cat([per_level, finite.view(1).to(per_level)]).tolist()
        if not all_finite:
            check_finite(rois[:, 1:])
        return levels, counts

    def _is_fast_on_cpu(self, x: list[Tensor], boxes: int) -> bool:
        if x[0].device.type != "cpu" or not isinstance(self.level_poolers[0], ROIAlign):
            return False
        if all(level.is_contiguous(memory_format=torch.channels_last) for level in x):
            return True
        # Maps in the usual layout are copied first, which takes as long per 500 to 1,000 cells as
        # torchvision's operator takes for a box.
        return boxes * 500 >= sum(level[:, 0].numel() for level in x)

    def _pool_on_cpu(self, x: list[Tensor], rois: Tensor, levels: Tensor) -> Tensor:
        align = self.level_poolers[0]
        return pyramid_roi_align(
            x,
            rois,
            levels,
            align.output_size,
            [pool.spatial_scale for pool in self.level_poolers],
            align.sampling_ratio,
            align.aligned,
        )

    def _pool_by_level(
        self, x: list[Tensor], rois: Tensor, levels: Tensor, counts: list[int]
    ) -> Tensor:
        if len(x) == 1:
            return self.level_poolers[0](x[0], rois)
        # Boxes in order of their level, so that the counts say where each level's boxes lie. A
        # level without boxes is pooled too: its parameters then get a zero gradient instead of
        # none, which distributed training waits for.
        order = torch.argsort(levels, stable=True)
        pooled = [
            pool(features, of_level)
            for pool, features, of_level in zip(
                self.level_poolers, x, rois[order].split(counts), strict=True
            )
        ]
        return torch.cat(pooled)[torch.argsort(order)]


def _with_image_indices(boxes: list[Tensor]) -> Tensor:
    """``(M, 5)`` or, rotated, ``(M, 6)``: the image's index before each box."""
    rois = []
    for image, of_image in enumerate(boxes):
        rois.append(torch.cat([torch.full_like(of_image[:, :1], image), of_image], dim=1))
    return torch.cat(rois)


def _is_exporting() -> bool:
    # Of torch 2.3 only this is known, which compiling says too.
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()

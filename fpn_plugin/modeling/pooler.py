"""PyramidROIPooler: regions pooled from the level that Eq. (1) names (paper, section 4.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from torch import Tensor
from torch.nn import functional as F

from fpn_plugin.errors import UserError, near_names
from fpn_plugin.kernels import pays, pyramid_roi_align
from fpn_plugin.kernels.levels import LevelRule, levels_of

from .levels import check_finite, non_finite_flag

__all__ = ["PyramidROIPooler"]

_POOLER_TYPES = ("ROIAlign", "ROIAlignV2", "ROIPool", "ROIAlignRotated")


class PyramidROIPooler(ROIPooler):
    """Pools each box from one level of a feature pyramid; replaces ROIPooler anywhere.

    Constructor, call, values and gradients are those of
    :class:`detectron2.modeling.poolers.ROIPooler`, up to the order of summation. In addition:

    * ROIAlign is one kernel over all levels on a GPU, where nothing waits for the device, and
      vectorised on a CPU, see :mod:`fpn_plugin.kernels`;
    * output over several levels need not be square;
    * box coordinates are never rounded to the features' dtype: for float16 or bfloat16, sums are
      float32 and the result has the features' dtype;
    * NaN and infinite coordinates are an error, not a row of zeros. On a GPU they give a row of
      NaN, and the error comes when it is known without a wait: from the plugin's RoI heads at the
      end of the same inference, otherwise from the next call. A trace, an exported program and a
      CUDA graph cannot raise it: they only give the row of NaN.

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

    # torch.jit.script takes one type of boxes, so RotatedBoxes are not in the annotation.
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
        if len(box_lists) == 0:
            return x[0].new_zeros((0, x[0].shape[1], *self.output_size))
        # Half precision would move a corner by up to a pixel, bfloat16 by four.
        exact = torch.promote_types(dtype, torch.float32)
        rois = _with_image_indices([boxes.tensor for boxes in box_lists]).to(exact)
        if isinstance(self.level_poolers[0], ROIAlign) and pays(x, len(rois)):
            return self._pool_at_once(x, rois)
        if len(x) == 1:
            check_finite(rois[:, 1:])
            levels = rois.new_zeros(len(rois), dtype=torch.int64)
            counts = [len(rois)]
        else:
            levels, counts = self._levels_and_counts(rois)
        x = [level.to(exact) for level in x]
        return self._pool_by_level(x, rois, levels, counts).to(dtype)

    def _pool_in_a_graph(self, x: list[Tensor], boxes: list[Tensor]) -> Tensor:
        """For scripts, traces and exported programs: Python decides nothing."""
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

    @torch.jit.unused
    @property
    def level_rule(self) -> LevelRule:
        """Eq. (1) with this pooler's constants."""
        size, k0 = self.canonical_box_size, self.canonical_level
        return LevelRule(self.min_level, self.max_level, size, k0)

    def _pool_at_once(self, x: list[Tensor], rois: Tensor) -> Tensor:
        align = self.level_poolers[0]
        return pyramid_roi_align(
            x,
            rois,
            self.level_rule,
            [pool.spatial_scale for pool in self.level_poolers],
            align.output_size,
            align.sampling_ratio,
            align.aligned,
            non_finite_flag(rois[:, 1:]),
        )

    def _levels_and_counts(self, rois: Tensor) -> tuple[Tensor, list[int]]:
        """Indices of levels, and how many boxes each has: one transfer from the device."""
        levels = levels_of(rois[:, 1:], *self.level_rule) - self.min_level
        indices = torch.arange(len(self.level_poolers), device=levels.device)
        per_level = (levels[:, None] == indices).sum(dim=0)
        finite = torch.isfinite(rois[:, 1:]).all()
        *counts, all_finite = torch.cat([per_level, finite.view(1).to(per_level)]).tolist()
        if not all_finite:
            check_finite(rois[:, 1:])
        return levels, counts

    def _pool_by_level(
        self, x: list[Tensor], rois: Tensor, levels: Tensor, counts: list[int]
    ) -> Tensor:
        if len(x) == 1:
            return self.level_poolers[0](x[0], rois)
        # Boxes in order of their level, so that the counts split them. A level without boxes is
        # pooled too: its parameters then get a zero gradient, for which distributed training waits.
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
        rois.append(F.pad(of_image, [1, 0], value=float(image)))
    return torch.cat(rois) if len(rois) != 1 else rois[0]


def _is_exporting() -> bool:
    # torch 2.3 has only is_compiling, which is also True in torch.compile.
    return getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)()

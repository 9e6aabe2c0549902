"""Eq. (1): which pyramid level a region is pooled from (paper, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, RotatedBoxes
from torch import Tensor

from fpn_plugin.errors import NonFiniteError

__all__ = ["assign_levels"]


def assign_levels(
    boxes: Tensor | Boxes | RotatedBoxes | Sequence[Boxes] | Sequence[RotatedBoxes],
    min_level: int,
    max_level: int,
    canonical_box_size: float = 224,
    canonical_level: int = 4,
) -> Tensor:
    """Assigns each box its pyramid level, k = floor(k0 + log2(sqrt(w h) / s0)), Eq. (1).

    Exact at the boundaries (112, 224, 448 px for k0 = 4): a box of just that size goes to the
    coarser level. Computed in float32 with Detectron2's arithmetic, so that models of its zoo
    read each box from the level they were trained on; less than a part in 10^6 below a boundary
    the two round alike. Levels are clamped to those there are. Zero or negative extent counts as
    size 0 and goes to the finest.

    Args:
        boxes: ``(N, 4)`` XYXY in pixels of the network's input, as a tensor or ``Boxes``, or a
            list of ``Boxes``, one entry per image, taken together in order; ``RotatedBoxes``
            likewise. Of any dtype.
        min_level: finest level there is; level k has stride 2^k.
        max_level: coarsest level there is.
        canonical_box_size: s0, in the same pixels.
        canonical_level: k0, the level of a box whose size is s0.

    Returns:
        int64 ``(N,)``, each k itself, in ``[min_level, max_level]``.

    Raises:
        NonFiniteError: a coordinate is NaN or infinite; says how many boxes and which is the first.

    Example::

        >>> assign_levels(torch.tensor([[0.0, 0, 224, 224], [0, 0, 111, 112]]), 2, 5)
        tensor([4, 2])
    """
    if isinstance(boxes, Boxes | RotatedBoxes):
        boxes = boxes.tensor
    tensor = boxes if isinstance(boxes, Tensor) else _concatenate(boxes)
    check_finite(tensor)
    return levels_of(tensor, min_level, max_level, canonical_box_size, canonical_level)


def levels_of(
    boxes: Tensor,
    min_level: int,
    max_level: int,
    canonical_box_size: float,
    canonical_level: int,
) -> Tensor:
    """:func:`assign_levels` for a tensor whose coordinates are known to be finite.

    ``(N, 5)`` is taken as rotated boxes: centre x and y, width, height, angle.
    """
    # Beyond 1e18 px an area would overflow float32, and infinity times zero be NaN.
    boxes = boxes.float().clamp(-1e18, 1e18)
    if boxes.shape[1] == 5:
        width, height = boxes[:, 2], boxes[:, 3]
    else:
        width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    size = (width.clamp(min=0) * height.clamp(min=0)).sqrt()
    # The 1e-8 keeps size 0 off log2(0), and the rounding Detectron2's.
    level = torch.floor(canonical_level + torch.log2(size / canonical_box_size + 1e-8))
    return level.clamp(min_level, max_level).to(torch.int64)


def check_finite(boxes: Tensor) -> None:
    """Refuses boxes that Eq. (1) has no level for.

    Args:
        boxes: ``(N, 4)`` or ``(N, 5)``.

    Raises:
        NonFiniteError: a coordinate is NaN or infinite.
    """
    finite = torch.isfinite(boxes)
    if finite.all():
        return
    bad: list[int] = (~finite.all(dim=1)).nonzero()[:, 0].tolist()
    first: list[float] = boxes[bad[0]].tolist()
    raise NonFiniteError(
        f"{len(bad)} of {len(boxes)} boxes have NaN or infinite coordinates, the first is box "
        f"{bad[0]}: {first}. Eq. (1) names no level for them; training that diverged (try a lower "
        "learning rate) and broken annotations are the usual causes"
    )


def _concatenate(boxes: Sequence[Boxes] | Sequence[RotatedBoxes]) -> Tensor:
    if len(boxes) == 0:
        return torch.zeros(0, 4)
    return torch.cat([of_image.tensor for of_image in boxes])

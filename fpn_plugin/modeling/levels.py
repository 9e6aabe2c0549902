"""Eq. (1): which pyramid level a region is pooled from (paper, section 4.2)."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

import torch
from detectron2.structures import Boxes, RotatedBoxes
from torch import Tensor

from fpn_plugin.errors import NonFiniteError
from fpn_plugin.kernels.levels import levels_of

__all__ = ["assign_levels"]


def assign_levels(
    boxes: Tensor | Boxes | RotatedBoxes | Sequence[Boxes] | Sequence[RotatedBoxes],
    min_level: int,
    max_level: int,
    canonical_box_size: float = 224,
    canonical_level: int = 4,
) -> Tensor:
    """Assigns each box its pyramid level, k = floor(k0 + log2(sqrt(w h) / s0)), Eq. (1).

    Exact at the boundaries (112, 224, 448 px for k0 = 4): a box of that size goes to the coarser
    level. Computed in float32 with Detectron2's arithmetic, so that models of its zoo read each box
    from the level on which they were trained; both round alike less than a part in 10^6 below a
    boundary. Levels are clamped to the pyramid's. A box of zero or negative extent has size 0 and
    goes to the finest.

    Args:
        boxes: ``(N, 4)`` XYXY in pixels of the network's input, of any dtype: a tensor, ``Boxes``
            or ``RotatedBoxes``, or a list of these, one for each image, which are concatenated.
        min_level: finest level of the pyramid; level k has stride 2^k.
        max_level: coarsest level of the pyramid.
        canonical_box_size: s0, in the same pixels.
        canonical_level: k0, the level of a box whose size is s0.

    Returns:
        int64 ``(N,)``, each k itself, in ``[min_level, max_level]``.

    Raises:
        NonFiniteError: a coordinate is NaN or infinite; names the first box and counts all.

    Example::

        >>> assign_levels(torch.tensor([[0.0, 0, 224, 224], [0, 0, 111, 112]]), 2, 5)
        tensor([4, 2])
    """
    if isinstance(boxes, Boxes | RotatedBoxes):
        boxes = boxes.tensor
    elif not isinstance(boxes, Tensor):
        boxes = torch.cat([of_image.tensor for of_image in boxes] or [torch.zeros(0, 4)])
    check_finite(boxes)
    return levels_of(boxes, min_level, max_level, canonical_box_size, canonical_level)


def check_finite(boxes: Tensor) -> None:
    """Raises a NonFiniteError if a coordinate of boxes ``(N, 4)`` or ``(N, 5)`` is not finite."""
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


class _Pooled(threading.local):
    """The boxes that this thread pooled on a GPU last, and a flag on the host, which a kernel sets
    if a coordinate is not finite.
    """

    def __init__(self) -> None:
        self.flag: Tensor | None = None
        self.boxes: deque[Tensor] = deque(maxlen=16)


_pooled = _Pooled()


def non_finite_flag(boxes: Tensor) -> Tensor | None:
    """:func:`check_finite` that does not wait for a GPU.

    Returns:
        For boxes on a GPU, the flag that the kernel which reads them has to set if one is not
        finite. A later call of this or of :func:`raise_non_finite` then raises the error. None
        if a CUDA graph is captured, which has no such check, and on other devices, where the
        boxes are checked.
    """
    if not boxes.is_cuda:
        check_finite(boxes)
        return None
    if torch.cuda.is_current_stream_capturing():
        return None
    raise_non_finite()
    if _pooled.flag is None:
        _pooled.flag = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    _pooled.boxes.append(boxes.detach())
    return _pooled.flag


def raise_non_finite() -> None:
    """:func:`check_finite` of earlier boxes, as far as their kernels have run."""
    if _pooled.flag is None or not _pooled.flag.item():
        return
    _pooled.flag.zero_()
    recent = [*_pooled.boxes]
    _pooled.boxes.clear()
    for boxes in recent:
        check_finite(boxes)
    raise NonFiniteError("boxes that were pooled earlier have NaN or infinite coordinates")

"""Eq. (1): which pyramid level a region is pooled from (paper, section 4.2)."""

from __future__ import annotations

import math
import threading
from collections import deque
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


def levels_of(
    boxes: Tensor, min_level: int, max_level: int, canonical_box_size: float, canonical_level: int
) -> Tensor:
    """:func:`assign_levels` for a tensor of finite coordinates.

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


class _Unread(threading.local):
    """Sums of boxes that are copied from a GPU, oldest first."""

    def __init__(self) -> None:
        self.sums: deque[tuple[torch.cuda.Event, Tensor, Tensor]] = deque()


_unread = _Unread()


def check_finite_soon(boxes: Tensor) -> None:
    """:func:`check_finite` that does not wait for a GPU.

    Boxes on a GPU are checked by a later call of this or of :func:`raise_non_finite`, and in a CUDA
    graph not at all.
    """
    if not boxes.is_cuda:
        check_finite(boxes)
        return
    if torch.cuda.is_current_stream_capturing():
        return
    raise_non_finite()
    total = boxes.detach().sum().to("cpu", non_blocking=True)
    arrived = torch.cuda.current_stream(boxes.device).record_event()
    _unread.sums.append((arrived, total, boxes.detach()))


def raise_non_finite() -> None:
    """:func:`check_finite` of earlier boxes whose sums have arrived."""
    while _unread.sums and _unread.sums[0][0].query():
        _, total, boxes = _unread.sums.popleft()
        if not math.isfinite(total.item()):  # or the sum overflows
            check_finite(boxes)

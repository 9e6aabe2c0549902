"""The RPN's proposals of all images and levels at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .nms import nms_mask

__all__ = ["Proposals", "select_proposals"]


class Proposals(NamedTuple):
    """Proposals of N images, each with room for M of them."""

    boxes: Tensor  # float32 (N, M, 4), XYXY, clipped to the image
    scores: Tensor  # (N, M), falling; -inf from the image's count on
    counts: Tensor  # int64 (N,)
    finite: Tensor  # bool (N,): whether all boxes and scores given were
    exact: Tensor  # bool (N,), see nms_mask


@torch.no_grad()
def select_proposals(
    boxes: Sequence[Tensor],
    scores: Sequence[Tensor],
    image_sizes: Tensor,
    nms_threshold: float,
    most: int,
    min_size: float,
) -> Proposals:
    """Detectron2's ``find_top_rpn_proposals`` from its second step on, with fixed shapes.

    Boxes are clipped to their image. Small boxes and those that are not finite are left out.
    Suppression is greedy within a level. The best of all levels remain. Values and order are
    Detectron2's, also for equal scores. Nothing waits for a GPU.

    Args:
        boxes: of each level, ``(N, K, 4)`` XYXY in order of falling score; K may differ.
        scores: of each level, ``(N, K)``.
        image_sizes: ``(N, 2)``, height and width.
        nms_threshold: see :func:`.nms_mask`.
        most: proposals of an image at most.
        min_size: boxes must be wider and higher than this, in pixels.
    """
    sizes = [of_level.shape[1] for of_level in scores]
    longest = max(sizes)
    flat, flat_scores = torch.cat(list(boxes), dim=1).float(), torch.cat(list(scores), dim=1)
    known = torch.isfinite(flat).all(dim=2) & torch.isfinite(flat_scores)
    limits = image_sizes.flip(1).repeat(1, 2)[:, None].to(flat)
    flat = torch.minimum(flat.clamp(min=0), limits)
    large = ((flat[:, :, 2:] - flat[:, :, :2]) > min_size).all(dim=2)
    valid = known & large

    def by_level(values: Tensor) -> Tensor:
        """``(N, sum of K, ...)`` as ``(N * levels, longest K, ...)``, with zeros at the end."""
        padded = [
            F.pad(part, (*[0, 0] * (part.dim() - 2), 0, longest - part.shape[1]))
            for part in values.split(sizes, dim=1)
        ]
        return torch.stack(padded, dim=1).flatten(0, 1)

    keep, exact = nms_mask(by_level(flat), by_level(valid), nms_threshold)
    keep = keep.view(len(flat), len(sizes), longest)
    keep = torch.cat([keep[:, level, :size] for level, size in enumerate(sizes)], dim=1)
    best = flat_scores.masked_fill(~keep, -torch.inf).sort(dim=1, descending=True, stable=True)
    order = best.indices[:, :most]
    return Proposals(
        flat.gather(1, order[:, :, None].expand(-1, -1, 4)),
        best.values[:, :most],
        keep.sum(dim=1).clamp(max=most),
        known.all(dim=1),
        exact.view(len(flat), -1).all(dim=1),
    )

"""Segment proposals on the pyramid (paper, section 6 and appendix A), the rows of Table 6.

As DeepMask does, a small window slides over each level and predicts a score and a mask. What the
paper leaves open is decided here: a ReLU follows the first layer, convolutions are padded with
zeros, all levels share one head per kernel, both losses are logistic, the mask loss is a mean over
pixels and positives, a cell stands for the centre of its pixels, and cells outside of an image are
neither sampled nor proposed. A head with one kernel takes the objects of all sizes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import fvcore.nn.weight_init as weight_init
import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling import PROPOSAL_GENERATOR_REGISTRY
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import BitMasks, Boxes, ImageList, Instances, PolygonMasks
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn
from torch.nn import functional as F

from fpn_plugin.errors import UserError

__all__ = ["SegmentHead", "SegmentProposals", "label_cells"]

_PADDING = 1.25  # of a window over its object: "25 % padding" (appendix A)
_BASE_KERNEL = 5  # the kernel whose objects have `object_cells`


class SegmentHead(nn.Module):
    """One window on all levels: a k x k convolution, then score and mask as 1x1 convolutions.

    Args:
        in_channels: of each level.
        kernel_size: k, 5 or, for the half octaves, 7.
        width: channels of the k x k convolution.
        mask_size: side M of a mask.
    """

    def __init__(self, in_channels: int, kernel_size: int, width: int, mask_size: int) -> None:
        super().__init__()
        self.mask_size = mask_size
        self.conv = nn.Conv2d(in_channels, width, kernel_size, padding=kernel_size // 2)
        self.score = nn.Conv2d(width, 1, 1)
        self.mask = nn.Conv2d(width, mask_size**2, 1)
        weight_init.c2_xavier_fill(self.conv)
        for layer in (self.score, self.mask):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """The hidden map ``(N, width, H, W)`` of a level, and its logits of scores ``(N, H W)``."""
        hidden = F.relu(self.conv(feature))
        return hidden, self.score(hidden).flatten(1)

    def masks(self, hidden: Tensor) -> Tensor:
        """Logits of masks ``(n, M, M)`` at cells of the hidden map, ``(n, width)``."""
        hidden = hidden.to(self.mask.weight.dtype)  # an optimized copy's may differ
        logits = F.linear(hidden, self.mask.weight.flatten(1), self.mask.bias)
        return logits.view(-1, self.mask_size, self.mask_size)


@torch.no_grad()
def label_cells(
    centers: Sequence[Tensor], strides: Sequence[int], sizes: Sequence[float], boxes: Tensor
) -> tuple[Tensor, Tensor]:
    """Which cells are positives, and of which object (appendix A).

    An object belongs to the slot, a kernel on a level, whose size is nearest to its longer side in
    log space. Objects beyond the last sizes belong to the last slots. Cells of that slot whose
    centre is at most a stride away from the object's, along both axes, are its positives. A cell
    near several objects takes the nearest.

    Args:
        centers: ``(R, 2)`` of each slot, x and y of its cells in pixels of the input.
        strides: of each slot, in pixels.
        sizes: longer side of each slot's objects, in pixels.
        boxes: ``(O, 4)``, XYXY of the objects' masks; empty ones belong to no slot.

    Returns:
        Labels, int64 ``(sum of R,)``, 1 for positives and 0 for others, and the object of each
        cell, int64, 0 for those without.
    """
    sides = (boxes[:, 2:] - boxes[:, :2]).amax(dim=1)
    middles = (boxes[:, 2:] + boxes[:, :2]) / 2
    octaves = sides.log2()[:, None] - boxes.new_tensor(sizes).log2()
    slots = octaves.abs().argmin(dim=1).masked_fill(sides <= 0, -1)
    labels, objects = [], []
    for slot, (cells, stride) in enumerate(zip(centers, strides, strict=True)):
        if len(boxes) == 0:
            labels.append(torch.zeros(len(cells), dtype=torch.int64, device=cells.device))
            objects.append(labels[-1])
            continue
        distance = (cells[:, None] - middles).abs().amax(dim=2)  # (R, O)
        nearest, of = distance.masked_fill(slots != slot, math.inf).min(dim=1)
        labels.append((nearest <= stride).long())
        objects.append(of * labels[-1])
    return torch.cat(labels), torch.cat(objects)


@PROPOSAL_GENERATOR_REGISTRY.register()
class SegmentProposals(nn.Module):
    """Proposes segments of objects of any class; a proposal generator of ProposalNetwork.

    In training it gives no proposals. In evaluation it scores every cell and predicts the masks of
    the best, without NMS. Its ``Instances`` have, best first:

    * ``proposal_boxes``: around the masks; masks without a pixel are left out later, as Detectron2
      leaves out empty boxes.
    * ``objectness_logits``: ``(N,)``.
    * ``proposal_masks``: float32 ``(N, M, M)``, probabilities.
    * ``mask_windows``: float32 ``(N, 4)``, XYXY of what a mask covers, in fractions of the image's
      width and height; it may reach beyond the image.

    Args:
        in_features: levels, the finest first.
        in_channels: of each level.
        strides: of the levels, in pixels.
        kernel_sizes: a head for each: ``[5]``, ``[7]`` or, for half octaves, ``[5, 7]``.
        width: channels of a head's first layer.
        mask_size: side of a mask.
        object_cells: longer side of a level's objects in its cells, for a kernel of 5: 8 is 32 px
            on P2. A kernel of 7 is for objects half an octave larger.
        batch_size_per_image: cells that are sampled in each image.
        positive_fraction: of those, positives at most.
        mask_loss_weight: weight of the mask loss over that of the score.
        topk_test: proposals of an image.
    """

    @configurable
    def __init__(
        self,
        *,
        in_features: Sequence[str],
        in_channels: int,
        strides: Sequence[int],
        kernel_sizes: Sequence[int] = (5,),
        width: int = 512,
        mask_size: int = 14,
        object_cells: float = 8,
        batch_size_per_image: int = 128,
        positive_fraction: float = 0.25,
        mask_loss_weight: float = 10.0,
        topk_test: int = 1000,
    ) -> None:
        super().__init__()
        if not kernel_sizes or any(size % 2 == 0 or size < 1 for size in kernel_sizes):
            raise UserError(
                f"MODEL.SEGMENT_PROPOSALS.KERNEL_SIZES (lazy: kernel_sizes) is "
                f"{list(kernel_sizes)}, expected odd sizes such as [5] or [5, 7]"
            )
        numbers = {"OBJECT_CELLS": object_cells, "MASK_SIZE": mask_size, "WIDTH": width}
        for key, value in numbers.items():
            if value <= 0:
                raise UserError(
                    f"MODEL.SEGMENT_PROPOSALS.{key} (lazy: {key.lower()}) is {value}, expected a "
                    "number above 0"
                )
        self.in_features = list(in_features)
        self.heads = nn.ModuleList(
            SegmentHead(in_channels, size, width, mask_size) for size in kernel_sizes
        )
        # A slot is a kernel on a level; slots of a kernel follow one another.
        self.strides = [stride for _ in kernel_sizes for stride in strides]
        self.sizes = [
            # 7 is nearly 5 sqrt(2): half an octave. Others are rounded to half octaves too.
            stride * object_cells * 2 ** (round(2 * math.log2(kernel / _BASE_KERNEL)) / 2)
            for kernel in kernel_sizes
            for stride in strides
        ]
        self.mask_size = mask_size
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.mask_loss_weight = mask_loss_weight
        self.topk_test = topk_test

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Mapping[str, ShapeSpec]) -> dict[str, Any]:
        """Arguments from MODEL.SEGMENT_PROPOSALS.

        Raises:
            UserError: a level is not there or has other channels, or the config's model cannot
                have segment proposals.
        """
        keys = cfg.MODEL.SEGMENT_PROPOSALS
        name = "MODEL.SEGMENT_PROPOSALS.IN_FEATURES"
        missing = [level for level in keys.IN_FEATURES if level not in input_shape]
        if missing or not keys.IN_FEATURES:
            raise UserError(
                f"{name} names {', '.join(missing) or 'no level'}; the backbone gives "
                f"{', '.join(input_shape)}"
            )
        shapes = [input_shape[level] for level in keys.IN_FEATURES]
        if len({shape.channels for shape in shapes}) > 1:
            raise UserError(
                f"{name} {list(keys.IN_FEATURES)} have {[s.channels for s in shapes]} channels: "
                "the levels of a pyramid share a head, and must have as many each"
            )
        if cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "PanopticFPN"):
            raise UserError(
                "MODEL.PROPOSAL_GENERATOR.NAME SegmentProposals has no proposals for RoI heads: "
                "set MODEL.META_ARCHITECTURE to ProposalNetwork"
            )
        if not cfg.MODEL.MASK_ON:
            raise UserError(
                "MODEL.MASK_ON is False, and SegmentProposals learns from masks: set it to True"
            )
        return {
            "in_features": list(keys.IN_FEATURES),
            "in_channels": shapes[0].channels,
            "strides": [shape.stride for shape in shapes],
            "kernel_sizes": list(keys.KERNEL_SIZES),
            "width": keys.WIDTH,
            "mask_size": keys.MASK_SIZE,
            "object_cells": keys.OBJECT_CELLS,
            "batch_size_per_image": keys.BATCH_SIZE_PER_IMAGE,
            "positive_fraction": keys.POSITIVE_FRACTION,
            "mask_loss_weight": keys.MASK_LOSS_WEIGHT,
            "topk_test": keys.TOPK_TEST,
        }

    def forward(
        self,
        images: ImageList,
        features: Mapping[str, Tensor],
        gt_instances: list[Instances] | None = None,
    ) -> tuple[list[Instances], dict[str, Tensor]]:
        """Proposals of each image, none in training; and in training the losses.

        Raises:
            UserError: an image of the training has objects without masks.
        """
        levels = [features[name] for name in self.in_features]
        centers = self.centers([level.shape[-2:] for level in levels], levels[0].device)
        found = [head(level) for head in self.heads for level in levels]
        hidden = [each for each, _ in found]
        scores = torch.cat([each for _, each in found], dim=1).float()
        if self.training:
            return [], self._losses(images, centers, hidden, scores, gt_instances)
        with torch.no_grad():
            return self._proposals(images, centers, hidden, scores), {}

    def centers(self, shapes: Sequence[Sequence[int]], device: torch.device) -> list[Tensor]:
        """The centres of each slot's cells, ``(H W, 2)``, x and y in pixels of the input.

        Args:
            shapes: height and width of each level.
            device: of the centres.
        """
        grids = []
        for (height, width), stride in zip(shapes, self.strides, strict=False):
            y = (torch.arange(height, device=device) + 0.5) * stride
            x = (torch.arange(width, device=device) + 0.5) * stride
            grids.append(torch.stack([x.repeat(height), y.repeat_interleave(width)], dim=1))
        return grids * len(self.heads)

    def windows(self, centers: Sequence[Tensor]) -> Tensor:
        """What the mask of each cell covers, ``(sum of R, 4)``, XYXY in pixels of the input."""
        return torch.cat(
            [
                torch.cat([cells - size * _PADDING / 2, cells + size * _PADDING / 2], dim=1)
                for cells, size in zip(centers, self.sizes, strict=True)
            ]
        )

    def _masks(self, hidden: Sequence[Tensor], image: int, cells: Tensor) -> Tensor:
        """Logits of the masks at cells, which count over all slots, of an image."""
        masks, places, start = [], [], 0
        levels = len(hidden) // len(self.heads)
        for slot, of_slot in enumerate(hidden):
            values = of_slot[image].flatten(1)
            [here] = ((cells >= start) & (cells < start + values.shape[1])).nonzero(as_tuple=True)
            masks.append(self.heads[slot // levels].masks(values[:, cells[here] - start].t()))
            places.append(here)
            start += values.shape[1]
        return torch.cat(masks)[torch.cat(places).argsort()]

    def _losses(
        self,
        images: ImageList,
        centers: list[Tensor],
        hidden: list[Tensor],
        scores: Tensor,
        gt_instances: list[Instances] | None,
    ) -> dict[str, Tensor]:
        windows, every_cell = self.windows(centers), torch.cat(centers)
        logits, labels, masks, targets = [], [], [], []
        for i, (size, objects) in enumerate(zip(images.image_sizes, gt_instances, strict=True)):
            given = _masks_of(objects)
            boxes = given.get_bounding_boxes().tensor.to(windows.device)
            label, of = label_cells(centers, self.strides, self.sizes, boxes)
            label = label.masked_fill(~_inside(every_cell, size), -1)
            positive, negative = subsample_labels(
                label, self.batch_size_per_image, self.positive_fraction, 0
            )
            sampled = torch.cat([positive, negative])
            logits.append(scores[i, sampled])
            labels.append(label[sampled].float())
            masks.append(self._masks(hidden, i, positive))
            if len(positive):
                crops = given[of[positive]].crop_and_resize(windows[positive], self.mask_size)
                targets.append(crops.to(windows.device).float())
        count = sum(map(len, masks))
        storage = get_event_storage()
        storage.put_scalar("segment_proposals/num_pos", count / len(gt_instances))
        # Without a positive, every parameter still has a gradient, of zeros.
        mask_loss = torch.cat(masks).float().sum() * 0
        if count:
            mask_loss = F.binary_cross_entropy_with_logits(
                torch.cat(masks).float(), torch.cat(targets)
            )
        return {
            "loss_segment_score": F.binary_cross_entropy_with_logits(
                torch.cat(logits), torch.cat(labels)
            ),
            "loss_segment_mask": self.mask_loss_weight * mask_loss,
        }

    def _proposals(
        self, images: ImageList, centers: list[Tensor], hidden: list[Tensor], scores: Tensor
    ) -> list[Instances]:
        windows, every_cell = self.windows(centers), torch.cat(centers)
        proposals = []
        for i, (height, width) in enumerate(images.image_sizes):
            inside = _inside(every_cell, (height, width))
            count = min(self.topk_test, int(inside.sum()))
            best, cells = scores[i].masked_fill(~inside, -math.inf).topk(count)
            found = Instances((height, width))
            found.objectness_logits = best
            found.proposal_masks = self._masks(hidden, i, cells).float().sigmoid()
            found.proposal_boxes = Boxes(boxes_of_masks(found.proposal_masks, windows[cells]))
            found.mask_windows = windows[cells] / windows.new_tensor([width, height] * 2)
            proposals.append(found)
        return proposals


def boxes_of_masks(masks: Tensor, windows: Tensor) -> Tensor:
    """Boxes around masks, ``(N, 4)`` as windows are; of no extent if a mask has no pixel.

    Args:
        masks: ``(N, M, M)``, probabilities.
        windows: ``(N, 4)``, XYXY of what the masks cover.
    """
    size = masks.shape[-1]
    edges = torch.arange(size, device=masks.device)
    corners = []
    for axis, side in ((1, slice(0, None, 2)), (2, slice(1, None, 2))):
        filled = (masks >= 0.5).any(dim=axis)  # columns, then rows
        first = edges.where(filled, edges.new_tensor(size)).amin(dim=1)
        last = (edges + 1).where(filled, edges.new_tensor(0)).amax(dim=1)
        low, high = windows[:, side].unbind(dim=1)
        cell = (high - low) / size
        corners.append((low + first * cell, low + torch.maximum(first, last) * cell))
    (x0, x1), (y0, y1) = corners
    return torch.stack([x0, y0, x1, y1], dim=1)


def _inside(cells: Tensor, size: tuple[int, int]) -> Tensor:
    """Whether centres of cells are in an image of a height and width."""
    return (cells[:, 0] < size[1]) & (cells[:, 1] < size[0])


def _masks_of(objects: Instances) -> BitMasks | PolygonMasks:
    """The masks of an image's objects."""
    if objects.has("gt_masks"):
        return objects.gt_masks
    if len(objects):
        raise UserError(
            "the training data has no masks, from which segment proposals learn: give data with a "
            "segmentation of each object, and set MODEL.MASK_ON True (lazy: the mapper's "
            "use_instance_mask)"
        )
    return BitMasks(torch.zeros(0, *objects.image_size, dtype=torch.bool))

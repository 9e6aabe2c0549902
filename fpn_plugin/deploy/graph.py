"""A detector as one function of tensors, which every exporter can trace.

Detectron2's architectures keep detections in one object per image, and make decisions in Python
that no exporter sees. Here the same modules (backbone, heads, anchors, box transforms) are called
on tensors. A tensor holds the regions of all images, and another the index of each region's image.
The numbers of images, pixels, proposals and detections may vary from call to call, and may be 0.
"""

from __future__ import annotations

import math

import torch
from detectron2.modeling import GeneralizedRCNN, RetinaNet, StandardROIHeads
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import nms

from fpn_plugin.errors import UserError
from fpn_plugin.kernels.levels import levels_of
from fpn_plugin.modeling import FPNROIHeads

__all__ = ["DetectionGraph", "detection_graph"]


class DetectionGraph(nn.Module):
    """The part that Faster R-CNN, Mask R-CNN and RetinaNet share.

    Args:
        model: in evaluation mode.
    """

    output_names = ("boxes", "scores", "classes", "image_index")

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """Detects objects.

        Args:
            images: ``(N, C, H, W)``, of any dtype, values 0 to 255, channels in the order of
                INPUT.FORMAT. Smaller images are padded on the right and below with any values.
            sizes: int64 ``(N, 2)``, height and width of each image without padding.

        Returns:
            ``boxes`` float32 ``(D, 4)``, XYXY in pixels of ``images``; ``scores`` ``(D,)``, highest
            first; ``classes`` and ``image_index`` int64 ``(D,)``; with a mask head, ``masks``
            ``(D, M, M)``, the probability of each cell of a box's mask.
        """
        raise NotImplementedError

    def _pyramid(self, images: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """The backbone's levels. Images are normalised first, then padded with zeros."""
        model, device = self.model, images.device
        height, width = images.shape[-2:]
        inside = torch.arange(height, device=device)[None, :] < sizes[:, :1]
        inside = inside[:, :, None] & (torch.arange(width, device=device) < sizes[:, 1:])[:, None]
        x = (images.float() - model.pixel_mean) / model.pixel_std
        x = x.masked_fill(~inside[:, None], 0)
        divisor = model.backbone.size_divisibility
        if divisor > 1:
            padded = [(side + divisor - 1) // divisor * divisor for side in (height, width)]
            x = F.pad(x, (0, padded[1] - width, 0, padded[0] - height))
        return model.backbone(x)


def detection_graph(model: nn.Module) -> DetectionGraph:
    """The graph of a model.

    Args:
        model: Faster or Mask R-CNN, or RetinaNet, of the plugin or stock.

    Raises:
        UserError: another architecture, or a head that has no graph.
    """
    if type(model) is RetinaNet:
        return RetinaNetGraph(model)
    what = type(model).__name__
    # Subclasses do more. PanopticFPN also segments; a graph without that would drop it in silence.
    if type(model) is GeneralizedRCNN:
        what = _without_graph(model.roi_heads)
        if model.proposal_generator is None:
            what = "Fast R-CNN, which reads proposals,"
        if not what:
            return RCNNGraph(model)
    raise UserError(
        f"{what} cannot be exported: Faster R-CNN and Mask R-CNN (StandardROIHeads, FPNROIHeads) "
        "and RetinaNet can"
    )


def _without_graph(heads: nn.Module) -> str:
    """The name of a part of RoI heads that RCNNGraph does not support; empty if it supports all."""
    if type(heads) not in (StandardROIHeads, FPNROIHeads):
        return type(heads).__name__
    if heads.keypoint_on:
        return "a keypoint head"
    if not isinstance(heads.box_predictor, FastRCNNOutputLayers):
        return type(heads.box_predictor).__name__
    if heads.mask_on and not hasattr(heads.mask_head, "layers"):
        return type(heads.mask_head).__name__
    return ""


class RCNNGraph(DetectionGraph):
    """Faster and Mask R-CNN."""

    def __init__(self, model: GeneralizedRCNN) -> None:
        super().__init__(model)
        if model.roi_heads.mask_on:
            self.output_names = (*self.output_names, "masks")

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """See the base class."""
        pyramid = self._pyramid(images, sizes)
        proposals, image = self._proposals(pyramid, sizes)
        heads = self.model.roi_heads
        features = [pyramid[level] for level in heads.box_in_features]
        boxes, scores, classes, image = self._detections(features, proposals, image, sizes)
        found = (boxes, scores, classes, image)
        if not heads.mask_on:
            return found
        features = [pyramid[level] for level in heads.mask_in_features]
        logits = heads.mask_head.layers(_pool(heads.mask_pooler, features, boxes, image))
        if logits.shape[1] > 1:
            side = logits.shape[-1]
            index = classes[:, None, None, None].expand(-1, 1, side, side)
            logits = logits.gather(1, index)
        return (*found, logits[:, 0].sigmoid())

    def _proposals(self, pyramid: dict[str, Tensor], sizes: Tensor) -> tuple[Tensor, Tensor]:
        """Proposals ``(P, 4)`` of all images, and the image of each."""
        rpn = self.model.proposal_generator
        features = [pyramid[level] for level in rpn.in_features]
        anchors = rpn.anchor_generator(features)
        logits, deltas = rpn.rpn_head(features)
        parts = []
        for level, grid in enumerate(anchors):
            boxes, scores, _, image = _decoded_top(
                logits[level], deltas[level], grid.tensor, rpn.pre_nms_topk[False], 1, rpn
            )
            parts.append((boxes, scores, torch.full_like(image, level), image))
        boxes, scores, level, image = map(torch.cat, zip(*parts, strict=True))
        clipped = _clip(boxes, sizes[image])
        good = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores)
        good = good & _has_area(clipped, rpn.min_box_size)
        boxes, scores, level, image = _take(_where(good), clipped, scores, level, image)
        keep = _grouped_nms(boxes, scores, level, len(anchors), image, rpn.nms_thresh)
        boxes, image = _take(keep, boxes, image)
        return _take(_first_of_each(image, sizes.shape[0], rpn.post_nms_topk[False]), boxes, image)

    def _detections(
        self, features: list[Tensor], proposals: Tensor, image: Tensor, sizes: Tensor
    ) -> tuple[Tensor, ...]:
        heads = self.model.roi_heads
        predictor = heads.box_predictor
        pooled = _pool(heads.box_pooler, features, proposals, image)
        logits, deltas = predictor(heads.box_head(pooled))
        sigmoid = getattr(predictor, "use_sigmoid_ce", False)
        scores = logits.sigmoid() if sigmoid else logits.softmax(dim=1)
        boxes = predictor.box2box_transform.apply_deltas(deltas, proposals)
        good = torch.isfinite(boxes).all(dim=1) & torch.isfinite(scores).all(dim=1)
        scores = scores[:, :-1]
        candidate, classes = _where2((scores > predictor.test_score_thresh) & good[:, None])
        scores = scores[candidate, classes]
        per_class = boxes.unflatten(1, (boxes.shape[1] // 4, 4))
        boxes = per_class[candidate, classes if per_class.shape[1] > 1 else 0 * classes]
        image = image[candidate]
        boxes = _clip(boxes, sizes[image])
        return _suppressed(
            boxes, scores, classes, logits.shape[1] - 1, image, sizes,
            predictor.test_nms_thresh, predictor.test_topk_per_image,
        )  # fmt: skip


class RetinaNetGraph(DetectionGraph):
    """RetinaNet."""

    def forward(self, images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """See the base class."""
        model = self.model
        pyramid = self._pyramid(images, sizes)
        features = [pyramid[level] for level in model.head_in_features]
        anchors = model.anchor_generator(features)
        logits, deltas = model.head(features)
        parts = []
        for level, grid in enumerate(anchors):
            boxes, top, classes, image = _decoded_top(
                logits[level], deltas[level], grid.tensor, model.test_topk_candidates,
                model.num_classes, model,
            )  # fmt: skip
            parts.append((boxes, top.sigmoid(), classes, image))
        boxes, scores, classes, image = map(torch.cat, zip(*parts, strict=True))
        good = _where(scores > model.test_score_thresh)
        boxes, scores, classes, image = _take(good, boxes, scores, classes, image)
        return _suppressed(
            boxes, scores, classes, model.num_classes, image, sizes,
            model.test_nms_thresh, model.max_detections_per_image,
        )  # fmt: skip


def _decoded_top(
    logits: Tensor, deltas: Tensor, anchors: Tensor, most: int, classes: int, owner: nn.Module
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One level's best k boxes of each image, ``(N k, 4)``, their logits, classes and images."""
    per_cell = deltas.shape[1] // 4
    # N, A x K, H, W to N, H x W x A x K: the order of anchors.
    logits = logits.unflatten(1, (per_cell, classes)).permute(0, 3, 4, 1, 2).flatten(1)
    deltas = deltas.unflatten(1, (per_cell, 4)).permute(0, 3, 4, 1, 2).flatten(1, 3)
    # One row more than images: onnxruntime before 1.24 divides by the number of rows.
    top, index = F.pad(logits, (0, 0, 0, 1)).topk(_at_most(logits.shape[1], most), dim=1)
    top, index = top[: logits.shape[0]], index[: logits.shape[0]]
    image = torch.arange(index.shape[0] * index.shape[1], device=index.device) // index.shape[1]
    index = index.flatten()
    anchor = index // classes
    picked = deltas.flatten(0, 1)[image * deltas.shape[1] + anchor]
    boxes = owner.box2box_transform.apply_deltas(picked, anchors[anchor])
    return boxes, top.flatten(), index % classes, image


def _suppressed(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    class_count: int,
    image: Tensor,
    sizes: Tensor,
    threshold: float,
    most: int,
) -> tuple[Tensor, ...]:
    """The candidates that remain after suppression within classes and the limit of each image."""
    keep = _grouped_nms(boxes, scores, classes, class_count, image, threshold)
    boxes, scores, classes, image = _take(keep, boxes, scores, classes, image)
    if most >= 0:
        keep = _first_of_each(image, sizes.shape[0], most)
        boxes, scores, classes, image = _take(keep, boxes, scores, classes, image)
    boxes = _clip(boxes, sizes[image])
    return _take(_where(_has_area(boxes, 0)), boxes, scores, classes, image)


def _pool(pooler: ROIPooler, features: list[Tensor], boxes: Tensor, image: Tensor) -> Tensor:
    """Eq. (1) and pooling, without decisions in Python: ``(R, C, h, w)``, in the order of boxes."""
    rois = torch.cat([image[:, None].to(boxes.dtype), boxes], dim=1)
    if len(features) == 1:
        return pooler.level_poolers[0](features[0], rois)
    levels = levels_of(
        boxes, pooler.min_level, pooler.max_level, pooler.canonical_box_size, pooler.canonical_level
    )
    of_level = [_where(levels == pooler.min_level + i) for i in range(len(features))]
    pooled = [
        level_pooler(x, rois[index])
        for level_pooler, x, index in zip(pooler.level_poolers, features, of_level, strict=True)
    ]
    return torch.cat(pooled)[torch.cat(of_level).argsort()]


def _grouped_nms(
    boxes: Tensor, scores: Tensor, group: Tensor, groups: int, image: Tensor, threshold: float
) -> Tensor:
    """Suppression within groups (levels, classes) and images: indices, highest score first.

    Groups are moved apart as tiles of a plane. Detectron2's CPU path moves them along one line.
    In a plane coordinates stay smaller and are rounded less.
    """
    columns = math.isqrt(groups - 1) + 1
    rows = (groups + columns - 1) // columns
    tile = torch.stack([group % columns, image * rows + group // columns], dim=1)
    # Two boxes away from all others, first in order: exporters assume that some boxes are kept.
    corners = boxes.new_tensor([[0.0, 0, 1, 1], [0, 0, 1, 1]])
    tile = torch.cat([tile.new_tensor([[columns, 0], [columns + 1, 0]]), tile])
    boxes = torch.cat([corners, boxes])
    scores = torch.cat([scores.new_full((2,), torch.finfo(scores.dtype).max), scores])
    extent = boxes.max() - boxes.min() + 1
    return nms(boxes + (tile * extent).repeat(1, 2), scores, threshold)[2:] - 2


def _first_of_each(image: Tensor, images: int, most: int) -> Tensor:
    """Indices of the first ``most`` of each image, in order."""
    same = (image[:, None] == torch.arange(images, device=image.device)).long()
    return _where((same.cumsum(dim=0) * same).sum(dim=1) <= most)


def _clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    limits = sizes.flip(1).repeat(1, 2).to(boxes.dtype)
    return boxes.clamp(min=0).minimum(limits)


def _has_area(boxes: Tensor, least: float) -> Tensor:
    return ((boxes[:, 2:] - boxes[:, :2]) > least).all(dim=1)


def _where(condition: Tensor) -> Tensor:
    return condition.nonzero()[:, 0]


def _where2(condition: Tensor) -> tuple[Tensor, Tensor]:
    found = condition.nonzero()
    if not torch.jit.is_tracing():
        torch._check(found.shape[0] <= 2**31)  # the bound that exporters infer overflows int64
    return found[:, 0], found[:, 1]


def _take(index: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor[index] for tensor in tensors)


def _at_most(count: int | Tensor, most: int) -> int | Tensor:
    if isinstance(count, Tensor):  # a size, under torch.jit.trace
        return count.clamp(max=most)
    return torch.sym_min(count, most)

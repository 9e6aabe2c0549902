"""A detector with fixed shapes, so that one CUDA graph holds it from image to detections.

After every step, Detectron2's architectures read from the device how many proposals, candidates or
detections are left. Here every tensor has room for the largest number, and a mask or a count says
which entries are used. The modules are the model's own, and values are the same. If a fixed bound
is too small, ``exact`` is false, and the caller runs the model itself.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from detectron2.layers import ROIAlign
from detectron2.modeling import GeneralizedRCNN, ProposalNetwork, RetinaNet
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.meta_arch.dense_detector import permute_to_N_HWA_K
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import CascadeROIHeads, FastRCNNOutputLayers, StandardROIHeads
from detectron2.modeling.roi_heads.keypoint_head import BaseKeypointRCNNHead
from detectron2.modeling.roi_heads.mask_head import BaseMaskRCNNHead
from torch import Tensor, nn

from fpn_plugin.errors import UserError
from fpn_plugin.kernels import nms_mask, pyramid_roi_align, select_proposals
from fpn_plugin.kernels.levels import levels_of
from fpn_plugin.modeling import FPNCascadeROIHeads, FPNROIHeads, PyramidROIPooler

from .batched_parts import (
    BatchedFastRCNNOutputLayers,
    BatchedRPN,
    KeptAnchorGenerator,
    decoded,
)
from .fused import SelectingRPN

__all__ = ["FixedDetections", "Geometry", "StaticDetector", "static_detector"]

_CANDIDATES = 2048  # largest number of an image's boxes in suppression
_FAR_BELOW = float("-inf")


class Geometry(NamedTuple):
    """Sizes of N images, in pixels, and the scales of their detections; float32 each."""

    sizes: Tensor  # (N, 2): height and width of the network's input, without padding
    output_sizes: Tensor  # (N, 2): height and width of the output, in whose pixels boxes are
    scales: Tensor  # (N, 2): output by input, in x and y

    @classmethod
    def of(cls, packed: Tensor) -> Geometry:
        """Splits ``(N, 6)`` into the three fields."""
        return cls(*packed.split(2, dim=1))


class FixedDetections(NamedTuple):
    """Detections, or proposals, of N images, each with room for D.

    The ``counts`` detections of an image come first, highest score first. The rest has no meaning.
    """

    boxes: Tensor  # float32 (N, D, 4), XYXY in pixels of the output
    scores: Tensor  # float32 (N, D); objectness logits of proposals
    classes: Tensor  # int64 (N, D)
    levels: Tensor  # int64 (N, D), k of Eq. (1) of the pooled proposal; 0 without a box head
    counts: Tensor  # int64 (N,), how many are used
    exact: Tensor  # bool (N,), whether fixed bounds were large enough
    regions: Tensor  # float32 (N, D, 4): the boxes in pixels of the network's input
    masks: Tensor | None = None  # float32 (N, D, side, side), probabilities
    heatmaps: Tensor | None = None  # float32 (N, D, keypoints, side, side), logits


class _Found(NamedTuple):
    """Remaining candidates, in pixels of the network's input; see FixedDetections."""

    boxes: Tensor
    scores: Tensor  # -inf for unused entries
    classes: Tensor
    source: Tensor  # int64 (N, D): index of the proposal or candidate
    exact: Tensor


class StaticDetector:
    """The part that Faster, Mask, Keypoint and Cascade R-CNN, RetinaNet and an RPN share.

    Anchors are made on the first call. Images of later calls must have the same size.

    Args:
        model: in evaluation mode, as optimised.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._anchors: list[Tensor] = []

    @torch.no_grad()
    def __call__(self, images: Tensor, geometry: Geometry) -> FixedDetections:
        """Detects objects.

        Args:
            images: ``(N, C, H, W)``, any dtype, channels in the order of INPUT.FORMAT, padded to
                the size that Detectron2 pads to, with any values.
            geometry: of these images.
        """
        height, width = images.shape[-2:]
        model, sizes = self.model, geometry.sizes[:, :, None]
        x = (images.float() - model.pixel_mean) / model.pixel_std
        # Detectron2 pads with zeros after it normalises.
        inside_y = torch.arange(height, device=x.device) < sizes[:, 0]
        inside_x = torch.arange(width, device=x.device) < sizes[:, 1]
        x = x.masked_fill(~(inside_y[:, None, :, None] & inside_x[:, None, None, :]), 0)
        return self._detect(model.backbone(x), geometry)

    def _detect(self, pyramid: dict[str, Tensor], geometry: Geometry) -> FixedDetections:
        raise NotImplementedError

    def _anchors_of(self, generator: nn.Module, features: list[Tensor]) -> list[Tensor]:
        if not self._anchors:
            self._anchors = [anchors.tensor for anchors in generator(features)]
        return self._anchors

    def _proposals(self, pyramid: dict[str, Tensor], geometry: Geometry) -> _Found:
        rpn = self.model.proposal_generator
        features = [pyramid[level] for level in rpn.in_features]
        anchors = self._anchors_of(rpn.anchor_generator, features)
        logits, deltas = rpn.rpn_head(features)
        logits = [of_level.permute(0, 2, 3, 1).flatten(1) for of_level in logits]
        scores, index = _best_of_levels(logits, rpn.pre_nms_topk[False])
        found = select_proposals(
            decoded(rpn.box2box_transform, anchors, _by_anchor(deltas), index),
            scores,
            geometry.sizes,
            rpn.nms_thresh,
            rpn.post_nms_topk[False],
            rpn.min_box_size,
        )
        none = torch.zeros_like(found.scores, dtype=torch.int64)
        return _Found(found.boxes, found.scores, none, none, found.exact)


class StaticRPN(StaticDetector):
    """ProposalNetwork."""

    def _detect(self, pyramid: dict[str, Tensor], geometry: Geometry) -> FixedDetections:
        return _scaled(self._proposals(pyramid, geometry), geometry)


class StaticRetinaNet(StaticDetector):
    """RetinaNet."""

    def _detect(self, pyramid: dict[str, Tensor], geometry: Geometry) -> FixedDetections:
        model = self.model
        features = [pyramid[level] for level in model.head_in_features]
        anchors = self._anchors_of(model.anchor_generator, features)
        logits, deltas = model.head(features)
        most, count = model.test_topk_candidates, model.num_classes
        pairs = [permute_to_N_HWA_K(of_level, count) for of_level in logits]
        # The best pairs of anchor and class lie in the anchors whose best class is best.
        _, best = _best_of_levels([of_level.amax(dim=2) for of_level in pairs], most)
        rows = [
            of_level.gather(1, index[:, :, None].expand(-1, -1, count)).flatten(1)
            for of_level, index in zip(pairs, best, strict=True)
        ]
        # By logits: the sigmoid, which keeps the order, is then computed only for the best.
        top, indices = _best_of_levels(rows, most)
        best = [of.gather(1, at // count) for of, at in zip(best, indices, strict=True)]
        boxes = decoded(model.box2box_transform, anchors, _by_anchor(deltas), best)
        classes = torch.cat([index % count for index in indices], dim=1)
        scores = torch.cat(top, dim=1).float().sigmoid()
        scores = scores.masked_fill(~(scores > model.test_score_thresh), _FAR_BELOW)
        found = _suppressed(
            torch.cat(boxes, dim=1),
            scores,
            classes,
            torch.arange(scores.shape[1], device=scores.device).expand_as(scores),
            model.test_nms_thresh,
            model.max_detections_per_image,
        )
        return _scaled(found, geometry)


class StaticRCNN(StaticDetector):
    """Faster, Mask, Keypoint and Cascade R-CNN."""

    def _detect(self, pyramid: dict[str, Tensor], geometry: Geometry) -> FixedDetections:
        heads = self.model.roi_heads
        proposals = self._proposals(pyramid, geometry)
        found = self._boxes(pyramid, proposals, geometry)
        regions = proposals.boxes.gather(1, found.source[:, :, None].expand(-1, -1, 4))
        levels = levels_of(regions.flatten(0, 1), *heads.box_pooler.level_rule)
        parts = {}
        # As in Detectron2, heads get the boxes before they are scaled.
        if heads.mask_on:
            features = [pyramid[level] for level in heads.mask_in_features]
            logits = heads.mask_head.layers(_pool(heads.mask_pooler, features, found.boxes))
            if logits.shape[1] > 1:
                side = logits.shape[-1]
                of_class = found.classes.view(-1, 1, 1, 1).expand(-1, 1, side, side)
                logits = logits.gather(1, of_class)
            parts["masks"] = logits[:, 0].float().sigmoid().unflatten(0, found.scores.shape)
        if heads.keypoint_on:
            features = [pyramid[level] for level in heads.keypoint_in_features]
            logits = heads.keypoint_head.layers(_pool(heads.keypoint_pooler, features, found.boxes))
            parts["heatmaps"] = logits.float().unflatten(0, found.scores.shape)
        return _scaled(found, geometry, levels.view_as(found.classes), **parts)

    def _boxes(self, pyramid: dict[str, Tensor], proposals: _Found, geometry: Geometry) -> _Found:
        heads = self.model.roi_heads
        features = [pyramid[level] for level in heads.box_in_features]
        is_cascade = isinstance(heads, CascadeROIHeads)
        stages = (
            zip(heads.box_head, heads.box_predictor, strict=True)
            if is_cascade
            else [(heads.box_head, heads.box_predictor)]
        )
        boxes, probabilities = proposals.boxes, []
        for number, (head, predictor) in enumerate(stages):
            regions = boxes if number == 0 else _clipped(boxes, geometry.sizes)
            logits, deltas = predictor(head(_pool(heads.box_pooler, features, regions)))
            sigmoid = getattr(predictor, "use_sigmoid_ce", False)
            probabilities.append(logits.sigmoid() if sigmoid else logits.softmax(dim=1))
            boxes = predictor.box2box_transform.apply_deltas(deltas, regions.flatten(0, 1))
            boxes = boxes.view(*regions.shape[:2], -1)
        scores = probabilities[0]
        if is_cascade:
            scores = sum(probabilities) * (1.0 / len(probabilities))
        scores = scores.view(*regions.shape[:2], -1)
        known = torch.isfinite(boxes).all(dim=2) & torch.isfinite(scores).all(dim=2)
        known &= torch.isfinite(proposals.scores)
        scores = scores[:, :, :-1]
        passes = (scores > predictor.test_score_thresh) & known[:, :, None]
        scores = scores.masked_fill(~passes, _FAR_BELOW)
        count = scores.shape[2]
        boxes = boxes.view(*regions.shape[:2], -1, 4)
        candidate = torch.arange(scores[0].numel(), device=scores.device).expand(len(scores), -1)
        found = _suppressed(
            _clipped(boxes.flatten(1, 2), geometry.sizes),
            scores.flatten(1),
            candidate % count,
            candidate if boxes.shape[2] > 1 else candidate // count,
            predictor.test_nms_thresh,
            predictor.test_topk_per_image,
        )
        source = found.source // count if boxes.shape[2] > 1 else found.source
        return found._replace(source=source, exact=found.exact & proposals.exact)


def static_detector(model: nn.Module) -> StaticDetector:
    """The pipeline of a model.

    Args:
        model: the plugin's or a stock one; its poolers are :class:`PyramidROIPooler`, as optimised.

    Raises:
        UserError: the architecture, or a part of the model, has no pipeline; the message names it.
    """
    kinds = {
        GeneralizedRCNN: StaticRCNN,
        RetinaNet: StaticRetinaNet,
        ProposalNetwork: StaticRPN,
    }
    kind = next((kinds[each] for each in type(model).__mro__ if each in kinds), None)
    unknown = _unknown_part(model) if kind else type(model).__name__
    if unknown:
        raise UserError(f"{unknown} has no pipeline of fixed shapes")
    return kind(model)


_ANCHORS = (DefaultAnchorGenerator, KeptAnchorGenerator)
_PREDICTORS = (FastRCNNOutputLayers, BatchedFastRCNNOutputLayers)
_HEADS = (StandardROIHeads, FPNROIHeads, CascadeROIHeads, FPNCascadeROIHeads)


def _unknown_part(model: nn.Module) -> str:
    """The name of the first part whose class is not supported; empty if all are."""
    if isinstance(model, RetinaNet):
        return _unknown((model.anchor_generator, *_ANCHORS), *_decoder_of(model))
    rpn, heads = model.proposal_generator, getattr(model, "roi_heads", None)
    if rpn is None:
        return "Fast R-CNN, which reads proposals,"
    unknown = _unknown((rpn, RPN, SelectingRPN, BatchedRPN)) or _unknown(
        (rpn.anchor_generator, *_ANCHORS), *_decoder_of(rpn)
    )
    if unknown or heads is None:
        return unknown
    return _unknown((heads, *_HEADS)) or _unknown_in(heads)


def _unknown_in(heads: nn.Module) -> str:
    cascade = isinstance(heads, CascadeROIHeads)
    for predictor in heads.box_predictor if cascade else [heads.box_predictor]:
        unknown = _unknown((predictor, *_PREDICTORS), *_decoder_of(predictor))
        if unknown:
            return unknown
        if predictor.test_topk_per_image < 0:
            return "TEST.DETECTIONS_PER_IMAGE -1, for detections without limit,"
    poolers = [heads.box_pooler]
    for on, name, base in (
        (heads.mask_on, "mask", BaseMaskRCNNHead),
        (heads.keypoint_on, "keypoint", BaseKeypointRCNNHead),
    ):
        if on:
            head = getattr(heads, f"{name}_head")
            if getattr(type(head), "forward", None) is not base.forward:
                return type(head).__name__
            poolers.append(getattr(heads, f"{name}_pooler"))
    # All poolers are checked before their parts: only a pooler has level_poolers.
    return _unknown(*((pooler, PyramidROIPooler) for pooler in poolers)) or _unknown(
        *((pooler.level_poolers[0], ROIAlign) for pooler in poolers)
    )


def _decoder_of(owner: nn.Module) -> list[tuple[object, type]]:
    return [(owner.box2box_transform, Box2BoxTransform)]


def _unknown(*parts: tuple[object, ...]) -> str:
    """The name of the class of the first part that is none of the classes next to it."""
    return next((type(part).__name__ for part, *known in parts if type(part) not in known), "")


def _best_of_levels(scores: list[Tensor], most: int) -> tuple[list[Tensor], list[Tensor]]:
    """The best ``(N, K)`` scores of each level, highest first, and their indices, in one step.

    A level with fewer than ``most`` scores gives all of them.
    """
    images, longest = len(scores[0]), max(of_level.shape[1] for of_level in scores)
    table = scores[0].new_full((images, len(scores), longest), _FAR_BELOW)
    for number, of_level in enumerate(scores):
        table[:, number, : of_level.shape[1]] = of_level
    both = table.topk(min(most, longest), dim=2)
    counts = [of_level.shape[1] for of_level in scores]
    top, index = (
        [rows[:, :count] for rows, count in zip(part.unbind(1), counts, strict=True)]
        for part in both
    )
    return top, index


def _by_anchor(deltas: list[Tensor]) -> list[Tensor]:
    return [permute_to_N_HWA_K(of_level, 4) for of_level in deltas]


def _suppressed(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    source: Tensor,
    threshold: float,
    most: int,
) -> _Found:
    """Suppression within classes, among M candidates of each image.

    Args:
        boxes: ``(N, B, 4)``.
        scores: ``(N, M)``, -inf for unused entries.
        classes: ``(N, M)``.
        source: ``(N, M)``, the index of each candidate's box.
        threshold: see :func:`nms_mask`.
        most: largest number of detections of an image.
    """
    # A box is suppressed only by boxes with higher scores, so the best ones can be taken first.
    top, index = scores.topk(min(_CANDIDATES, scores.shape[1]), dim=1)
    classes, source = classes.gather(1, index), source.gather(1, index)
    boxes = boxes.gather(1, source[:, :, None].expand(-1, -1, 4))
    keep, exact = nms_mask(boxes, top > _FAR_BELOW, threshold, classes)
    kept = top.masked_fill(~keep, _FAR_BELOW)
    best, order = kept.topk(min(most, kept.shape[1]), dim=1)
    enough = (best > _FAR_BELOW).sum(dim=1) == most
    all_seen = (scores > _FAR_BELOW).sum(dim=1) <= top.shape[1]
    return _Found(
        boxes.gather(1, order[:, :, None].expand(-1, -1, 4)),
        best,
        classes.gather(1, order),
        source.gather(1, order),
        exact & (enough | all_seen),
    )


def _scaled(
    found: _Found, geometry: Geometry, levels: Tensor | None = None, **parts: Tensor
) -> FixedDetections:
    """Detectron2's ``detector_postprocess``, without masks and keypoints."""
    boxes = found.boxes * geometry.scales.repeat(1, 2)[:, None]
    boxes = _clipped(boxes, geometry.output_sizes)
    there = (found.scores > _FAR_BELOW) & ((boxes[:, :, 2:] - boxes[:, :, :2]) > 0).all(dim=2)
    order = (~there).to(torch.uint8).sort(dim=1, stable=True).indices

    def in_order(values: Tensor) -> Tensor:
        index = order.view(*order.shape, *[1] * (values.ndim - 2)).expand_as(values)
        return values.gather(1, index)

    levels = torch.zeros_like(found.classes) if levels is None else levels
    values = (boxes, found.scores, found.classes, levels)
    return FixedDetections(
        *map(in_order, values),
        there.sum(dim=1),
        found.exact,
        in_order(found.boxes),
        **{name: in_order(part) for name, part in parts.items()},
    )


def _clipped(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clips ``(N, M, 4)`` boxes to ``(N, 2)`` heights and widths."""
    return torch.minimum(boxes.clamp(min=0), sizes.flip(1).repeat(1, 2)[:, None])


def _pool(pooler: PyramidROIPooler, features: list[Tensor], boxes: Tensor) -> Tensor:
    """Pools ``(N, M, 4)`` boxes: ``(N * M, C, h, w)``. Non-finite coordinates become 0."""
    boxes = boxes.nan_to_num(0.0, 0.0, 0.0)
    images = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)
    rois = torch.cat([images[:, None, None].expand(-1, boxes.shape[1], 1), boxes], dim=2)
    align = pooler.level_poolers[0]
    return pyramid_roi_align(
        features,
        rois.flatten(0, 1),
        pooler.level_rule,
        [each.spatial_scale for each in pooler.level_poolers],
        align.output_size,
        align.sampling_ratio,
        align.aligned,
    )

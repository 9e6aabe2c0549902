"""What a trained model did with one image, level by level."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.modeling import RetinaNet
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn

from fpn_plugin.data import channels_first, resized_picture, rgb_of
from fpn_plugin.engine.inference import recorded_levels
from fpn_plugin.errors import UserError
from fpn_plugin.modeling import assign_levels

from .level_observer import box_pooling

__all__ = ["Glimpse", "Regions", "glimpse"]

_FOUND_IOU = 0.5


@dataclass(frozen=True)
class Regions:
    """Boxes, each with a level.

    Attributes:
        boxes: float32 ``(N, 4)`` XYXY in pixels of the network's input.
        levels: N names, "p2" for example; "" where a box has none.
        scores: float32 ``(N,)``: of detections; objectness logits of proposals; 1 otherwise.
        classes: int64 ``(N,)``; -1 where there are none.
        keypoints: float32 ``(N, K, 2)``, x and y in the same pixels; None where there are none.
    """

    boxes: Tensor
    levels: tuple[str, ...]
    scores: Tensor
    classes: Tensor
    keypoints: Tensor | None = None

    def __len__(self) -> int:
        return len(self.levels)

    def first(self, count: int) -> Regions:
        """The first so many."""
        return self.chosen(torch.arange(len(self)) < count)

    def chosen(self, keep: Tensor) -> Regions:
        """Those that a boolean ``(N,)`` says."""
        levels = tuple(v for v, kept in zip(self.levels, keep.tolist(), strict=True) if kept)
        points = None if self.keypoints is None else self.keypoints[keep]
        return Regions(self.boxes[keep], levels, self.scores[keep], self.classes[keep], points)


@dataclass(frozen=True)
class Glimpse:
    """One image, and what was seen of a model that looked at it. None: the model has no such part.

    Attributes:
        image: uint8 RGB ``(H, W, 3)``, resized as the network sees it, without padding.
        features: ``{level: (C, h, w)}``, float32, finest first, cells that begin on the image.
        strides: of each level.
        proposed: the RPN's proposals, best first, by the level whose anchors gave them.
        pooled: what the box head pooled, by Eq. (1)'s level.
        detections: best first, by the level each was pooled from.
        truths: ground truth, crowds left out; None without labels.
        matched: anchors that match ground truth, by their level; None without labels.
    """

    image: np.ndarray
    features: dict[str, Tensor]
    strides: dict[str, int]
    proposed: Regions | None
    pooled: Regions | None
    detections: Regions | None
    truths: Regions | None
    matched: Regions | None

    def correct(self, threshold: float = 0.0) -> Regions | None:
        """Detections of that score or more that have an object of their class with an IoU of 0.5 or
        more to themselves; None without labels.
        """
        if self.detections is None or self.truths is None:
            return None
        sure = self.detections.chosen(self.detections.scores >= threshold)
        overlaps = _overlaps(sure, self.truths)
        overlaps[sure.classes[:, None] != self.truths.classes] = 0
        return sure.chosen(_first_hits(overlaps))

    def covering(self, count: int) -> Regions | None:
        """Of the so many best proposals those that have an object, of any class, with an IoU of 0.5
        or more to themselves; None without labels or RPN.
        """
        if self.proposed is None or self.truths is None:
            return None
        best = self.proposed.first(count)
        return best.chosen(_first_hits(_overlaps(best, self.truths)))


def _overlaps(regions: Regions, truths: Regions) -> Tensor:
    return pairwise_iou(Boxes(regions.boxes), Boxes(truths.boxes))


def _first_hits(overlaps: Tensor) -> Tensor:
    """Which boxes, in order, have a column of 0.5 or more that none before took."""
    hits = torch.zeros(len(overlaps), dtype=torch.bool)
    for index in range(len(overlaps) if overlaps.shape[1] else 0):
        best, truth = overlaps[index].max(dim=0)
        if best >= _FOUND_IOU:
            hits[index] = True
            overlaps[:, truth] = 0
    return hits


@torch.no_grad()
def glimpse(
    model: nn.Module,
    cfg: CfgNode,
    image: np.ndarray,
    annotations: Sequence[dict[str, Any]] | None = None,
) -> Glimpse:
    """Runs a model on an image and keeps what it did.

    Args:
        model: trained, in evaluation mode.
        cfg: its config, for the resizing and the order of channels.
        image: as :func:`fpn_plugin.data.read_picture` reads it for that config.
        annotations: Detectron2's, in pixels of ``image``; they are not changed.

    Raises:
        UserError: the model needs proposals from a file.
    """
    if getattr(model, "proposal_generator", 0) is None:
        raise UserError(
            "the model reads its proposals from a file (MODEL.PROPOSAL_GENERATOR.NAME "
            "PrecomputedProposals); an image alone is not enough for it"
        )
    resized, transform = resized_picture(cfg, image)
    height, width = resized.shape[:2]
    seen: dict[str, Any] = {}
    with _watched(model, seen), recorded_levels(model):
        given = {"image": channels_first(cfg, resized), "height": height, "width": width}
        [output] = model([given])
    strides = {name: shape.stride for name, shape in model.backbone.output_shape().items()}
    names = sorted(strides, key=lambda name: strides[name])
    truths = matched = None
    if annotations is not None:
        wanted = _labels(annotations, transform, (height, width))
        truths = _regions(wanted.gt_boxes.tensor, [""] * len(wanted), None, wanted.gt_classes)
        matched = _matched(model, seen, wanted)
    return Glimpse(
        image=rgb_of(cfg, resized),
        features={
            name: seen["maps"][name][0, :, : -(-height // s), : -(-width // s)].float().cpu()
            for name in names
            for s in [strides[name]]
        },
        strides={name: strides[name] for name in names},
        proposed=_proposed(model, seen, (height, width)),
        pooled=_pooled(model, seen),
        detections=_detections(model, output),
        truths=truths,
        matched=matched,
    )


@contextmanager
def _watched(model: nn.Module, seen: dict[str, Any]) -> Iterator[None]:
    """Keeps the backbone's maps, and anchors, predictions and proposals of the RPN."""
    hook = model.backbone.register_forward_hook(lambda _, __, maps: seen.update(maps=maps))
    rpn = getattr(model, "proposal_generator", None)
    if not isinstance(rpn, RPN):
        try:
            yield
        finally:
            hook.remove()
        return
    predict = rpn.predict_proposals

    def keeping(anchors: Any, logits: Any, deltas: Any, sizes: Any) -> list[Instances]:
        proposals = predict(anchors, logits, deltas, sizes)
        seen.update(anchors=anchors, logits=logits, deltas=deltas, proposals=proposals[0])
        return proposals

    try:
        with mock.patch.object(rpn, "predict_proposals", keeping):
            yield
    finally:
        hook.remove()


def _regions(
    boxes: Tensor, levels: Sequence[str], scores: Tensor | None, classes: Tensor | None
) -> Regions:
    return Regions(
        boxes.cpu().float(),
        tuple(levels),
        torch.ones(len(boxes)) if scores is None else scores.cpu().float(),
        torch.full((len(boxes),), -1) if classes is None else classes.cpu(),
    )


def _proposed(model: nn.Module, seen: dict[str, Any], size: tuple[int, int]) -> Regions | None:
    """Finds each proposal among what the RPN decoded: its box and logit are copies, bit for bit."""
    if "proposals" not in seen:
        return None
    rpn, found = model.proposal_generator, seen["proposals"]
    level_of: dict[bytes, str] = {}
    decoded = rpn._decode_proposals(seen["anchors"], seen["deltas"])
    for name, boxes, logits in zip(rpn.in_features, decoded, seen["logits"], strict=True):
        clipped = Boxes(boxes[0].clone())
        clipped.clip(size)
        for row in _rows(clipped.tensor, logits[0]):
            level_of.setdefault(row, name)
    boxes, logits = found.proposal_boxes.tensor, found.objectness_logits
    return _regions(boxes, [level_of.get(row, "") for row in _rows(boxes, logits)], logits, None)


def _rows(boxes: Tensor, logits: Tensor) -> list[bytes]:
    table = torch.cat([boxes.float(), logits.float()[:, None]], dim=1) + 0.0  # no negative zeros
    return [row.tobytes() for row in table.cpu().numpy()]


def _pooled(model: nn.Module, seen: dict[str, Any]) -> Regions | None:
    heads = getattr(model, "roi_heads", None)
    if heads is None or "proposals" not in seen:
        return None
    found = seen["proposals"]
    boxes = found.proposal_boxes.tensor
    return _regions(boxes, _pooling_levels(heads)(boxes), found.objectness_logits, None)


def _pooling_levels(heads: nn.Module) -> Callable[[Tensor], list[str]]:
    names, pooler = box_pooling(heads)
    if len(names) == 1:
        return lambda boxes: names * len(boxes)

    def levels(boxes: Tensor) -> list[str]:
        numbers = assign_levels(
            boxes,
            pooler.min_level,
            pooler.max_level,
            pooler.canonical_box_size,
            pooler.canonical_level,
        )
        return [names[number - pooler.min_level] for number in numbers.tolist()]

    return levels


def _detections(model: nn.Module, output: dict[str, Any]) -> Regions | None:
    if "instances" not in output:
        return None
    found = output["instances"]
    levels = [""] * len(found)
    heads = getattr(model, "roi_heads", None)
    if heads is not None:
        names, pooler = box_pooling(heads)
        if found.has("pyramid_level"):
            levels = [names[k - pooler.min_level] for k in found.pyramid_level.tolist()]
        elif len(names) == 1:
            levels = names * len(found)
    regions = _regions(found.pred_boxes.tensor, levels, found.scores, found.pred_classes)
    if not found.has("pred_keypoints"):
        return regions
    return replace(regions, keypoints=found.pred_keypoints[:, :, :2].cpu().float())


def _labels(
    annotations: Sequence[dict[str, Any]], transform: T.Transform, size: tuple[int, int]
) -> Instances:
    kept = [
        {key: annotation[key] for key in ("bbox", "bbox_mode", "category_id")}
        for annotation in annotations
        if not annotation.get("iscrowd", 0)
    ]
    moved = [detection_utils.transform_instance_annotations(a, transform, size) for a in kept]
    return detection_utils.filter_empty_instances(
        detection_utils.annotations_to_instances(moved, size)
    )


def _matched(model: nn.Module, seen: dict[str, Any], wanted: Instances) -> Regions | None:
    device = seen["maps"][next(iter(seen["maps"]))].device
    wanted = wanted.to(device)
    if isinstance(model, RetinaNet):
        names = model.head_in_features
        anchors = model.anchor_generator([seen["maps"][name] for name in names])
        [labels], _ = model.label_anchors(anchors, [wanted])
        positive = (labels >= 0) & (labels != model.num_classes)
    elif "anchors" in seen:
        rpn, anchors = model.proposal_generator, seen["anchors"]
        names = rpn.in_features
        with mock.patch.object(rpn, "_subsample_labels", lambda labels: labels):
            [labels], _ = rpn.label_and_sample_anchors(anchors, [wanted])
        positive = labels == 1
    else:
        return None
    levels = [n for n, of_level in zip(names, anchors, strict=True) for _ in range(len(of_level))]
    boxes = torch.cat([of_level.tensor for of_level in anchors])
    return _regions(boxes, levels, None, None).chosen(positive.cpu())

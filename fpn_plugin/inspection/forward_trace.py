"""The regions and features of a trained model on one image, by pyramid level."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

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
from fpn_plugin.errors import UserError
from fpn_plugin.modeling import PyramidROIPooler

from .level_observer import (
    argument,
    box_pooling,
    keep_outputs,
    matched_anchors,
    pooling_levels,
    rpn_predictions,
)

__all__ = ["ForwardTrace", "Regions", "forward_trace", "recorded_levels"]

_FOUND_IOU = 0.5


@dataclass(frozen=True)
class Regions:
    """Boxes, each with a level.

    Attributes:
        boxes: float32 ``(N, 4)`` XYXY in pixels of the network's input.
        levels: N names, for example "p2"; "" for a box without a level.
        scores: float32 ``(N,)``: of detections; objectness logits of proposals; 1 otherwise.
        classes: int64 ``(N,)``; -1 without classes.
        keypoints: float32 ``(N, K, 2)``, x and y in the same pixels; None without keypoints.
    """

    boxes: Tensor
    levels: tuple[str, ...]
    scores: Tensor
    classes: Tensor
    keypoints: Tensor | None = None

    def __len__(self) -> int:
        return len(self.levels)

    def first(self, count: int) -> Regions:
        """The first ``count``."""
        return self.chosen(torch.arange(len(self)) < count)

    def chosen(self, keep: Tensor) -> Regions:
        """Those for which the boolean ``(N,)`` is true."""
        levels = tuple(v for v, kept in zip(self.levels, keep.tolist(), strict=True) if kept)
        points = None if self.keypoints is None else self.keypoints[keep]
        return Regions(self.boxes[keep], levels, self.scores[keep], self.classes[keep], points)


@dataclass(frozen=True)
class ForwardTrace:
    """What a model did with one image. None stands for parts that it lacks.

    Attributes:
        image: uint8 RGB ``(H, W, 3)``, resized as the network sees it, without padding.
        features: ``{level: (C, h, w)}``, float32, finest first, without cells of the padding.
        strides: of each level.
        proposed: the RPN's proposals, best first, with the level of their anchors.
        pooled: the regions that the box head pooled, with Eq. (1)'s level.
        detections: best first, with the level that each was pooled from.
        truths: ground truth without crowds; None without labels.
        matched: anchors that match ground truth, with their level; None without labels.
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
        """Detections of at least that score with an object of their class at an IoU of 0.5 or more,
        one for each object; None without labels.
        """
        if self.detections is None or self.truths is None:
            return None
        sure = self.detections.chosen(self.detections.scores >= threshold)
        overlaps = _overlaps(sure, self.truths)
        overlaps[sure.classes[:, None] != self.truths.classes] = 0
        return sure.chosen(_first_hits(overlaps))

    def covering(self, count: int) -> Regions | None:
        """Of the ``count`` best proposals those with an object of any class at an IoU of 0.5 or
        more, one for each object; None without labels or RPN.
        """
        if self.proposed is None or self.truths is None:
            return None
        best = self.proposed.first(count)
        return best.chosen(_first_hits(_overlaps(best, self.truths)))


def _overlaps(regions: Regions, truths: Regions) -> Tensor:
    return pairwise_iou(Boxes(regions.boxes), Boxes(truths.boxes))


def _first_hits(overlaps: Tensor) -> Tensor:
    """Which boxes, in order, have an IoU of 0.5 with an object that no earlier box has taken."""
    hits = torch.zeros(len(overlaps), dtype=torch.bool)
    for index in range(len(overlaps) if overlaps.shape[1] else 0):
        best, truth = overlaps[index].max(dim=0)
        if best >= _FOUND_IOU:
            hits[index] = True
            overlaps[:, truth] = 0
    return hits


@torch.no_grad()
def forward_trace(
    model: nn.Module,
    cfg: CfgNode,
    image: np.ndarray,
    annotations: Sequence[dict[str, Any]] | None = None,
) -> ForwardTrace:
    """Runs a model on an image and keeps its intermediate results.

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
            "PrecomputedProposals); it cannot run on an image only"
        )
    resized, transform = resized_picture(cfg, image)
    height, width = resized.shape[:2]
    rpn = getattr(model, "proposal_generator", None)
    parts = {"maps": model.backbone}
    if isinstance(rpn, RPN):
        parts |= {"rpn": rpn, "anchors": rpn.anchor_generator, "predictions": rpn.rpn_head}
    with ExitStack() as hooks, recorded_levels(model):
        kept = keep_outputs(hooks, **parts)
        given = {"image": channels_first(cfg, resized), "height": height, "width": width}
        [output] = model([given])
    strides = {name: shape.stride for name, shape in model.backbone.output_shape().items()}
    names = sorted(strides, key=lambda name: strides[name])
    truths = matched = None
    if annotations is not None:
        labels = _labels(annotations, transform, (height, width))
        truths = _regions(labels.gt_boxes.tensor, [""] * len(labels), None, labels.gt_classes)
        matched = _matched(model, kept, labels)
    return ForwardTrace(
        image=rgb_of(cfg, resized),
        features={
            name: kept["maps"][name][0, :, : -(-height // s), : -(-width // s)].float().cpu()
            for name in names
            for s in [strides[name]]
        },
        strides={name: strides[name] for name in names},
        proposed=_proposed(model, kept, (height, width)),
        pooled=_pooled(model, kept),
        detections=_detections(model, output),
        truths=truths,
        matched=matched,
    )


@contextmanager
def recorded_levels(model: nn.Module) -> Iterator[None]:
    """Gives detections of an R-CNN model ``pyramid_level``. Other models do not change.

    A detection was pooled for the box of its proposal, not for its own. Only the box predictor's
    ``inference`` knows the proposal, so it is called once more on the same predictions.

    Args:
        model: in evaluation mode.
    """
    heads = getattr(model, "roi_heads", None)
    pooler = getattr(heads, "box_pooler", None)
    predictor = getattr(heads, "box_predictor", None)
    # A cascade pools three times, for boxes that its predictors do not return: no levels.
    if not isinstance(pooler, PyramidROIPooler) or not hasattr(predictor, "inference"):
        yield
        return

    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        proposals = argument(args, kwargs, 2, "proposals")
        _, indices = predictor.inference(kept["predictions"], proposals)
        for found, proposed, of_image in zip(output[0], proposals, indices, strict=True):
            found.pyramid_level = pooling_levels(pooler, proposed.proposal_boxes.tensor[of_image])

    graphs = getattr(model, "graphs", None)  # they do not call heads, and record levels themselves
    with ExitStack() as hooks:
        kept = keep_outputs(hooks, predictions=predictor)
        hooks.callback(heads.register_forward_hook(record, with_kwargs=True).remove)
        if graphs is not None:
            graphs.record_levels = True
            hooks.callback(setattr, graphs, "record_levels", False)
        yield


def _regions(
    boxes: Tensor, levels: Sequence[str], scores: Tensor | None, classes: Tensor | None
) -> Regions:
    return Regions(
        boxes.cpu().float(),
        tuple(levels),
        torch.ones(len(boxes)) if scores is None else scores.cpu().float(),
        torch.full((len(boxes),), -1) if classes is None else classes.cpu(),
    )


def _proposed(model: nn.Module, kept: dict[str, Any], size: tuple[int, int]) -> Regions | None:
    """Finds each proposal among the RPN's decoded boxes: box and logit are the same, to the bit."""
    if "rpn" not in kept:
        return None
    rpn, [found] = model.proposal_generator, kept["rpn"][0]
    level_of: dict[bytes, str] = {}
    logits, deltas = rpn_predictions(rpn, *kept["predictions"])
    decoded = rpn._decode_proposals(kept["anchors"], deltas)
    for name, boxes, of_level in zip(rpn.in_features, decoded, logits, strict=True):
        clipped = Boxes(boxes[0].clone())
        clipped.clip(size)
        for row in _rows(clipped.tensor, of_level[0]):
            level_of.setdefault(row, name)
    boxes, logits = found.proposal_boxes.tensor, found.objectness_logits
    return _regions(boxes, [level_of.get(row, "") for row in _rows(boxes, logits)], logits, None)


def _rows(boxes: Tensor, logits: Tensor) -> list[bytes]:
    table = torch.cat([boxes.float(), logits.float()[:, None]], dim=1) + 0.0  # no negative zeros
    return [row.tobytes() for row in table.cpu().numpy()]


def _pooled(model: nn.Module, kept: dict[str, Any]) -> Regions | None:
    heads = getattr(model, "roi_heads", None)
    if heads is None or "rpn" not in kept:
        return None
    [found] = kept["rpn"][0]
    names, pooler = box_pooling(heads)
    numbers = pooling_levels(pooler, found.proposal_boxes.tensor) - pooler.min_level
    levels = [names[number] for number in numbers.tolist()]
    return _regions(found.proposal_boxes.tensor, levels, found.objectness_logits, None)


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


def _matched(model: nn.Module, kept: dict[str, Any], labels: Instances) -> Regions | None:
    labels = labels.to(next(iter(kept["maps"].values())).device)
    if isinstance(model, RetinaNet):
        names = model.head_in_features
        anchors = model.anchor_generator([kept["maps"][name] for name in names])
        [classes], _ = model.label_anchors(anchors, [labels])
        matched = (classes >= 0) & (classes != model.num_classes)
    elif "anchors" in kept:
        names, anchors = model.proposal_generator.in_features, kept["anchors"]
        [matched] = matched_anchors(model.proposal_generator, anchors, [labels])
    else:
        return None
    levels = [n for n, of_level in zip(names, anchors, strict=True) for _ in range(len(of_level))]
    boxes = torch.cat([of_level.tensor for of_level in anchors])
    return _regions(boxes, levels, None, None).chosen(matched.cpu())

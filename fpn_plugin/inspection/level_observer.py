"""Statistics of each pyramid level in a training step, collected by hooks.

Hooks keep the inputs and outputs of modules. After a module has run, its own methods are called
again on them: they sample labels with the same random numbers, and compute the losses of one level
at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from detectron2.modeling import RetinaNet, ROIHeads
from detectron2.modeling.meta_arch.retinanet import permute_to_N_HWA_K
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import (
    Boxes,
    Instances,
    RotatedBoxes,
    pairwise_iou,
    pairwise_iou_rotated,
)
from detectron2.utils.events import EventStorage
from detectron2.utils.memory import retry_if_cuda_oom
from torch import Tensor, nn

from fpn_plugin.errors import UserError
from fpn_plugin.modeling import assign_levels
from fpn_plugin.utils.seeding import rng_replayed, rng_state

from .level_tally import LevelTally

__all__ = [
    "anchor_levels",
    "argument",
    "box_pooling",
    "keep_outputs",
    "matched_anchors",
    "observed_levels",
    "pooling_levels",
    "rpn_predictions",
]

_RECALL_IOU = 0.5
Losses = Callable[..., dict[str, Tensor]]


@contextmanager
def observed_levels(model: nn.Module) -> Iterator[LevelTally]:
    """Collects the statistics of each level in a training step.

    Losses, gradients, random numbers and Detectron2's logs stay the same. The statistics are of the
    backbone's features, Detectron2's RPN, the box heads of its R-CNNs, RetinaNet, and their
    subclasses. Parts that a model lacks are left out. Losses of masks and keypoints are not split.

    Args:
        model: in training mode; may be wrapped for distributed training.

    Returns:
        The tally, complete after the step.
    """
    model = getattr(model, "module", model)
    tally = LevelTally()
    with ExitStack() as hooks:
        hook = model.register_forward_pre_hook(
            lambda _, args: tally.add("images", [""], torch.tensor(len(args[0])))
        )
        hooks.callback(hook.remove)
        backbone = getattr(model, "backbone", None)
        if isinstance(backbone, nn.Module):
            hook = backbone.register_forward_hook(lambda _, __, maps: _add_norms(tally, maps))
            hooks.callback(hook.remove)
        if isinstance(model, RetinaNet):
            _observe_retinanet(hooks, tally, model)
        if isinstance(getattr(model, "proposal_generator", None), RPN):
            _observe_rpn(hooks, tally, model.proposal_generator)
        heads = getattr(model, "roi_heads", None)
        if isinstance(heads, ROIHeads) and hasattr(heads, "box_predictor"):
            _observe_box_heads(hooks, tally, heads)
        yield tally


def keep_outputs(hooks: ExitStack, **modules: nn.Module) -> dict[str, Any]:
    """Keeps the last output of each module, by its given name, until ``hooks`` is closed."""
    kept: dict[str, Any] = {}
    for name, module in modules.items():

        def keep(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            kept[name] = output

        hooks.callback(module.register_forward_hook(keep).remove)
    return kept


def argument(args: Sequence[Any], kwargs: Mapping[str, Any], position: int, name: str) -> Any:
    """An argument of a hooked call, given by position or by name."""
    return kwargs[name] if name in kwargs else args[position]


@torch.no_grad()
def _add_norms(tally: LevelTally, maps: dict[str, Tensor]) -> None:
    norms = [torch.linalg.vector_norm(x, dim=1, dtype=torch.float32) for x in maps.values()]
    tally.add("norm", list(maps), torch.stack([norm.double().sum() for norm in norms]))
    tally.add("cells", list(maps), torch.tensor([norm.numel() for norm in norms]))


def _observe_rpn(hooks: ExitStack, tally: LevelTally, rpn: RPN) -> None:
    kept = keep_outputs(hooks, anchors=rpn.anchor_generator, predictions=rpn.rpn_head)
    states = []  # right before labels are sampled
    hooks.callback(rpn.rpn_head.register_forward_hook(lambda *_: states.append(rng_state())).remove)

    @torch.no_grad()
    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        anchors, truths = kept["anchors"], argument(args, kwargs, 2, "gt_instances")
        matched = torch.stack(matched_anchors(rpn, anchors, truths))
        tally.add("anchors", rpn.in_features, _sums_by_level(matched, anchors))
        logits, deltas = rpn_predictions(rpn, *kept["predictions"])
        with EventStorage(), rng_replayed(states.pop()):
            labels, boxes = rpn.label_and_sample_anchors(anchors, truths)
            parts = _dense_losses_by_level(rpn.losses, anchors, logits, labels, deltas, boxes)
        tally.add("rpn_loss", rpn.in_features, parts)
        _add_recall(tally, rpn, output[0], [of_image.gt_boxes for of_image in truths])

    hooks.callback(rpn.register_forward_hook(count, with_kwargs=True).remove)


def rpn_predictions(
    rpn: RPN, logits: Sequence[Tensor], deltas: Sequence[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """An RPN head's maps as the RPN reads them: of each level, logits ``(N, H W A)`` of ``(N, A, H,
    W)``, and deltas ``(N, H W A, B)`` of ``(N, A B, H, W)``.
    """
    box_dim = rpn.anchor_generator.box_dim
    return (
        [permute_to_N_HWA_K(x, 1)[:, :, 0] for x in logits],
        [permute_to_N_HWA_K(x, box_dim) for x in deltas],
    )


def matched_anchors(
    rpn: RPN, anchors: Sequence[Boxes], truths: Sequence[Instances]
) -> list[Tensor]:
    """Which anchors the RPN's matcher gives an object, before sampling: bool over the anchors of
    all levels, for each image.
    """
    every = type(anchors[0]).cat(list(anchors))
    iou = pairwise_iou_rotated if isinstance(every, RotatedBoxes) else pairwise_iou
    matched = []
    for of_image in truths:
        # On the CPU if the GPU's memory is too small, as in Detectron2.
        overlaps = retry_if_cuda_oom(iou)(of_image.gt_boxes, every)
        labels = retry_if_cuda_oom(rpn.anchor_matcher)(overlaps)[1].to(every.device)
        if rpn.anchor_boundary_thresh >= 0:
            labels[~every.inside_box(of_image.image_size, rpn.anchor_boundary_thresh)] = -1
        matched.append(labels == 1)
    return matched


def _add_recall(tally: LevelTally, rpn: RPN, proposals: list[Instances], truths: list[Any]) -> None:
    for proposed, boxes in zip(proposals, truths, strict=True):
        if len(boxes) == 0 or not isinstance(boxes, Boxes):
            continue
        levels = anchor_levels(rpn, boxes.tensor)
        covered = torch.zeros_like(levels, dtype=torch.bool)
        if len(proposed):
            overlaps = pairwise_iou(boxes, proposed.proposal_boxes)
            covered = overlaps.max(dim=1).values >= _RECALL_IOU
        count = len(rpn.in_features)
        tally.add("objects", rpn.in_features, _counts(levels, count))
        tally.add("recalled", rpn.in_features, _counts(levels[covered], count))


def anchor_levels(rpn: RPN, boxes: Tensor) -> Tensor:
    """Finds the level whose anchors are nearest in size, as an index into ``rpn.in_features``.

    A size is the square root of an area. Distances are between logarithms of sizes: with one anchor
    size per level (section 4.1), the limit between 32 and 64 px is 45 px.

    Args:
        rpn: its anchor generator holds the anchors of a cell of each level.
        boxes: ``(N, 4)`` XYXY in pixels of the network's input.

    Returns:
        int64 ``(N,)``.
    """
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    size = 0.5 * area.clamp(min=1e-6).log2()
    distances = []
    for cell in rpn.anchor_generator.cell_anchors:
        anchors = 0.5 * ((cell[:, 2] - cell[:, 0]) * (cell[:, 3] - cell[:, 1])).log2()
        distances.append((size[:, None] - anchors.to(size)).abs().min(dim=1).values)
    return torch.stack(distances, dim=1).argmin(dim=1)


def _observe_box_heads(hooks: ExitStack, tally: LevelTally, heads: ROIHeads) -> None:
    names, pooler = box_pooling(heads)
    predictors = heads.box_predictor
    predictors = predictors if isinstance(predictors, nn.ModuleList) else [predictors]
    kept = keep_outputs(hooks, **{str(stage): module for stage, module in enumerate(predictors)})
    states = []
    hooks.callback(heads.register_forward_pre_hook(lambda *_: states.append(rng_state())).remove)

    @torch.no_grad()
    def count(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], __: Any) -> None:
        truths = argument(args, kwargs, 3, "targets")
        with EventStorage(), rng_replayed(states.pop()):
            proposals = heads.label_and_sample_proposals(
                argument(args, kwargs, 2, "proposals"), truths
            )
            for stage, predictor in enumerate(predictors):
                predictions = kept[str(stage)]
                if len(predictions[0]) != sum(map(len, proposals)):
                    raise UserError(
                        f"MODEL.FPN.LEVEL_STATS_PERIOD: {type(heads).__name__} predicts for other "
                        "boxes than its label_and_sample_proposals returns; set it to 0"
                    )
                boxes = [of_image.proposal_boxes for of_image in proposals]
                levels = pooling_levels(pooler, boxes) - pooler.min_level
                classes = torch.cat([of_image.gt_classes for of_image in proposals])
                foreground = (classes >= 0) & (classes < heads.num_classes)
                tally.add("rois", names, _counts(levels, len(names)))
                tally.add("foreground", names, _counts(levels[foreground], len(names)))
                parts = [
                    _loss_of(predictor.losses, predictions, proposals, levels == level)
                    for level in range(len(names))
                ]
                tally.add("box_loss", names, torch.stack(parts))
                if stage + 1 < len(predictors):  # the boxes of a cascade's next stage
                    boxes = predictor.predict_boxes(predictions, proposals)
                    sizes = [of_image.image_size for of_image in proposals]
                    proposals = heads._create_proposals_from_boxes(boxes, sizes)
                    proposals = heads._match_and_label_boxes(proposals, stage + 1, truths)

    hooks.callback(heads.register_forward_hook(count, with_kwargs=True).remove)


def box_pooling(heads: nn.Module) -> tuple[list[str], nn.Module]:
    """Names of the levels that RoI heads pool boxes from, finest first, and the pooler."""
    if hasattr(heads, "box_pooler"):
        return list(heads.box_in_features), heads.box_pooler
    return list(heads.in_features), heads.pooler  # Res5ROIHeads


def pooling_levels(pooler: nn.Module, boxes: Tensor | Boxes | Sequence[Boxes]) -> Tensor:
    """The level k that a pooler pools each box from, see :func:`fpn_plugin.assign_levels`."""
    ends = pooler.min_level, pooler.max_level
    return assign_levels(boxes, *ends, pooler.canonical_box_size, pooler.canonical_level)


def _loss_of(
    losses: Losses, predictions: Sequence[Tensor], proposals: Sequence[Instances], chosen: Tensor
) -> Tensor:
    """The part of the box head's losses, which are means over all RoIs, that chosen RoIs have."""
    parts = []
    by_image = chosen.split([len(of_image) for of_image in proposals])
    for of_image, mask in zip(proposals, by_image, strict=True):
        # Masks and keypoints are left out: they are slow to index, and these losses need none.
        fields = {"proposal_boxes", "gt_classes", "gt_boxes"} & of_image.get_fields().keys()
        values = {name: of_image.get(name)[mask] for name in fields}
        parts.append(Instances(of_image.image_size, **values))
    mean = sum(losses(tuple(of_rois[chosen] for of_rois in predictions), parts).values())
    return mean * (chosen.sum() / max(len(chosen), 1))


def _observe_retinanet(hooks: ExitStack, tally: LevelTally, model: RetinaNet) -> None:
    kept = keep_outputs(hooks, anchors=model.anchor_generator, predictions=model.head)

    def unnormalized(*given: Any) -> dict[str, Tensor]:
        losses = model.losses(*given)
        return {name: loss * model.loss_normalizer for name, loss in losses.items()}

    @torch.no_grad()
    def count(_: nn.Module, args: tuple[Any, ...], __: Any) -> None:
        anchors, names = kept["anchors"], model.head_in_features
        truths = [of_image["instances"].to(model.device) for of_image in args[0]]
        labels, boxes = model.label_anchors(anchors, truths)
        stacked = torch.stack(labels)
        matched = (stacked >= 0) & (stacked != model.num_classes)
        tally.add("anchors", names, _sums_by_level(matched, anchors))
        logits, deltas = (
            [permute_to_N_HWA_K(x, size) for x in maps]
            for maps, size in zip(kept["predictions"], (model.num_classes, 4), strict=True)
        )
        # Losses are divided by a running mean of matched anchors, which each call updates.
        normalizer = model.loss_normalizer
        with EventStorage():
            parts = _dense_losses_by_level(unnormalized, anchors, logits, labels, deltas, boxes)
        model.loss_normalizer = normalizer
        tally.add("box_loss", names, parts)

    hooks.callback(model.register_forward_hook(count).remove)


def _dense_losses_by_level(
    losses: Losses,
    anchors: Sequence[Boxes],
    predictions: Sequence[Tensor],
    labels: Sequence[Tensor],
    deltas: Sequence[Tensor],
    boxes: Sequence[Tensor],
) -> Tensor:
    """Detectron2's losses over anchors, which are sums, one level at a time."""
    sizes = [len(level) for level in anchors]
    labels_by_level, boxes_by_level = (
        list(zip(*(of_image.split(sizes) for of_image in values), strict=True))
        for values in (labels, boxes)
    )
    parts = []
    for level, (targets, truths) in enumerate(zip(labels_by_level, boxes_by_level, strict=True)):
        given = [anchors[level]], [predictions[level]], targets, [deltas[level]], truths
        parts.append(sum(losses(*given).values()))
    return torch.stack(parts)


def _counts(levels: Tensor, count: int) -> Tensor:
    """How often each of 0, 1, ... ``count - 1`` occurs; no transfer from the device."""
    return (levels[:, None] == torch.arange(count, device=levels.device)).sum(dim=0)


def _sums_by_level(flags: Tensor, anchors: Sequence[Boxes]) -> Tensor:
    """How many of the flags ``(N, anchors of all levels)`` are set on each level."""
    sizes = [len(level) for level in anchors]
    return torch.stack([part.sum() for part in flags.split(sizes, dim=1)])

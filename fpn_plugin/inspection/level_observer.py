"""What each level of a pyramid does in a training step, seen from outside the model.

Detectron2's methods are called as ever. For the time being they are wrapped, and what goes in and
comes out is counted by level; losses are split by giving Detectron2's own one level at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from detectron2.modeling import RetinaNet
from detectron2.modeling.proposal_generator import RPN
from detectron2.structures import Boxes, Instances, pairwise_iou
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from fpn_plugin.modeling import assign_levels

from .level_tally import LevelTally

__all__ = ["anchor_levels", "box_pooling", "observed_levels"]

_RECALL_IOU = 0.5
Losses = Callable[..., dict[str, Tensor]]


@contextmanager
def observed_levels(model: nn.Module) -> Iterator[LevelTally]:
    """Within it, what a training step does on each level is counted.

    Losses, gradients, random numbers and what Detectron2 logs stay as they are. Seen are the
    backbone's features, Detectron2's RPN, the box heads of its R-CNNs, cascades too, and
    RetinaNet; what a model lacks is left out. Losses of masks and keypoints are not split.

    Args:
        model: in training mode; may be wrapped for distributed training.

    Returns:
        The tally, complete when the step is done.
    """
    model = getattr(model, "module", model)
    tally = LevelTally()
    with ExitStack() as stack:
        hook = model.register_forward_pre_hook(lambda _, batch: _add_images(tally, *batch))
        stack.callback(hook.remove)
        backbone = getattr(model, "backbone", None)
        if isinstance(backbone, nn.Module):
            hook = backbone.register_forward_hook(lambda _, __, maps: _add_norms(tally, maps))
            stack.callback(hook.remove)
        if isinstance(model, RetinaNet):
            _observe_retinanet(stack, tally, model)
        if isinstance(getattr(model, "proposal_generator", None), RPN):
            _observe_rpn(stack, tally, model.proposal_generator)
        if hasattr(getattr(model, "roi_heads", None), "box_predictor"):
            _observe_box_heads(stack, tally, model.roi_heads)
        yield tally


def _add_images(tally: LevelTally, batch: Sequence[Any]) -> None:
    tally.add("images", [""], torch.tensor(len(batch)))


@torch.no_grad()
def _add_norms(tally: LevelTally, maps: dict[str, Tensor]) -> None:
    norms = [torch.linalg.vector_norm(x, dim=1, dtype=torch.float32) for x in maps.values()]
    tally.add("norm", list(maps), torch.stack([norm.double().sum() for norm in norms]))
    tally.add("cells", list(maps), torch.tensor([norm.numel() for norm in norms]))


def _observe_rpn(stack: ExitStack, tally: LevelTally, rpn: RPN) -> None:
    matched: list[Tensor] = []
    sample, losses = rpn._subsample_labels, rpn.losses

    def sample_and_keep(labels: Tensor) -> Tensor:
        matched.append(labels == 1)  # sampling overwrites the labels
        return sample(labels)

    def split_losses(anchors: list[Boxes], *predictions_and_labels: Any) -> dict[str, Tensor]:
        sizes = [len(level) for level in anchors]
        tally.add("anchors", rpn.in_features, _sums_by_size(torch.stack(matched), sizes))
        matched.clear()
        parts = _dense_losses_by_level(losses, anchors, *predictions_and_labels)
        tally.add("rpn_loss", rpn.in_features, parts)
        return losses(anchors, *predictions_and_labels)

    def recall(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        truths = kwargs["gt_instances"] if "gt_instances" in kwargs else args[2]
        _add_recall(tally, rpn, output[0], [of_image.gt_boxes for of_image in truths])

    stack.enter_context(mock.patch.object(rpn, "_subsample_labels", sample_and_keep))
    stack.enter_context(mock.patch.object(rpn, "losses", split_losses))
    stack.callback(rpn.register_forward_hook(recall, with_kwargs=True).remove)


@torch.no_grad()
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
    """Indices into ``rpn.in_features`` of the levels whose anchors are nearest in size.

    Sizes are square roots of areas, and distances those of their logarithms: with one anchor size
    a level (section 4.1), boxes change level halfway between, at 45 px for 32 and 64 px.

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


def _observe_box_heads(stack: ExitStack, tally: LevelTally, heads: nn.Module) -> None:
    predictors = heads.box_predictor
    for predictor in predictors if isinstance(predictors, nn.ModuleList) else [predictors]:
        wrapper = _observing_losses(tally, heads, predictor)
        stack.enter_context(mock.patch.object(predictor, "losses", wrapper))


def box_pooling(heads: nn.Module) -> tuple[list[str], nn.Module]:
    """Names of the levels that RoI heads pool boxes from, finest first, and the pooler."""
    if hasattr(heads, "box_pooler"):
        return list(heads.box_in_features), heads.box_pooler
    return list(heads.in_features), heads.pooler  # Res5ROIHeads


def _observing_losses(tally: LevelTally, heads: nn.Module, predictor: nn.Module) -> Losses:
    names, pooler = box_pooling(heads)
    losses = predictor.losses

    def observing(
        predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        levels = assign_levels(
            [of_image.proposal_boxes for of_image in proposals],
            pooler.min_level,
            pooler.max_level,
            pooler.canonical_box_size,
            pooler.canonical_level,
        )
        levels = levels - pooler.min_level
        classes = torch.cat([of_image.gt_classes for of_image in proposals])
        foreground = (classes >= 0) & (classes < heads.num_classes)
        tally.add("rois", names, _counts(levels, len(names)))
        tally.add("foreground", names, _counts(levels[foreground], len(names)))
        # Federated loss draws random classes; what is drawn here is not to change what is later.
        devices = [levels.device] if levels.is_cuda else []
        drawn = torch.random.fork_rng(devices, enabled=getattr(predictor, "use_fed_loss", False))
        with EventStorage(), drawn, torch.no_grad():
            parts = [
                _loss_of(losses, predictions, proposals, levels == level)
                for level in range(len(names))
            ]
        tally.add("box_loss", names, torch.stack(parts))
        return losses(predictions, proposals)

    return observing


def _loss_of(
    losses: Losses,
    predictions: tuple[Tensor, Tensor],
    proposals: Sequence[Instances],
    chosen: Tensor,
) -> Tensor:
    """What some of the RoIs add to the box head's losses, which are means over all of them."""
    parts = []
    by_image = chosen.split([len(of_image) for of_image in proposals])
    for of_image, mask in zip(proposals, by_image, strict=True):
        # Masks and keypoints, which are slow to index, are not read.
        fields = {"proposal_boxes", "gt_classes", "gt_boxes"} & of_image.get_fields().keys()
        values = {name: of_image.get(name)[mask] for name in fields}
        parts.append(Instances(of_image.image_size, **values))
    mean = sum(losses(tuple(of_rois[chosen] for of_rois in predictions), parts).values())
    return mean * (chosen.sum() / max(len(chosen), 1))


def _observe_retinanet(stack: ExitStack, tally: LevelTally, model: RetinaNet) -> None:
    names, losses = model.head_in_features, model.losses

    def split_losses(
        anchors: list[Boxes], logits: Any, labels: list[Tensor], *deltas_and_boxes: Any
    ) -> dict[str, Tensor]:
        sizes = [len(level) for level in anchors]
        stacked = torch.stack(labels)
        matched = (stacked >= 0) & (stacked != model.num_classes)
        tally.add("anchors", names, _sums_by_size(matched, sizes))
        # The normalizer is a running mean, the same for all levels: shares do without it.
        with mock.patch.object(model, "_ema_update", lambda *_: 1.0):
            parts = _dense_losses_by_level(losses, anchors, logits, labels, *deltas_and_boxes)
        tally.add("box_loss", names, parts)
        return losses(anchors, logits, labels, *deltas_and_boxes)

    stack.enter_context(mock.patch.object(model, "losses", split_losses))


@torch.no_grad()
def _dense_losses_by_level(
    losses: Losses,
    anchors: Sequence[Boxes],
    predictions: Sequence[Tensor],
    labels: Sequence[Tensor],
    deltas: Sequence[Tensor],
    boxes: Sequence[Tensor],
) -> Tensor:
    """Losses over anchors, by Detectron2, of each level alone; they are sums over anchors."""
    sizes = [len(level) for level in anchors]
    labels_by_image = [of_image.split(sizes) for of_image in labels]
    boxes_by_image = [of_image.split(sizes) for of_image in boxes]
    parts = []
    with EventStorage():
        for level in range(len(anchors)):
            of_level = losses(
                [anchors[level]],
                [predictions[level]],
                [of_image[level] for of_image in labels_by_image],
                [deltas[level]],
                [of_image[level] for of_image in boxes_by_image],
            )
            parts.append(sum(of_level.values()))
    return torch.stack(parts)


def _counts(levels: Tensor, count: int) -> Tensor:
    """How many of the indices are each of ``0 ... count - 1``, without leaving the device."""
    return (levels[:, None] == torch.arange(count, device=levels.device)).sum(dim=0)


def _sums_by_size(flags: Tensor, sizes: Sequence[int]) -> Tensor:
    """Of flags ``(N, sum(sizes))``, how many are set in each of the stretches."""
    return torch.stack([part.sum() for part in flags.split(list(sizes), dim=1)])

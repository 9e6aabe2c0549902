"""Detectron2's anchors, matcher, RPN and box predictor, which here seldom wait for a GPU."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from detectron2.layers import cat, cross_entropy
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform, _dense_box_regression_loss
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection._utils import encode_boxes

from fpn_plugin.kernels import select_proposals
from fpn_plugin.modeling.sampling import sample_labels

__all__ = [
    "BatchedFastRCNNOutputLayers",
    "BatchedRPN",
    "KeptAnchorGenerator",
    "PatientMatcher",
    "decoded",
    "decoded_best",
]


def decoded_best(
    rpn: RPN, anchors: list[Boxes], logits: list[Tensor], deltas: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """Decodes the anchors with the highest logits of each level and image.

    Args:
        rpn: its settings say how many; it has the box transform.
        anchors: K boxes of each level.
        logits: ``(N, K)`` of each level.
        deltas: ``(N, K, box_dim)`` of each level.

    Returns:
        Boxes ``(N, k, box_dim)``, in pixels of the network's input, and logits ``(N, k)`` of each
        level, highest logit first.
    """
    most = rpn.pre_nms_topk[rpn.training]
    best = [of_level.topk(min(most, of_level.shape[1]), dim=1) for of_level in logits]
    scores, indices = map(list, zip(*best, strict=True))
    tensors = [of_level.tensor for of_level in anchors]
    return decoded(rpn.box2box_transform, tensors, deltas, indices), scores


def decoded(
    transform: Box2BoxTransform,
    anchors: Sequence[Tensor],
    deltas: Sequence[Tensor],
    indices: Sequence[Tensor],
) -> list[Tensor]:
    """Decodes the anchors at some indices, all levels in one step.

    Args:
        transform: of Detectron2.
        anchors: ``(K, box_dim)`` of each level.
        deltas: ``(N, K, box_dim)`` of each level.
        indices: int64 ``(N, k)`` of each level.

    Returns:
        Boxes ``(N, k, box_dim)`` of each level.
    """
    starts = itertools.accumulate((len(of_level) for of_level in anchors), initial=0)
    index = torch.cat([at + start for at, start in zip(indices, starts, strict=False)], dim=1)
    box_dim = anchors[0].shape[1]
    picked = torch.cat(list(deltas), dim=1).gather(1, index[:, :, None].expand(-1, -1, box_dim))
    of_anchor = torch.cat(list(anchors))[index.flatten()]
    boxes = transform.apply_deltas(picked.flatten(0, 1), of_anchor).view(*index.shape, box_dim)
    return list(boxes.split([at.shape[1] for at in indices], dim=1))


class KeptAnchorGenerator(DefaultAnchorGenerator):
    """Detectron2's anchors; in training, cut from those of the largest maps so far, which are kept.

    Detectron2's generator makes the grid of each level on the host in each call, and waits for a
    GPU twice a level.
    """

    _grids: Sequence[Tensor] = ()  # (H, W, A, 4) of each level

    def _grid_anchors(self, grid_sizes: Sequence[Sequence[int]]) -> list[Tensor]:
        if not self.training:
            return super()._grid_anchors(grid_sizes)
        kept = [tuple(grid.shape[:2]) for grid in self._grids] or [(0, 0)] * len(grid_sizes)
        largest = [
            (max(height, kept_height), max(width, kept_width))
            for (height, width), (kept_height, kept_width) in zip(grid_sizes, kept, strict=True)
        ]
        device = next(iter(self.cell_anchors)).device
        if largest != kept or self._grids[0].device != device:
            made = super()._grid_anchors(largest)
            self._grids = [of.view(*size, -1, 4) for of, size in zip(made, largest, strict=True)]
        return [
            grid[:height, :width].reshape(-1, 4)
            for grid, (height, width) in zip(self._grids, grid_sizes, strict=True)
        ]


class _UncheckedTransform(Box2BoxTransform):
    """Detectron2's check of boxes waits for a GPU, and is left out. The loss of a box without width
    is not finite, which stops a training too.
    """

    def get_deltas(self, src_boxes: Tensor, target_boxes: Tensor) -> Tensor:
        return encode_boxes(target_boxes, src_boxes, torch.tensor(self.weights))


def _unchecked(transform: Any) -> Any:
    if type(transform) is not Box2BoxTransform:
        return transform
    return _UncheckedTransform(transform.weights, transform.scale_clamp)


class PatientMatcher(Matcher):
    """Detectron2's Matcher, without operators that wait for a GPU."""

    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Gives N boxes their best ground truth, an int64 index, and a label, int8.

        Args:
            match_quality_matrix: ``(M, N)``, of M ground truths; M may be 0.
        """
        if match_quality_matrix.numel() == 0:
            return super().__call__(match_quality_matrix)
        values, matches = match_quality_matrix.max(dim=0)
        labels = torch.ones_like(matches, dtype=torch.int8)
        for label, low, high in zip(
            self.labels, self.thresholds[:-1], self.thresholds[1:], strict=True
        ):
            labels.masked_fill_((values >= low) & (values < high), label)
        if self.allow_low_quality_matches:
            self.set_low_quality_matches_(labels, match_quality_matrix)
        return matches, labels

    def set_low_quality_matches_(self, match_labels: Tensor, match_quality_matrix: Tensor) -> None:
        """Sets the label of each ground truth's best boxes to 1, in place."""
        best = match_quality_matrix.max(dim=1, keepdim=True).values
        match_labels.masked_fill_((match_quality_matrix == best).any(dim=0), 1)


class BatchedRPN(RPN):
    """Detectron2's RPN: the same losses up to the order of summation, the same proposals, and the
    same random numbers.

    It waits for a GPU twice: for the numbers of anchors to sample from, and for the numbers of
    proposals. Detectron2's waits four times an image.
    """

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See :meth:`RPN.label_and_sample_anchors`; also logs what Detectron2's losses log."""
        labels, boxes = super().label_and_sample_anchors(anchors, gt_instances)
        samples = sample_labels(labels, self.batch_size_per_image, self.positive_fraction, 0)
        for label, (positive, negative) in zip(labels, samples, strict=True):
            label.fill_(-1).index_fill_(0, positive, 1).index_fill_(0, negative, 0)
        storage = get_event_storage()
        for name, indices in zip(("pos", "neg"), zip(*samples, strict=True), strict=True):
            count = sum(map(len, indices))
            storage.put_scalar(f"rpn/num_{name}_anchors", count / len(labels))
        return labels, boxes

    def _subsample_labels(self, label: Tensor) -> Tensor:
        return label  # the labels of all images are sampled at once

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """See :meth:`RPN.losses`; always over the largest number of anchors that may be sampled."""
        labels = torch.stack(gt_labels)
        most = min(self.batch_size_per_image, labels.shape[1])
        labels, at = labels.to(torch.float32).topk(most, dim=1)  # 1 and 0 before -1
        each = at[:, :, None].expand(-1, -1, self.anchor_generator.box_dim)
        boxes = Boxes.cat(anchors).tensor[at]
        # The truth and the prediction of an anchor that is not positive are the anchor: no loss.
        positive = (labels == 1)[:, :, None]
        deltas = torch.where(positive, cat(pred_anchor_deltas, dim=1).gather(1, each), 0.0)
        truths = torch.where(positive, torch.stack(gt_boxes).gather(1, each), boxes)
        localization = _dense_box_regression_loss(
            [boxes.flatten(0, 1)],
            _unchecked(self.box2box_transform),
            [deltas.flatten(0, 1)[None]],
            [truths.flatten(0, 1)],
            ...,
            self.box_reg_loss_type,
            self.smooth_l1_beta,
        )
        objectness = F.binary_cross_entropy_with_logits(
            cat(pred_objectness_logits, dim=1).gather(1, at),
            labels.clamp(min=0),
            weight=(labels >= 0).float(),
            reduction="sum",
        )
        normalizer = self.batch_size_per_image * len(gt_labels)
        losses = {"loss_rpn_cls": objectness, "loss_rpn_loc": localization}
        return {
            name: loss / normalizer * self.loss_weight.get(name, 1.0)
            for name, loss in losses.items()
        }

    @torch.no_grad()
    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """See :meth:`RPN.predict_proposals`; only boxes of the best anchors are decoded."""
        given = anchors, pred_objectness_logits, pred_anchor_deltas, image_sizes
        if torch.jit.is_tracing():  # a trace would keep this call's numbers of proposals
            return super().predict_proposals(*given)
        boxes, scores = decoded_best(self, anchors, pred_objectness_logits, pred_anchor_deltas)
        sizes = torch.tensor(image_sizes)
        if boxes[0].is_cuda:
            sizes = sizes.pin_memory().to(boxes[0].device, non_blocking=True)
        found = select_proposals(
            boxes,
            scores,
            sizes,
            self.nms_thresh,
            self.post_nms_topk[self.training],
            self.min_box_size,
        )
        *counts, finite, exact = torch.cat(
            [found.counts, found.finite.all()[None], found.exact.all()[None]]
        ).tolist()
        if self.training and not finite:
            raise FloatingPointError(
                "Predicted boxes or scores contain Inf/NaN. Training has diverged."
            )
        if not exact:  # without Triton, after a long chain of suppression
            return super().predict_proposals(*given)
        return [
            Instances(
                size,
                proposal_boxes=Boxes(found.boxes[i, :count]),
                objectness_logits=found.scores[i, :count],
            )
            for i, (size, count) in enumerate(zip(image_sizes, counts, strict=True))
        ]


class BatchedFastRCNNOutputLayers(FastRCNNOutputLayers):
    """Detectron2's box predictor: the same losses up to the order of summation.

    It waits for a GPU once, for the statistics that are logged. Detectron2's waits ten times.
    """

    def losses(
        self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]
    ) -> dict[str, Tensor]:
        """See :meth:`FastRCNNOutputLayers.losses`."""
        if self.use_sigmoid_ce or not proposals:
            return super().losses(predictions, proposals)
        scores, deltas = predictions
        classes = cat([of_image.gt_classes for of_image in proposals])
        boxes = cat([of_image.proposal_boxes.tensor for of_image in proposals])
        truths = [
            (of_image.gt_boxes if of_image.has("gt_boxes") else of_image.proposal_boxes).tensor
            for of_image in proposals
        ]
        _log_classification(scores.detach(), classes)
        losses = {
            "loss_cls": cross_entropy(scores, classes, reduction="mean"),
            "loss_box_reg": self.box_reg_loss(boxes, cat(truths), deltas, classes),
        }
        return {name: loss * self.loss_weight.get(name, 1.0) for name, loss in losses.items()}

    def box_reg_loss(
        self, proposal_boxes: Tensor, gt_boxes: Tensor, pred_deltas: Tensor, gt_classes: Tensor
    ) -> Tensor:
        """See :meth:`FastRCNNOutputLayers.box_reg_loss`; background is included, with loss 0."""
        foreground = ((gt_classes >= 0) & (gt_classes < self.num_classes))[:, None]
        if pred_deltas.shape[1] != proposal_boxes.shape[1]:  # of each class
            of_class = gt_classes.clamp(0, self.num_classes - 1)[:, None, None]
            box_dim = proposal_boxes.shape[1]
            pred_deltas = pred_deltas.view(-1, self.num_classes, box_dim)
            pred_deltas = pred_deltas.gather(1, of_class.expand(-1, -1, box_dim))[:, 0]
        # For background, truth and prediction are the same box of one pixel.
        pixel = torch.arange(4, device=gt_boxes.device).div(2, rounding_mode="floor").to(gt_boxes)
        loss = _dense_box_regression_loss(
            [torch.where(foreground, proposal_boxes, pixel)],
            _unchecked(self.box2box_transform),
            [torch.where(foreground, pred_deltas, 0.0)[None]],
            [torch.where(foreground, gt_boxes, pixel)],
            ...,
            self.box_reg_loss_type,
            self.smooth_l1_beta,
        )
        return loss / max(gt_classes.numel(), 1.0)


def _log_classification(scores: Tensor, classes: Tensor) -> None:
    """Logs Detectron2's statistics of a box predictor, with one transfer from the device."""
    if len(classes) == 0:
        return
    background = scores.shape[1] - 1
    predicted = scores.argmax(dim=1)
    foreground, right = (classes >= 0) & (classes < background), predicted == classes
    missed = foreground & (predicted == background)
    of_all = [foreground, right, foreground & right, missed]
    objects, accurate, found, lost = torch.stack([each.sum() for each in of_all]).tolist()
    storage = get_event_storage()
    storage.put_scalar("fast_rcnn/cls_accuracy", accurate / len(classes))
    if objects > 0:
        storage.put_scalar("fast_rcnn/fg_cls_accuracy", found / objects)
        storage.put_scalar("fast_rcnn/false_negative", lost / objects)

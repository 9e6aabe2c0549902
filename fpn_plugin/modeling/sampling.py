"""Sampling of proposals for the losses of RoI heads, which waits once for a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.structures import Instances, pairwise_iou
from detectron2.utils.events import get_event_storage
from torch import Tensor

__all__ = ["BatchedSampling", "sample_labels"]


class BatchedSampling:
    """Samples Detectron2's proposals from the same random numbers; waits once for a GPU, not four
    times for each image.
    """

    @torch.no_grad()
    def label_and_sample_proposals(
        self, proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """See :meth:`detectron2.modeling.ROIHeads.label_and_sample_proposals`."""
        if self.proposal_append_gt:
            proposals = add_ground_truth_to_proposals(targets, proposals)
        matches, classes = [], []
        for of_image, truths in zip(proposals, targets, strict=True):
            overlaps = pairwise_iou(truths.gt_boxes, of_image.proposal_boxes)
            matched, label = self.proposal_matcher(overlaps)
            if len(truths):
                of_box = truths.gt_classes[matched]
                of_box.masked_fill_(label == 0, self.num_classes).masked_fill_(label == -1, -1)
            else:
                of_box = torch.full_like(matched, self.num_classes)
            matches.append(matched)
            classes.append(of_box)
        samples = sample_labels(
            classes, self.batch_size_per_image, self.positive_fraction, self.num_classes
        )
        sampled = []
        for i, both in enumerate(samples):
            chosen = torch.cat(both)
            of_image = proposals[i][chosen]
            of_image.gt_classes = classes[i][chosen]
            if len(targets[i]):
                for name, value in targets[i].get_fields().items():
                    if name.startswith("gt_") and not of_image.has(name):
                        of_image.set(name, value[matches[i][chosen]])
            sampled.append(of_image)
        storage = get_event_storage()
        for name, which in (("fg", 0), ("bg", 1)):
            counts = [len(both[which]) for both in samples]
            storage.put_scalar(f"roi_head/num_{name}_samples", np.mean(counts))
        return sampled


def sample_labels(
    labels: Sequence[Tensor], most: int, positive_fraction: float, background: int
) -> list[tuple[Tensor, Tensor]]:
    """Detectron2's ``subsample_labels`` of several images: the same boxes from the same generator.

    Random permutations need the number of boxes on the host: one transfer brings those of all
    images.

    Args:
        labels: of each image, ``(N,)``: -1 to leave a box out, ``background``, or a class.
        most: boxes to sample from an image.
        positive_fraction: largest share of them that has a class.
        background: its label.

    Returns:
        For each image, int64 indices of the sampled boxes with a class, and of background.
    """
    if len(labels) == 0:
        return []
    masks = [((of_one != -1) & (of_one != background), of_one == background) for of_one in labels]
    counts = torch.stack([mask.sum() for both in masks for mask in both]).tolist()
    samples = []
    for both, positives, negatives in zip(masks, counts[::2], counts[1::2], strict=True):
        wanted = min(positives, int(most * positive_fraction))
        numbers = (wanted, min(negatives, most - wanted))
        samples.append(
            tuple(
                _places(mask, torch.randperm(count, device=mask.device)[:number])
                for mask, count, number in zip(both, (positives, negatives), numbers, strict=True)
            )
        )
    return samples


def _places(mask: Tensor, ranks: Tensor) -> Tensor:
    """Indices of the r-th True of a mask, counted from 0, without a transfer to the host."""
    return torch.searchsorted(mask.cumsum(0), ranks + 1)

"""Matching boxes with ground truth and sampling them, with one wait for a GPU for all images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.matcher import Matcher
from torch import Tensor

__all__ = ["PatientMatcher", "sample_labels"]


class PatientMatcher(Matcher):
    """Detectron2's Matcher, which does not ask a GPU for anything on its way."""

    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """Index of the best ground truth, int64, and label, int8, of each of N boxes.

        Args:
            match_quality_matrix: ``(M, N)``, of M ground truths, 0 or more.
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
        """Labels 1, in place, what is some ground truth's best."""
        best = match_quality_matrix.max(dim=1, keepdim=True).values
        match_labels.masked_fill_((match_quality_matrix == best).any(dim=0), 1)


def sample_labels(
    labels: Sequence[Tensor], most: int, positive_fraction: float, background: int
) -> list[tuple[Tensor, Tensor]]:
    """Detectron2's ``subsample_labels`` of several images: the same boxes from the same generator.

    Its random permutations need the number of boxes on the host, one image after the other. Here
    one transfer brings the numbers of all.

    Args:
        labels: of each image, ``(N,)``: -1 to be left out, ``background``, or a class.
        most: boxes to sample from an image.
        positive_fraction: of them at most that are no background.
        background: its label.

    Returns:
        Of each image, int64 indices of the positive boxes sampled and of the negative ones.
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
    """Indices of the r-th True of a mask, counted from 0, without counting them on the host."""
    return torch.searchsorted(mask.cumsum(0), ranks + 1)

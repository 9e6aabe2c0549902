"""Sums by pyramid level, and the figures that are logged."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = ["LevelTally", "level_scalars"]

Sums = dict[str, dict[str, float]]


class LevelTally:
    """Sums over a batch, ``{statistic: {level: sum}}``, which add up over processes.

    =================  =============================================================================
    statistic          what is summed
    =================  =============================================================================
    images             images (under the level "")
    norm, cells        L2 norms of the feature vectors of all cells; number of cells
    anchors            anchors that matched an object, before any are sampled
    objects            objects whose size is nearest to this level's anchors
    recalled           objects that a proposal of the RPN covers at an IoU of 0.5 or more
    rois               RoIs that the box head pools from this level, of all stages of a cascade
    foreground         RoIs that are labelled as objects
    rpn_loss           the RPN's losses, weighted as in training
    box_loss           the box head's losses, weighted, or a RetinaNet's without its normalizer
    =================  =============================================================================
    """

    def __init__(self) -> None:
        self._pending: list[tuple[str, tuple[str, ...], Tensor]] = []

    def add(self, statistic: str, levels: Sequence[str], values: Tensor) -> None:
        """Adds ``values``, one for each level, which stay on the device."""
        self._pending.append((statistic, tuple(levels), values.detach().reshape(-1).double()))

    def sums(self) -> Sums:
        """The sums, by one transfer from the device."""
        sums: Sums = {}
        if self._pending:
            device = next((v.device for _, _, v in self._pending if v.is_cuda), "cpu")
            parts = [values.to(device, non_blocking=True) for _, _, values in self._pending]
            values = iter(torch.cat(parts).tolist())
            for statistic, levels, _ in self._pending:
                of = sums.setdefault(statistic, {})
                for level in levels:
                    of[level] = of.get(level, 0.0) + next(values)
        return sums


def level_scalars(processes: Iterable[Sums]) -> dict[str, float]:
    """Computes the logged figures from sums: ``{"fpn_<figure>/<level>": value}``.

    ===================  ===========================================================================
    figure               value
    ===================  ===========================================================================
    feature_norm         mean L2 norm of a cell's feature vector
    anchors_matched      anchors that matched an object, per image
    rpn_recall           share of the objects that a proposal covers
    rois                 RoIs pooled for the box head, per image
    foreground           share of them that are labelled as objects
    rpn_share            share of the RPN's losses
    box_share            share of the box head's losses, or of a RetinaNet's
    share                share of both together
    ===================  ===========================================================================

    Shares of nothing, such as the recall of a level without objects, are left out.

    Args:
        processes: the sums of every process.
    """
    total: Sums = defaultdict(lambda: defaultdict(float))
    for sums in processes:
        for statistic, by_level in sums.items():
            for level, value in by_level.items():
                total[statistic][level] += value
    for part in ("rpn_loss", "box_loss"):
        for level, value in list(total[part].items()):
            total["loss"][level] += value
    whole = {name: sum(by_level.values()) for name, by_level in total.items()}
    images = whole.get("images", 0.0)
    # Names without "loss": Detectron2 prints those with it as losses.
    logged: dict[str, float] = {}
    for figure, statistic, divisors in (
        ("feature_norm", "norm", total["cells"]),
        ("anchors_matched", "anchors", images),
        ("rpn_recall", "recalled", total["objects"]),
        ("rois", "rois", images),
        ("foreground", "foreground", total["rois"]),
        ("rpn_share", "rpn_loss", whole.get("rpn_loss", 0.0)),
        ("box_share", "box_loss", whole.get("box_loss", 0.0)),
        ("share", "loss", whole.get("loss", 0.0)),
    ):
        for level, value in total[statistic].items():
            divisor = divisors[level] if isinstance(divisors, dict) else divisors
            if divisor > 0:
                logged[f"fpn_{figure}/{level}"] = value / divisor
    return logged

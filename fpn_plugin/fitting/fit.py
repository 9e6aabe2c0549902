"""A config's pyramid, measured against a dataset and fitted to it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from detectron2.config import CfgNode

from .density import Density, check_sampling
from .ground_truth import GroundTruth
from .measures import Measures, measure
from .pyramid import Pyramid
from .recommendations import Recommendation, recommend
from .resizing import InputBoxes, ResizeRule, boxes_at_input

__all__ = ["Fit", "check_config", "fit_pyramid"]

_FACTORS = (0.5, 0.75, 1.0, 1.5, 2.0)  # of the config's input size
_MAX_FACTOR = 2.0  # of only MAX_SIZE
# At most this much is measured at other input sizes.
_SAMPLE_IMAGES, _SAMPLE = 20_000, 100_000


@dataclass(frozen=True)
class Fit:
    """A config's pyramid measured against a dataset, and the recommended changes.

    Attributes:
        cfg: the config.
        fitted: the config with all recommendations applied.
        truth: the dataset's boxes.
        rule: how training resizes images.
        inputs: the boxes as the network sees them in training.
        before: the config's pyramid, measured.
        after: that of the fitted config, at its input size.
        test: the config's pyramid measured at the input size of testing.
        input_sizes: the config's pyramid at other input sizes, a row each.
        density: objects per image.
        recommendations: for input size, flips, anchors, canonical size, levels and room, in this
            order.
    """

    cfg: CfgNode
    fitted: CfgNode
    truth: GroundTruth
    rule: ResizeRule
    inputs: InputBoxes
    before: Measures
    after: Measures
    test: Measures
    input_sizes: list[dict[str, Any]]
    density: Density
    recommendations: list[Recommendation]

    @property
    def changed(self) -> bool:
        """Whether any recommendation changes the config."""
        return any(each.changes for each in self.recommendations)

    @property
    def resized(self) -> bool:
        """Whether a recommendation changes the input size of training."""
        return any("INPUT.MIN_SIZE_TRAIN" in each.changes for each in self.recommendations)


def check_config(cfg: CfgNode) -> Pyramid:
    """Refuses a config that cannot be fitted, before its data are read; returns its pyramid.

    Raises:
        UserError: no pyramid with anchors, a size that no image can have, or no sampled objects.
    """
    for training in (True, False):
        ResizeRule.from_config(cfg, training)
    check_sampling(cfg)
    return Pyramid.from_config(cfg)


def fit_pyramid(cfg: CfgNode, truth: GroundTruth, pyramid: Pyramid | None = None) -> Fit:
    """Fits a config's pyramid to boxes.

    Args:
        cfg: the config.
        truth: the boxes of the training data.
        pyramid: of :func:`check_config`, which is called without it.

    Raises:
        UserError: the config cannot be fitted.
    """
    pyramid = pyramid or check_config(cfg)
    rule = ResizeRule.from_config(cfg, training=True)
    inputs = boxes_at_input(truth, rule)
    recommendations, fitted, new = recommend(cfg, pyramid, truth)
    before = measure(inputs, pyramid)
    new_rule = ResizeRule.from_config(fitted, training=True)
    fits = new == pyramid and new_rule == rule
    few = truth.sample(_SAMPLE_IMAGES)
    testing = boxes_at_input(few, ResizeRule.from_config(cfg, training=False))
    return Fit(
        cfg=cfg,
        fitted=fitted,
        truth=truth,
        rule=rule,
        inputs=inputs,
        before=before,
        after=before if fits else measure(boxes_at_input(truth, new_rule), new),
        test=measure(testing.sample(_SAMPLE), pyramid),
        input_sizes=[_at_input_size(few, rule, *each, pyramid) for each in _input_sizes(rule)],
        density=Density.of(truth),
        recommendations=recommendations,
    )


def _input_sizes(rule: ResizeRule) -> list[tuple[float, float]]:
    """Factors of MIN_SIZE and of MAX_SIZE to measure at."""
    if not rule.resizes:
        return [(1.0, 1.0)]
    return [*((factor, factor) for factor in _FACTORS), (1.0, _MAX_FACTOR)]


def _at_input_size(
    truth: GroundTruth, rule: ResizeRule, factor: float, max_factor: float, pyramid: Pyramid
) -> dict[str, Any]:
    """The pyramid's figures for larger or smaller images."""
    scaled = replace(rule.scaled(factor), max_size=rule.scaled(max_factor).max_size)
    inputs = boxes_at_input(truth, scaled)
    measured = measure(inputs.sample(_SAMPLE), pyramid)
    found = measured.as_dict()
    keys = ("clamped_fine", "clamped_coarse", "below_1_cell", "below_2_cells")
    keys += ("recall_50", "recall_70", "mean_iou")
    return {
        "factor": factor,
        "max_factor": max_factor,
        "short_edges": list(scaled.short_edges),
        "max_size": scaled.max_size,
        "limited_by_max_size": inputs.limited,
        "pixels": inputs.pixels,
        "median_size": found["size_percentiles"]["50"],
        "levels": {
            level: float((measured.level == level).mean())
            for level in pyramid.roi_levels or pyramid.anchor_levels
        },
        **{key: found[key] for key in keys},
    }

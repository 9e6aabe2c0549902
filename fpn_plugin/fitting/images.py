"""Recommendations for the images of a dataset: input size and flips."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from fpn_plugin.config import value_at

from .ground_truth import GroundTruth
from .pyramid import Pyramid
from .recommendation import LEAST_CELLS, MANY, UNTRIED, Recommendation
from .resizing import ResizeRule, boxes_at_input

__all__ = ["recommend_flips", "recommend_input_size"]

_SAMPLE = 100_000  # boxes that an input size is measured on
_MOST = 0.2  # of boxes that are too small for images to be enlarged
_SMALL = 32.0  # input pixels, sqrt(w h): COCO's small objects
_INPUT_FACTORS = (1.25, 1.5, 1.75, 2.0)  # of the input size; 2 is four times the time
_WHOLE, _MOST_ENLARGED = 1.01, 2.02  # of the stored size, with rounding
_DIFFERENT = 1.5  # times as large in testing as in training
# Words in names of classes that a mirrored image makes wrong.
_SIDED = {
    "left", "right", "lhs", "rhs", "clockwise", "counterclockwise", "anticlockwise", "arrow",
    "letter", "digit", "character", "text", "number",
}  # fmt: skip


def recommend_input_size(cfg: CfgNode, pyramid: Pyramid, truth: GroundTruth) -> Recommendation:
    """Recommends larger images, if they are shrunk or if many objects are narrower than two cells.

    Args:
        cfg: the config.
        pyramid: the config's.
        truth: the boxes of its training data, or of some of its images.
    """
    rule, test = (ResizeRule.from_config(cfg, training) for training in (True, False))
    scale, test_scale = _scale(rule, truth), _scale(test, truth)
    finest = pyramid.anchor_levels[0]
    narrow_px = LEAST_CELLS * 2**finest

    def shares(factor: float) -> tuple[float, float]:
        inputs = boxes_at_input(truth, rule.scaled(factor)).sample(_SAMPLE)
        shorter = inputs.sides.min(axis=1)
        return float((inputs.size < _SMALL).mean()), float((shorter < narrow_px).mean())

    before = after = shares(1.0)
    factor, most_narrow = 1.0, _MOST
    for larger in _INPUT_FACTORS if rule.resizes else ():
        small, narrow = after
        if narrow > most_narrow and scale * larger <= _MOST_ENLARGED:
            most_narrow = MANY
        elif not (small > MANY and scale * larger <= _WHOLE):
            break
        factor, after = larger, shares(larger)

    height, width = np.median(truth.shapes, axis=0)
    resized = f"shrinks them to {scale:.0%}" if scale < 1 else f"enlarges them to {scale:.0%}"
    resized = "leaves them as they are" if abs(scale - 1) < 0.005 else resized
    figures = {
        "scale": scale, "test_scale": test_scale, "factor": factor,
        "small": before[0], "narrow": before[1], "small_after": after[0], "narrow_after": after[1],
    }  # fmt: skip
    reason = (
        f"Images have {width:g} x {height:g} px in the median, and INPUT.MIN_SIZE_TRAIN {resized}; "
        f"{before[0]:.1%} of objects are then smaller than {_SMALL:g} px, and {before[1]:.1%} "
        f"narrower than {LEAST_CELLS:.0f} cells of P{finest}."
    )
    changes: dict[str, Any] = {}
    alike = 1 / _DIFFERENT <= test_scale / scale <= _DIFFERENT
    if factor > 1:
        for split in ("TRAIN", "TEST") if alike else ("TRAIN",):
            key = f"INPUT.MIN_SIZE_{split}"
            given = value_at(cfg, key)
            edges = [given] if isinstance(given, int) else given
            new = [round(edge * factor) for edge in edges]
            changes[key] = new[0] if isinstance(given, int) else new
        if boxes_at_input(truth, replace(rule.scaled(factor), max_size=rule.max_size)).limited:
            for split in ("TRAIN", "TEST"):
                key = f"INPUT.MAX_SIZE_{split}"
                changes[key] = round(value_at(cfg, key) * factor)
        effect = (
            f"At {factor:g} times the size {after[0]:.1%} are smaller and {after[1]:.1%} narrower "
            f"than that. An iteration and a detection have {factor**2:.1f} times the pixels, and "
            "take about as many times the time and the memory."
        )
        if scale * factor > _WHOLE:
            effect += " Images are enlarged: that adds cells to each object, not detail."
    else:
        effect = "Nothing changes."
    if after[1] > _MOST or (after[0] > MANY and scale * factor * _WHOLE < 1):
        effect += f" Many stay too small at {factor:g} times the size; larger sizes (table of "
        effect += "input sizes), or training on parts of the images, may help."
    if not alike:
        ratio = test_scale / (scale * factor)
        effect += f" INPUT.MIN_SIZE_TEST shows objects {ratio:.2g} times as large as "
        effect += "INPUT.MIN_SIZE_TRAIN does: a detector finds the sizes that it was trained on."
    return Recommendation("input size", changes, reason, effect, figures)


def _scale(rule: ResizeRule, truth: GroundTruth) -> float:
    """How large images are at the input, in the median; 1: as they are stored."""
    scales = [
        rule.output_shapes(truth.shapes, np.full(len(truth.shapes), edge)) / truth.shapes
        for edge in rule.short_edges
    ]
    return float(np.median(scales))


def recommend_flips(cfg: CfgNode, truth: GroundTruth) -> Recommendation:
    """Recommends horizontal flips, unless names or keypoints are against them.

    Args:
        cfg: the config.
        truth: whose classes have the names.
    """
    key, given, names = "INPUT.RANDOM_FLIP", cfg.INPUT.RANDOM_FLIP, truth.classes
    sided = [name for name in names or () if _is_sided(name)]
    named = ", ".join(map(repr, sided[:3])) + (", ..." if len(sided) > 3 else "")
    if sided:
        reason = f"A mirrored image may have another class: {named}."
        if given != "horizontal":
            return Recommendation("flips", {}, reason, "Nothing changes.")
        effect = f"Images are mirrored by {key} horizontal. The effect on AP is {UNTRIED}."
        return Recommendation("flips", {}, reason, effect, untried={key: "none"})
    if given != "none":
        return Recommendation(
            "flips", {}, f"Images are flipped: {key} {given}.", "Nothing changes."
        )
    unnamed = "" if names and all(names) else "the classes have no names to judge by"
    if cfg.MODEL.KEYPOINT_ON and not _have_flip_maps(cfg):
        unnamed = "it is not known which keypoints a mirrored image swaps"
    if unnamed:
        effect = "Set it if a mirrored image of an object shows the same class."
        return Recommendation(
            "flips", {}, f"Images are not mirrored, and {unnamed}.", effect,
            untried={key: "horizontal"},
        )  # fmt: skip
    reason = "Images are not mirrored, and no name of a class is against it."
    effect = "Each object is seen in two forms, at no cost."
    return Recommendation("flips", {key: "horizontal"}, reason, effect)


def _is_sided(name: str) -> bool:
    """Whether a class may be another in a mirrored image: left and right, letters and digits."""
    words = re.findall(r"[A-Z]?[a-z]+|[A-Z]+|\d+", name)
    return (
        len(name.strip()) == 1
        or name.strip().isdecimal()
        or any(word.lower() in _SIDED for word in words)
    )


def _have_flip_maps(cfg: CfgNode) -> bool:
    names = cfg.DATASETS.TRAIN
    return bool(names) and all(
        MetadataCatalog.get(name).get("keypoint_flip_map") is not None for name in names
    )

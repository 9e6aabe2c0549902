"""Recommendations for a dataset: anchors, levels and room for its objects, after those for images.

What trainings have shown to help, or cannot lower AP, is set. The rest is reported, with the keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
from detectron2.config import CfgNode

from fpn_plugin.config import value_at

from .anchors import fit_anchors, matching_anchors
from .density import Density, check_sampling, samplers
from .ground_truth import GroundTruth
from .images import recommend_flips, recommend_input_size
from .measures import Measures, measure
from .pyramid import Pyramid, level_names
from .recommendation import LEAST_CELLS, MANY, UNTRIED, Recommendation
from .resizing import InputBoxes, ResizeRule, boxes_at_input

__all__ = ["crowded_matches", "recommend", "recommend_room"]

_ENOUGH = 100  # objects, to recommend any change
_SAMPLE = 100_000  # boxes that candidates are measured on
_SAMPLE_IMAGES = 2_000  # that input sizes and matching anchors are measured on
_FEW = 0.005  # of boxes; a level that fewer need is not needed
_FINE_CELLS = 4.0  # shorter side, in cells of the next level, under which the finest is needed
_FINEST = 2  # level of the finest stage that ResNets and most networks give
_WORTH_CHANGING = 0.25  # of objects that get an anchor that matches them, to change anchors
_WORTH_REPORTING = 0.05  # of mean best IoU, by one more size per level
_CANONICAL_BINS = (1.0, 2.0)  # cells per bin of a region at the lower end of its level
_PROPOSALS_PER_OBJECT = 5  # most proposals of an object are near copies of each other
_CANDIDATES_PER_MATCH = 10  # before NMS; more anchors overlap an object nearly as well
_SPARE = 1.5  # detections and samples for each object
_COCO_DETECTIONS = 100  # that COCO's AP looks at in an image


def recommend(
    cfg: CfgNode, pyramid: Pyramid, truth: GroundTruth
) -> tuple[list[Recommendation], CfgNode, Pyramid]:
    """Recommends changes of a config for a dataset.

    Args:
        cfg: the config.
        pyramid: the config's.
        truth: the boxes of its training data.

    Returns:
        The recommendations, also those that change nothing; a copy of the config with all changes
        applied; and its pyramid.
    """
    fitted = cfg.clone()
    objects = len(truth.boxes)
    if objects < _ENOUGH:
        reason = f"{objects} {'object is' if objects == 1 else 'objects are'} too few to judge by; "
        reason += f"at least {_ENOUGH} are needed."
        effect = "Nothing changes; figures below are of the objects there are."
        return [Recommendation("everything", {}, reason, effect)], fitted, pyramid
    few = truth.sample(_SAMPLE_IMAGES)
    found = [recommend_input_size(cfg, pyramid, few), recommend_flips(cfg, truth)]
    fitted.defrost()
    _apply(found, fitted)
    rule = ResizeRule.from_config(fitted, training=True)
    inputs = boxes_at_input(truth, rule).sample(_SAMPLE)
    anchors, new = _anchors(cfg, pyramid, inputs)
    found.append(anchors)
    if pyramid.roi_levels:
        found.append(_canonical(cfg, new, inputs))
    found.append(_levels(cfg, new, inputs))
    found += recommend_room(cfg, Density.of(truth), crowded_matches(cfg, few, rule, new))
    _apply(found, fitted)
    return found, fitted, new


def _apply(found: list[Recommendation], cfg: CfgNode) -> None:
    for recommendation in found:
        for key, value in recommendation.changes.items():
            cfg.merge_from_list([key, value])


def _levels(cfg: CfgNode, pyramid: Pyramid, inputs: InputBoxes) -> Recommendation:
    """Another finest level, which is reported and not set."""
    finest = pyramid.stages[0]
    shorter = inputs.sides.min(axis=1)

    def narrower(cells: float, level: int) -> float:
        return float((shorter < cells * 2**level).mean())

    def needing(level: int) -> float:
        return narrower(_FINE_CELLS, level + 1)

    def lost(level: int) -> float:
        return narrower(LEAST_CELLS, level)

    figures = {"needing_finest": needing(finest), "below_2_cells": lost(finest)}
    reason = (
        f"{needing(finest):.1%} of objects are narrower than {_FINE_CELLS:.0f} cells of "
        f"P{finest + 1} and need P{finest}; {lost(finest):.1%} are narrower than "
        f"{LEAST_CELLS:.0f} cells of P{finest}."
    )
    fixed = _fixed_by(cfg, pyramid)
    if fixed:
        return Recommendation("levels", {}, reason, f"Levels stay: {fixed}.", figures)
    # As many levels at once as the rules ask for.
    new = finest
    while new < _coarsest_beginning(pyramid) and needing(new) < _FEW:
        new += 1
    while new <= finest and new > _FINEST and lost(new) > MANY:
        new -= 1
    if new == finest:
        effect = "Nothing changes."
        if lost(finest) > MANY:
            effect += " There is no finer stage to build on: a larger INPUT.MIN_SIZE helps objects "
            effect += "this small (table of input sizes)."
        return Recommendation("levels", {}, reason, effect, figures)
    moved = _moved(pyramid, new)
    times = sum(0.25**level for level in moved.anchor_levels)
    times /= sum(0.25**level for level in pyramid.anchor_levels)
    figures["cells"] = times
    if new > finest:
        reason = (
            f"Only {needing(new - 1):.1%} of objects are narrower than {_FINE_CELLS:.0f} cells of "
            f"P{new}, so {_listed(range(finest, new))} may go."
        )
        effect = (
            f"The levels would have {times:.0%} of the cells, which the 3x3 convolutions of the "
            f"pyramid and of the heads on it cost. Faster; the effect on AP is {UNTRIED}."
        )
    else:
        figures["below_2_cells_after"] = lost(new)
        reason = (
            f"{lost(finest):.1%} of objects are narrower than {LEAST_CELLS:.0f} cells of "
            f"P{finest}, so {_listed(range(new, finest))} may help."
        )
        effect = (
            f"{lost(new):.1%} are narrower than that many cells of P{new}. The levels would have "
            f"{times:.1f} times as many cells, which convolutions cost. The effect on AP is "
            f"{UNTRIED}."
        )
    untried = _level_changes(cfg, pyramid, moved)
    return Recommendation("levels", {}, reason, effect, figures, untried)


def _listed(levels: range) -> str:
    return " and ".join(f"P{level}" for level in levels)


def _coarsest_beginning(pyramid: Pyramid) -> int:
    """The coarsest level that may come first: two stages stay, a level of anchors, one of RoIs."""
    spare = [len(pyramid.stages) - 2, len(pyramid.anchor_levels) - 1]
    spare += [len(pyramid.roi_levels) - 1] if pyramid.roi_levels else []
    return pyramid.stages[0] + max(min(spare), 0)


def _fixed_by(cfg: CfgNode, pyramid: Pyramid) -> str:
    """Why the finest level of a config cannot change; "" if it can."""
    if cfg.MODEL.META_ARCHITECTURE == "PanopticFPN":
        return "the semantic head reads them too"
    if cfg.MODEL.FPN.get("OUT_FEATURES"):
        return "MODEL.FPN.OUT_FEATURES names those to compute"
    readers = {pyramid.anchor_levels[0], *pyramid.roi_levels[:1]}
    if readers != {pyramid.stages[0]}:
        return "anchors, regions and stages do not begin at the same one"
    return ""


def _moved(pyramid: Pyramid, finest: int) -> Pyramid:
    """The pyramid that begins at another level, finer or coarser."""
    added = range(finest, pyramid.stages[0])
    dropped = max(finest - pyramid.stages[0], 0)

    def per_level(values: tuple[tuple[float, ...], ...], factor: float) -> tuple[Any, ...]:
        first = (tuple(v * factor ** (added.stop - k) for v in values[0]) for k in added)
        return (*first, *values[dropped:])

    return replace(
        pyramid,
        stages=(*added, *pyramid.stages[dropped:]),
        anchor_levels=(*added, *pyramid.anchor_levels[dropped:]),
        roi_levels=pyramid.roi_levels and (*added, *pyramid.roi_levels[dropped:]),
        sizes=per_level(pyramid.sizes, 0.5),
        ratios=per_level(pyramid.ratios, 1.0),
    )


def _level_changes(cfg: CfgNode, pyramid: Pyramid, moved: Pyramid) -> dict[str, Any]:
    """The keys of a pyramid that begins at another level."""
    changes: dict[str, Any] = {
        "MODEL.FPN.IN_FEATURES": level_names(moved.stages, "res"),
        f"{pyramid.node}.IN_FEATURES": level_names(moved.anchor_levels),
        "MODEL.ANCHOR_GENERATOR.SIZES": list(map(list, moved.sizes)),
    }
    if len(cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS) > 1:  # a list for each level
        changes["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"] = list(map(list, moved.ratios))
    if pyramid.roi_levels:
        changes["MODEL.ROI_HEADS.IN_FEATURES"] = level_names(moved.roi_levels)
    added = range(moved.stages[0], pyramid.stages[0])
    if added and cfg.MODEL.BACKBONE.NAME != "build_fpn_backbone":
        # Detectron2's own backbones, unlike the plugin's, compute only stages that are named.
        names = [*level_names(added, "res"), *cfg.MODEL.RESNETS.OUT_FEATURES]
        changes["MODEL.RESNETS.OUT_FEATURES"] = sorted(set(names))
    return changes


def _canonical(cfg: CfgNode, pyramid: Pyramid, inputs: InputBoxes) -> Recommendation:
    """The canonical size of a pyramid with its new anchors; another one is reported and not set.

    Eq. (1) gives a region at the lower end of its level s0 / 2^k0 cells: 14 in the paper, two for
    each of 7 bins. One to two cells for a bin are right.
    """
    before = measure(inputs, pyramid)
    s0, k0 = pyramid.canonical_size, pyramid.canonical_level
    bins = int(cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION)
    cells = s0 / 2**k0
    least, most = (bins * cells_per_bin for cells_per_bin in _CANONICAL_BINS)
    figures = {"cells_at_lower_end": cells, "levels_before": _spread(before)}
    here = (
        f"s0 {s0:g} px at k0 {k0} gives a region at least {cells:.3g} cells of its level where one "
        f"is fine enough, for {bins} bins"
    )
    stay = f"Regions are at {_shares(before)}."
    if least <= cells <= most:
        reason = f"{here}, which is enough."
        return Recommendation("canonical size", {}, reason, stay, figures)
    if not pyramid.canonical_keys:
        reason = f"{here}, but these RoI heads read neither from the config."
        effect = f"{stay} MODEL.ROI_HEADS.NAME FPNROIHeads would read both."
        return Recommendation("canonical size", {}, reason, effect, figures)
    size = round(min(max(cells, least), most) * 2**k0)
    after = measure(inputs, replace(pyramid, canonical_size=float(size)))
    moved = float((before.level != after.level).mean())
    why = "less than a cell for each" if cells < least else "more than two cells for each"
    figures |= {"moved": moved, "levels_after": _spread(after)}
    reason = f"{here}, {why}; k0 stays, since only s0 / 2^k0 matters."
    effect = (
        f"With s0 {size} px {moved:.1%} of regions would change their level: {_shares(before)} as "
        f"it is, {_shares(after)} then. The effect on AP is {UNTRIED}."
    )
    untried = {"MODEL.FPN.CANONICAL_BOX_SIZE": size}
    return Recommendation("canonical size", {}, reason, effect, figures, untried)


def _spread(measures: Measures) -> dict[int, float]:
    return {level: float((measures.level == level).mean()) for level in measures.pyramid.roi_levels}


def _shares(measures: Measures) -> str:
    return ", ".join(f"P{level} {share:.0%}" for level, share in _spread(measures).items())


def _anchors(cfg: CfgNode, pyramid: Pyramid, inputs: InputBoxes) -> tuple[Recommendation, Pyramid]:
    """Anchors of other sizes, and the canonical size with them."""
    threshold = _match_threshold(cfg)
    fitted, more = fit_anchors(inputs, pyramid), _one_more_size(pyramid)
    before, after, added = (measure(inputs, each) for each in (pyramid, fitted, more))
    gained = after.recall(threshold) - before.recall(threshold)
    figures = {
        "before": _fit(before), "fitted": _fit(after), "more": _fit(added),
        "match_threshold": threshold, "gained": gained,
        "anchors_per_cell": {"before": pyramid.anchors_per_cell, "more": more.anchors_per_cell},
    }  # fmt: skip
    if gained >= _WORTH_CHANGING:
        changes: dict[str, Any] = {
            "MODEL.ANCHOR_GENERATOR.SIZES": list(map(list, fitted.sizes)),
        }
        reason = (
            f"With sizes that are {fitted.sizes[0][0] / pyramid.sizes[0][0]:.2g} times as large, "
            f"{gained:.0%} more objects have an anchor that matches them, by an IoU of "
            f"{threshold:g}. Each level keeps its share: sizes are an octave apart, and "
            f"{fitted.sizes[0][0] / 2 ** pyramid.anchor_levels[0]:.2g} strides at least."
        )
        effect = f"Before: {_figures(before)}. After: {_figures(after)}."
        if fitted.canonical_size != pyramid.canonical_size:
            changes["MODEL.FPN.CANONICAL_BOX_SIZE"] = int(fitted.canonical_size)
            effect += " s0 of Eq. (1) grows or shrinks with the sizes."
        return Recommendation("anchors", changes, reason, effect, figures), fitted
    reason = (
        f"Larger or smaller anchors would change the share of objects that an anchor matches, by "
        f"an IoU of {threshold:g}, by {gained:+.0%}; less than {_WORTH_CHANGING:+.0%} is not worth "
        "a change (docs/fitting.md)."
    )
    effect = f"Nothing changes: {_figures(before)}."
    untried = {}
    by_size = added.mean_iou - before.mean_iou
    if by_size >= _WORTH_REPORTING:
        untried = {"MODEL.ANCHOR_GENERATOR.SIZES": list(map(list, more.sizes))}
        effect += f" {more.anchors_per_cell} anchors per cell instead of "
        effect += f"{pyramid.anchors_per_cell} would add {by_size:.2f} of mean best IoU; trainings "
        effect += "did not show that it helps (docs/fitting.md)."
    return Recommendation("anchors", {}, reason, effect, figures, untried), pyramid


def _match_threshold(cfg: CfgNode) -> float:
    """The IoU from which an anchor matches an object in training."""
    retina = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    return float(cfg.MODEL["RETINANET" if retina else "RPN"].IOU_THRESHOLDS[-1])


def _one_more_size(pyramid: Pyramid) -> Pyramid:
    """One size more for each level, all evenly spaced over its octave."""
    count = len(pyramid.sizes[0]) + 1
    steps = [2 ** (i / count) for i in range(count)]
    sizes = tuple(tuple(float(f"{s[0] * step:.3g}") for step in steps) for s in pyramid.sizes)
    return replace(pyramid, sizes=sizes)


def crowded_matches(
    cfg: CfgNode, truth: GroundTruth, rule: ResizeRule, pyramid: Pyramid
) -> tuple[int, float]:
    """Anchors of one level that match the objects of an image, and all those of one object.

    Args:
        cfg: whose RPN or RetinaNet says from which IoU on an anchor matches.
        truth: the boxes.
        rule: how images are resized.
        pyramid: whose anchors are counted.

    Returns:
        The number in the image that has more than 99 of 100 others, on the level with most of
        them, and the median over objects.
    """
    most, medians = 0, []
    for edge in rule.short_edges:
        inputs = boxes_at_input(truth, replace(rule, short_edges=(edge,)))
        counts = matching_anchors(inputs, pyramid, _match_threshold(cfg))
        _, image = np.unique(truth.image, return_inverse=True)
        in_image = np.zeros((image.max() + 1, counts.shape[1]))
        np.add.at(in_image, image, counts)
        most = max(most, int(np.ceil(np.percentile(in_image, 99, axis=0).max())))
        medians.append(np.median(counts.sum(axis=1)))
    return most, float(np.mean(medians))


def _fit(measures: Measures) -> dict[str, float]:
    recalls = {"recall_50": measures.recall(0.5), "recall_70": measures.recall(0.7)}
    return {"mean_iou": measures.mean_iou, **recalls}


def _figures(measures: Measures) -> str:
    text = "mean best IoU {mean_iou:.2f}, recall {recall_50:.0%} at 0.5 and {recall_70:.0%} at 0.7"
    return text.format(**_fit(measures))


def recommend_room(
    cfg: CfgNode, density: Density, matches: tuple[int, float]
) -> Iterator[Recommendation]:
    """Recommends proposals, samples and detections per image.

    Args:
        cfg: the config.
        density: of its training data.
        matches: anchors of one level that match the objects of a crowded image, and the median of
            those that match an object.

    Raises:
        UserError: see :func:`check_sampling`.
    """
    check_sampling(cfg)
    crowded, model = density.crowded, cfg.MODEL
    most, median = matches
    retina = model.META_ARCHITECTURE == "RetinaNet"
    # RetinaNet's candidates are detections with a score already, and a match is an IoU of 0.5.
    each = 1 if retina else _CANDIDATES_PER_MATCH
    candidates = each * most
    has = f"99 of 100 images hold at most {crowded} objects"
    matched = (
        f"99 of 100 images have at most {most} anchors on a level that match an object "
        f"({median:.3g} for each in the median), and {crowded} objects; a level should have {each} "
        f"candidate{'' if retina else 's'} before NMS for each anchor that matches"
    )
    if retina:
        keys = {"MODEL.RETINANET.TOPK_CANDIDATES_TEST": candidates}
        yield _room(cfg, "proposals", keys, 100, matched)
    else:
        proposals = {}
        for split in ("TRAIN", "TEST"):
            proposals[f"MODEL.RPN.PRE_NMS_TOPK_{split}"] = candidates
            proposals[f"MODEL.RPN.POST_NMS_TOPK_{split}"] = _PROPOSALS_PER_OBJECT * crowded
        needed = f"{matched}, and {_PROPOSALS_PER_OBJECT} proposals for each object"
        yield _room(cfg, "proposals", proposals, 100, needed)
        samples = {
            f"MODEL.{part}.BATCH_SIZE_PER_IMAGE": _SPARE * crowded / model[part].POSITIVE_FRACTION
            for part in samplers(cfg)
        }
        needed = f"{has}; there should be a foreground sample for each, and half as many to spare, "
        needed += f"in {' and '.join(samplers(cfg))}"
        yield _room(cfg, "samples", samples, 64, needed)
    if model.META_ARCHITECTURE != "ProposalNetwork":
        keys = {"TEST.DETECTIONS_PER_IMAGE": _SPARE * crowded}
        needed = f"{has}; there should be a detection for each, and half as many to spare"
        found = _room(cfg, "detections", keys, 50, needed)
        for new in found.changes.values():
            room = (cfg.TEST.DETECTIONS_PER_IMAGE, new)
            before, after = map(density.without_room, room)
            effect = f"Objects beyond the detections: {before:.1%} before, {after:.1%} after."
            if crowded > _COCO_DETECTIONS:
                effect += f" COCO's AP looks at {_COCO_DETECTIONS} detections of a class in an "
                effect += "image, and does not show it."
            found = replace(found, effect=effect)
        yield found


def _room(
    cfg: CfgNode, subject: str, needed: dict[str, float], multiple: int, reason: str
) -> Recommendation:
    """Raises keys to what is needed, rounded up to a multiple; samples are reported and not set."""
    has = {key: value_at(cfg, key) for key in needed}
    changes = {
        key: int(-(-value // multiple) * multiple)
        for key, value in needed.items()
        if has[key] < value
    }
    short = {key: key.removeprefix("MODEL.") for key in needed}
    reason += f", and there {'is not' if changes else 'is'}."
    if not changes:
        room = ", ".join(f"{short[key]} {value}" for key, value in has.items())
        return Recommendation(subject, {}, reason, f"Room enough: {room}.")
    effect = "Before and after: " + ", ".join(
        f"{short[key]} {has[key]} and {new}" for key, new in changes.items()
    )
    effect += ". The time and memory of the part that reads them grow in proportion."
    if subject == "samples":
        effect += f" The effect on AP is {UNTRIED}."
        return Recommendation(subject, {}, reason, effect, untried=changes)
    return Recommendation(subject, changes, reason, effect)

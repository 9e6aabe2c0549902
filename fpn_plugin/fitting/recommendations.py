"""Recommendations for a dataset: levels, canonical size, anchors and room for its objects."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from detectron2.config import CfgNode

from fpn_plugin.config import value_at

from .anchors import fit_anchors
from .density import Density, check_sampling, samplers
from .ground_truth import GroundTruth
from .measures import Measures, measure
from .pyramid import Pyramid, level_names
from .resizing import InputBoxes

__all__ = ["Recommendation", "recommend", "recommend_room"]

_ENOUGH = 100  # objects, to recommend any change
_SAMPLE = 100_000  # boxes that candidates are measured on
_FEW = 0.005  # of boxes; a level that fewer need is dropped
_MANY = 0.05  # of boxes; a level that more need is added
_FINE_CELLS = 4.0  # shorter side, in cells of the next level, under which the finest is needed
_LEAST_CELLS = 2.0  # shorter side, in cells of the finest level, under which a finer one is
_FINEST = 2  # level of the finest stage that ResNets and most networks give
_WORTH_CHANGING = 0.1  # of mean best IoU, to change anchors: 0.08 brought no AP, 0.2 did
_WORTH_ADDING = 0.03  # of it, to add a size to each level
_WORTH_REPORTING = 0.02  # of it, by other ratios
_CANONICAL_BINS = (1.0, 2.0)  # cells per bin of a region at the lower end of its level
_PROPOSALS_PER_OBJECT = 5  # most proposals of an object are near copies of each other
_CANDIDATES_PER_OBJECT = 10  # before NMS
_SPARE = 1.5  # detections and samples for each object
_COCO_DETECTIONS = 100  # that COCO's AP looks at in an image
# Of effects that docs/fitting.md has runs of, and of those that it has none of.
_TRIED_WITH_ANCHORS = "tried only together with other anchors (docs/fitting.md)"
_UNTRIED = "not tried by training"


@dataclass(frozen=True)
class Recommendation:
    """A change of a config for a dataset, or none.

    Attributes:
        subject: the part of the config: "levels", "canonical size", "anchors", ...
        changes: config keys to their new values; empty to keep the config.
        reason: why, in one sentence.
        effect: the expected effect, in figures.
        figures: the same figures, for JSON.
    """

    subject: str
    changes: dict[str, Any]
    reason: str
    effect: str
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def keep(self) -> bool:
        """Whether it changes nothing."""
        return not self.changes


def recommend(
    cfg: CfgNode, pyramid: Pyramid, truth: GroundTruth, inputs: InputBoxes
) -> tuple[list[Recommendation], CfgNode, Pyramid]:
    """Recommends changes of a config for a dataset.

    Args:
        cfg: the config.
        pyramid: the config's.
        truth: the boxes of its training data.
        inputs: the same at the network's input.

    Returns:
        The recommendations, also those that change nothing; a copy of the config with all of them
        applied; and its pyramid.
    """
    fitted = cfg.clone()
    objects = len(truth.boxes)
    if objects < _ENOUGH:
        reason = f"{objects} {'object is' if objects == 1 else 'objects are'} too few to judge by; "
        reason += f"at least {_ENOUGH} are needed."
        effect = "Nothing changes; figures below are of the objects there are."
        return [Recommendation("everything", {}, reason, effect)], fitted, pyramid
    inputs = inputs.sample(_SAMPLE)
    levels, new = _levels(cfg, pyramid, inputs)
    found = [levels]
    if new.roi_levels:
        canonical, new = _canonical(cfg, pyramid, new, inputs)
        found.append(canonical)
    anchors, new = _anchors(new, inputs)
    found += [anchors, *recommend_room(cfg, Density.of(truth))]
    fitted.defrost()
    for recommendation in found:
        for key, value in recommendation.changes.items():
            fitted.merge_from_list([key, value])
    return found, fitted, new


def _levels(cfg: CfgNode, pyramid: Pyramid, inputs: InputBoxes) -> tuple[Recommendation, Pyramid]:
    finest = pyramid.stages[0]
    shorter = inputs.sides.min(axis=1)

    def narrower(cells: float, level: int) -> float:
        return float((shorter < cells * 2**level).mean())

    def needing(level: int) -> float:
        return narrower(_FINE_CELLS, level + 1)

    def lost(level: int) -> float:
        return narrower(_LEAST_CELLS, level)

    figures = {"needing_finest": needing(finest), "below_2_cells": lost(finest)}
    reason = (
        f"{needing(finest):.1%} of objects are narrower than {_FINE_CELLS:.0f} cells of "
        f"P{finest + 1} and need P{finest}; {lost(finest):.1%} are narrower than "
        f"{_LEAST_CELLS:.0f} cells of P{finest}."
    )
    fixed = _fixed_by(cfg, pyramid)
    if fixed:
        return Recommendation("levels", {}, reason, f"Levels stay: {fixed}.", figures), pyramid
    # As many levels at once as the rules ask for, so that the fitted config asks for no more.
    new = finest
    while new < _coarsest_beginning(pyramid) and needing(new) < _FEW:
        new += 1
    while new <= finest and new > _FINEST and lost(new) > _MANY:
        new -= 1
    if new == finest:
        effect = "Nothing changes."
        if lost(finest) > _MANY:
            effect += " There is no finer stage to build on: a larger INPUT.MIN_SIZE helps objects "
            effect += "this small (table of input sizes)."
        return Recommendation("levels", {}, reason, effect, figures), pyramid
    moved = _moved(pyramid, new)
    times = sum(0.25**level for level in moved.anchor_levels)
    times /= sum(0.25**level for level in pyramid.anchor_levels)
    figures["cells"] = times
    if new > finest:
        tried = _UNTRIED if new > finest + 1 else _TRIED_WITH_ANCHORS
        reason = (
            f"Only {needing(new - 1):.1%} of objects are narrower than {_FINE_CELLS:.0f} cells of "
            f"P{new}, so {_listed(range(finest, new))} dropped."
        )
        effect = (
            f"The levels have {times:.0%} of the cells of before, which the 3x3 convolutions of "
            f"the pyramid and of the heads on it cost. Faster; the effect on AP is {tried}."
        )
    else:
        figures["below_2_cells_after"] = lost(new)
        reason = (
            f"{lost(finest):.1%} of objects are narrower than {_LEAST_CELLS:.0f} cells of "
            f"P{finest}, so {_listed(range(new, finest))} added."
        )
        effect = (
            f"{lost(new):.1%} are narrower than that many cells of P{new}. The levels have "
            f"{times:.1f} times as many cells, which convolutions cost. The effect on AP is "
            f"{_UNTRIED}."
        )
    changes = _level_changes(cfg, pyramid, moved)
    return Recommendation("levels", changes, reason, effect, figures), moved


def _listed(levels: range) -> str:
    names = [f"P{level}" for level in levels]
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}"


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


def _canonical(
    cfg: CfgNode, first: Pyramid, pyramid: Pyramid, inputs: InputBoxes
) -> tuple[Recommendation, Pyramid]:
    """The canonical size of a pyramid with its new levels; ``first`` is the config's.

    Eq. (1) gives a region at the lower end of its level s0 / 2^k0 cells: 14 in the paper, two for
    each of 7 bins. One to two cells for a bin are right.
    """
    before = measure(inputs, pyramid)
    same_levels = first.roi_levels == pyramid.roi_levels
    origin = before if same_levels else measure(inputs, first)
    s0, k0 = pyramid.canonical_size, pyramid.canonical_level
    bins = int(cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION)
    cells = s0 / 2**k0
    least, most = (bins * cells_per_bin for cells_per_bin in _CANONICAL_BINS)
    figures = {"cells_at_lower_end": cells, "levels_before": _spread(before)}
    shown = _shares(origin)
    here = (
        f"s0 {s0:g} px at k0 {k0} gives a region at least {cells:.3g} cells of its level where one "
        f"is fine enough, for {bins} bins"
    )
    if least <= cells <= most:
        effect = f"Regions stay at {shown}."
        if not same_levels:
            effect = f"Regions are at {shown} before, and at {_shares(before)} by the change of "
            effect += "levels."
        reason = f"{here}, which is enough."
        return Recommendation("canonical size", {}, reason, effect, figures), pyramid
    if not pyramid.canonical_keys:
        reason = f"{here}, but these RoI heads read neither from the config."
        effect = "MODEL.ROI_HEADS.NAME FPNROIHeads would."
        return Recommendation("canonical size", {}, reason, effect, figures), pyramid
    size = round(min(max(cells, least), most) * 2**k0)
    resized = replace(pyramid, canonical_size=float(size))
    after = measure(inputs, resized)
    moved = float((origin.level != after.level).mean())
    cause = "" if same_levels else ", by the change of levels too"
    why = "less than a cell for each" if cells < least else "more than two cells for each"
    figures |= {"moved": moved, "levels_after": _spread(after)}
    reason = f"{here}, {why}; k0 stays, since only s0 / 2^k0 matters."
    effect = f"{moved:.1%} of regions change their level{cause}: {shown} before, {_shares(after)} "
    effect += f"after. The effect on AP is {_UNTRIED}."
    changes = {"MODEL.FPN.CANONICAL_BOX_SIZE": size}
    return Recommendation("canonical size", changes, reason, effect, figures), resized


def _spread(measures: Measures) -> dict[int, float]:
    return {level: float((measures.level == level).mean()) for level in measures.pyramid.roi_levels}


def _shares(measures: Measures) -> str:
    return ", ".join(f"P{level} {share:.0%}" for level, share in _spread(measures).items())


def _anchors(pyramid: Pyramid, inputs: InputBoxes) -> tuple[Recommendation, Pyramid]:
    before = measure(inputs, pyramid)
    num_sizes = len(pyramid.sizes[0])
    fits = {
        "same": fit_anchors(inputs, pyramid, num_sizes),
        "more": fit_anchors(inputs, pyramid, num_sizes + 1),
        "ratios_too": fit_anchors(inputs, pyramid, num_sizes, ratios_too=True),
    }
    measured = {name: measure(inputs, each) for name, each in fits.items()}
    more, shaped = fits["more"], fits["ratios_too"]
    reached = max(measured["same"].mean_iou, before.mean_iou)
    gained = measured["same"].mean_iou - before.mean_iou
    added = measured["more"].mean_iou - reached
    figures = {
        **{name: _fit(each) for name, each in {"before": before, **measured}.items()},
        "anchors_per_cell": {"before": pyramid.anchors_per_cell, "more": more.anchors_per_cell},
        "fitted_ratios": list(shaped.ratios[0]),
    }
    # Reported, not changed: on long thin objects fitted ratios raised recall, but not AP.
    by_ratios = measured["ratios_too"].mean_iou - reached
    ratios = ""
    if by_ratios >= _WORTH_REPORTING:
        named = ", ".join(f"{ratio:g}" for ratio in shaped.ratios[0])
        ratios = f" Ratios stay; fitted ones ({named}) would add {by_ratios:.2f} of IoU, which "
        ratios += "brought no AP in the trainings of docs/fitting.md."
    adding = added >= _WORTH_ADDING
    gain = gained + added if adding else gained
    if gain < _WORTH_CHANGING:
        reason = (
            f"Fitted anchors would overlap objects by {gained:+.2f} of IoU, and with one more size "
            f"per level by {gained + added:+.2f}; less than {_WORTH_CHANGING} brought no AP in the "
            "trainings of docs/fitting.md."
        )
        effect = f"Nothing changes: {_figures(before)}.{ratios}"
        return Recommendation("anchors", {}, reason, effect, figures), pyramid
    chosen = "more" if adding else "same"
    effect = f"Before: {_figures(before)}. After: {_figures(measured[chosen])}."
    if adding:
        reason = (
            f"With {num_sizes + 1} sizes per level anchors overlap objects better than {num_sizes} "
            f"can (mean best IoU {measured['more'].mean_iou:.2f} against "
            f"{measured['same'].mean_iou:.2f})."
        )
        effect += f" {more.anchors_per_cell} anchors per cell, {pyramid.anchors_per_cell} before."
    else:
        reason = "As many anchors, of other sizes, overlap objects better; one more size would add "
        reason += f"{added:.2f} of IoU."
    changes = {"MODEL.ANCHOR_GENERATOR.SIZES": list(map(list, fits[chosen].sizes))}
    return Recommendation("anchors", changes, reason, effect + ratios, figures), fits[chosen]


def _fit(measures: Measures) -> dict[str, float]:
    recalls = {"recall_50": measures.recall(0.5), "recall_70": measures.recall(0.7)}
    return {"mean_iou": measures.mean_iou, **recalls}


def _figures(measures: Measures) -> str:
    text = "mean best IoU {mean_iou:.2f}, recall {recall_50:.0%} at 0.5 and {recall_70:.0%} at 0.7"
    return text.format(**_fit(measures))


def recommend_room(cfg: CfgNode, density: Density) -> Iterator[Recommendation]:
    """Recommends proposals, samples and detections per image.

    Args:
        cfg: the config.
        density: of its training data.

    Raises:
        UserError: see :func:`check_sampling`.
    """
    check_sampling(cfg)
    crowded, model = density.crowded, cfg.MODEL
    if model.META_ARCHITECTURE == "RetinaNet":
        keys = {"MODEL.RETINANET.TOPK_CANDIDATES_TEST": _CANDIDATES_PER_OBJECT * crowded}
        yield _room(cfg, "proposals", keys, 50, density)
    else:
        proposals = {}
        for split in ("TRAIN", "TEST"):
            proposals[f"MODEL.RPN.PRE_NMS_TOPK_{split}"] = _CANDIDATES_PER_OBJECT * crowded
            proposals[f"MODEL.RPN.POST_NMS_TOPK_{split}"] = _PROPOSALS_PER_OBJECT * crowded
        yield _room(cfg, "proposals", proposals, 100, density)
        samples = {
            f"MODEL.{part}.BATCH_SIZE_PER_IMAGE": _SPARE * crowded / model[part].POSITIVE_FRACTION
            for part in samplers(cfg)
        }
        yield _room(cfg, "samples", samples, 64, density)
    if model.META_ARCHITECTURE != "ProposalNetwork":
        keys = {"TEST.DETECTIONS_PER_IMAGE": _SPARE * crowded}
        yield _room(cfg, "detections", keys, 50, density)


_NEEDED = {
    "proposals": f"{_PROPOSALS_PER_OBJECT} proposals and {_CANDIDATES_PER_OBJECT} candidates a "
    "level before NMS for each of them",
    "samples": "a foreground sample for each of them, and half as many to spare",
    "detections": "a detection for each of them, and half as many to spare",
}


def _room(
    cfg: CfgNode, subject: str, needed: dict[str, float], multiple: int, density: Density
) -> Recommendation:
    """Raises keys to what is needed, rounded up to a multiple."""
    has = {key: value_at(cfg, key) for key in needed}
    changes = {
        key: int(-(-value // multiple) * multiple)
        for key, value in needed.items()
        if has[key] < value
    }
    short = {key: key.removeprefix("MODEL.") for key in needed}
    parts = " and ".join(key.split(".")[1] for key in needed)
    where = f", in {parts}" if subject == "samples" else ""
    reason = (
        f"99 of 100 images hold at most {density.crowded} objects; there should be "
        f"{_NEEDED[subject]}{where}, and there {'is not' if changes else 'is'}."
    )
    if not changes:
        room = ", ".join(f"{short[key]} {value}" for key, value in has.items())
        return Recommendation(subject, {}, reason, f"Room enough: {room}.")
    if subject == "detections":
        [(key, new)] = changes.items()
        before, after = density.without_room(has[key]), density.without_room(new)
        effect = f"Objects beyond the detections: {before:.1%} before, {after:.1%} after."
        if density.crowded > _COCO_DETECTIONS:
            effect += f" COCO's AP looks at {_COCO_DETECTIONS} detections an image, and does not "
            effect += "show it."
    else:
        effect = "For each crowded object, before and after: " + ", ".join(
            f"{short[key]} {has[key] / density.crowded:.1f} and {new / density.crowded:.1f}"
            for key, new in changes.items()
        )
        effect += ". The time and memory of the part that reads them grow in proportion."
    effect += f" The effect on AP is {_UNTRIED}."
    return Recommendation(subject, changes, reason, effect)

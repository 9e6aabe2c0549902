"""What levels, canonical size and anchors a dataset wants, each with its reason and effect."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode

from .anchor_fit import fit_anchors
from .density import Density, recommend_room
from .ground_truth import GroundTruth
from .measures import Measures, measure
from .pyramid import Pyramid, level_names
from .recommendation import UNTRIED, Recommendation, applied
from .resizing import InputBoxes

__all__ = ["recommend"]

_ENOUGH = 100  # objects, for anything to be changed
_SAMPLE = 100_000  # boxes that candidates are measured on
_FEW = 0.005  # of boxes, that a level is dropped for
_MANY = 0.05  # of boxes, that a level is added for
_FINE_CELLS = 4.0  # shorter side, in cells of the next level, under which the finest is needed
_LEAST_CELLS = 2.0  # shorter side, in cells of the finest level, under which a finer one is
_FINEST = 2  # level of the finest stage that ResNets and most networks give
_WORTH_CHANGING = 0.1  # of mean best IoU, for other anchors: 0.08 brought no AP, 0.2 did
_WORTH_ADDING = 0.03  # the same, for a size more at each level instead of as many
_WORTH_TELLING = 0.02  # the same, for other ratios
_TRIED_WITH_ANCHORS = "tried by training together with other anchors alone (docs/fitting.md)"
_CANONICAL_BINS = (1.0, 2.0)  # cells per bin of a region at the lower end of its level


def recommend(
    cfg: CfgNode, truth: GroundTruth, inputs: InputBoxes
) -> tuple[list[Recommendation], CfgNode]:
    """What to change in a config for a dataset.

    Args:
        cfg: the config.
        truth: the boxes of its training data.
        inputs: the same at the network's input.

    Returns:
        The recommendations, those to keep things as they are among them, and the config with all
        of them applied.
    """
    objects = len(truth.boxes)
    if objects < _ENOUGH:
        few = Recommendation(
            "everything",
            {},
            f"{objects} {'object is' if objects == 1 else 'objects are'} too few to judge by: of "
            f"fewer than {_ENOUGH}, a few others would say otherwise.",
            "Nothing changes; figures below are of the objects there are.",
        )
        return [few], cfg.clone()
    inputs = inputs.sample(_SAMPLE)
    found = [_levels(cfg, inputs)]
    fitted = applied(cfg, found)
    if Pyramid.from_config(fitted).roi_levels:
        found.append(_canonical(cfg, fitted, inputs))
        fitted = applied(cfg, found)
    found.append(_anchors(fitted, inputs))
    found += recommend_room(fitted, Density.of(truth))
    return found, applied(cfg, found)


def _levels(cfg: CfgNode, inputs: InputBoxes) -> Recommendation:
    pyramid = Pyramid.from_config(cfg)
    finest = pyramid.stages[0]
    shorter = inputs.sides.min(axis=1)

    def needing(level: int) -> float:
        return float((shorter < _FINE_CELLS * 2 ** (level + 1)).mean())

    def lost(level: int) -> float:
        return float((shorter < _LEAST_CELLS * 2**level).mean())

    figures = {"needing_finest": needing(finest), "below_2_cells": lost(finest)}
    keep_reason = (
        f"{needing(finest):.1%} of objects are narrower than {_FINE_CELLS:.0f} cells of "
        f"P{finest + 1} and need P{finest}; {lost(finest):.1%} are narrower than "
        f"{_LEAST_CELLS:.0f} cells of P{finest}."
    )
    told = _unmovable(cfg, pyramid)
    if told:
        return Recommendation("levels", {}, keep_reason, f"Levels stay: {told}.", figures)
    # As many levels at once as the rules ask for, so that the fitted config asks for no more.
    new = finest
    while new < _coarsest_beginning(pyramid) and needing(new) < _FEW:
        new += 1
    while new <= finest and new > _FINEST and lost(new) > _MANY:
        new -= 1
    changes = _level_changes(cfg, pyramid, new)
    levels = range(new, pyramid.anchor_levels[-1] + 1)
    times = sum(0.25**level for level in levels)
    times /= sum(0.25**level for level in pyramid.anchor_levels)
    if new > finest:
        tried = UNTRIED if new > finest + 1 else _TRIED_WITH_ANCHORS
        return Recommendation(
            "levels",
            changes,
            f"Only {needing(new - 1):.1%} of objects are narrower than {_FINE_CELLS:.0f} cells of "
            f"P{new}, so {_listed(range(finest, new))} dropped.",
            f"Cells of all levels, which the 3x3 convolutions of pyramid and heads on it are paid "
            f"for: {times:.0%} of what they were. Faster; what becomes of AP is {tried}.",
            figures | {"cells": times},
        )
    if new < finest:
        after = lost(new)
        return Recommendation(
            "levels",
            changes,
            f"{lost(finest):.1%} of objects are narrower than {_LEAST_CELLS:.0f} cells of "
            f"P{finest}, so {_listed(range(new, finest))} added.",
            f"{after:.1%} are narrower than that many cells of P{new}. Cells of all levels, which "
            f"convolutions are paid for: {times:.1f} times as many. What becomes of AP is "
            f"{UNTRIED}.",
            figures | {"cells": times, "below_2_cells_after": after},
        )
    effect = "Nothing changes."
    if lost(finest) > _MANY:
        effect += (
            " There is no finer stage to build on: a larger INPUT.MIN_SIZE is what helps objects "
            "this small (table of input sizes)."
        )
    return Recommendation("levels", {}, keep_reason, effect, figures)


def _listed(levels: range) -> str:
    names = [f"P{level}" for level in levels]
    return f"{' and '.join(names)} {'is' if len(names) == 1 else 'are'}"


def _coarsest_beginning(pyramid: Pyramid) -> int:
    """The level that a pyramid may begin at: two stages stay, and a level for all that read any."""
    spare = [len(pyramid.stages) - 2, len(pyramid.anchor_levels) - 1]
    spare += [len(pyramid.roi_levels) - 1] if pyramid.roi_levels else []
    return pyramid.stages[0] + max(min(spare), 0)


def _unmovable(cfg: CfgNode, pyramid: Pyramid) -> str:
    """Why the finest level of a config cannot be moved; "" where it can."""
    if cfg.MODEL.META_ARCHITECTURE == "PanopticFPN":
        return "the semantic head reads them too"
    if cfg.MODEL.FPN.get("OUT_FEATURES"):
        return "MODEL.FPN.OUT_FEATURES names those to compute"
    readers = {pyramid.anchor_levels[0], *pyramid.roi_levels[:1]}
    if readers != {pyramid.stages[0]}:
        return "anchors, regions and stages do not begin at the same one"
    return ""


def _level_changes(cfg: CfgNode, pyramid: Pyramid, finest: int) -> dict[str, Any]:
    """The keys of a pyramid that begins at another level, finer or coarser."""
    added = range(finest, pyramid.stages[0])
    dropped = max(finest - pyramid.stages[0], 0)

    def moved(levels: tuple[int, ...]) -> tuple[int, ...]:
        return (*added, *levels[dropped:])

    def per_level(values: tuple[tuple[float, ...], ...], factor: float) -> list[list[float]]:
        first = [[value * factor ** (added.stop - k) for value in values[0]] for k in added]
        return first + [list(each) for each in values[dropped:]]

    changes: dict[str, Any] = {
        "MODEL.FPN.IN_FEATURES": level_names(moved(pyramid.stages), "res"),
        f"{pyramid.node}.IN_FEATURES": level_names(moved(pyramid.anchor_levels)),
        "MODEL.ANCHOR_GENERATOR.SIZES": per_level(pyramid.sizes, 0.5),
    }
    if len(cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS) > 1:  # a list for each level
        changes["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"] = per_level(pyramid.ratios, 1.0)
    if pyramid.roi_levels:
        changes["MODEL.ROI_HEADS.IN_FEATURES"] = level_names(moved(pyramid.roi_levels))
    if added and cfg.MODEL.BACKBONE.NAME != "build_fpn_backbone":
        # Detectron2's own backbones, unlike the plugin's, compute no stage that is not named.
        names = [*level_names(added, "res"), *cfg.MODEL.RESNETS.OUT_FEATURES]
        changes["MODEL.RESNETS.OUT_FEATURES"] = sorted(set(names))
    return changes


def _canonical(given: CfgNode, cfg: CfgNode, inputs: InputBoxes) -> Recommendation:
    """What to do with a config whose levels are settled, beside the one that was given.

    Eq. (1) gives a region at the lower end of its level s0 / 2^k0 cells: 14 in the paper, two
    for each of 7 bins. Between one cell a bin and two, what data asks for is met by clamping.
    """
    pyramid = Pyramid.from_config(cfg)
    before = measure(inputs, pyramid)
    first = Pyramid.from_config(given)
    same_levels = first.roi_levels == pyramid.roi_levels
    origin = before if same_levels else measure(inputs, first)
    s0, k0 = pyramid.canonical_size, pyramid.canonical_level
    bins = int(cfg.MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION)
    cells = s0 / 2**k0
    least, most = (bins * cells_per_bin for cells_per_bin in _CANONICAL_BINS)
    spread = _spread(before)
    figures = {"cells_at_lower_end": cells, "levels_before": spread}
    shown = _shares(origin)
    if same_levels:
        stay = f"Regions stay at {shown}."
    else:
        stay = f"Regions are at {shown} before, and at {_shares(before)} by the change of levels."
    here = (
        f"s0 {s0:g} px at k0 {k0} gives a region at least {cells:.3g} cells of its level where one "
        f"is fine enough, for {bins} bins"
    )
    if least <= cells <= most:
        return Recommendation("canonical size", {}, f"{here}, which is enough.", stay, figures)
    if not pyramid.canonical_keys:
        return Recommendation(
            "canonical size",
            {},
            f"{here}, but these RoI heads read neither from the config.",
            "MODEL.ROI_HEADS.NAME FPNROIHeads would.",
            figures,
        )
    size = min(max(cells, least), most) * 2**k0
    changes = {"MODEL.FPN.CANONICAL_BOX_SIZE": round(size)}
    fitted = applied(cfg, [Recommendation("", changes, "", "")])
    after = measure(inputs, Pyramid.from_config(fitted))
    moved = float((origin.level != after.level).mean())
    cause = "" if same_levels else ", by the change of levels too"
    why = "less than a cell for each" if cells < least else "more than two cells for each"
    return Recommendation(
        "canonical size",
        changes,
        f"{here}, {why}; k0 stays, since it and s0 act as s0 / 2^k0 alone.",
        f"{moved:.1%} of regions change their level{cause}: {shown} before, {_shares(after)} "
        f"after. What becomes of AP is {UNTRIED}.",
        figures | {"moved": moved, "levels_after": _spread(after)},
    )


def _spread(measures: Measures) -> dict[int, float]:
    return {level: float((measures.level == level).mean()) for level in measures.roi_levels}


def _shares(measures: Measures) -> str:
    return ", ".join(f"P{level} {share:.0%}" for level, share in _spread(measures).items())


def _anchors(cfg: CfgNode, inputs: InputBoxes) -> Recommendation:
    pyramid = Pyramid.from_config(cfg)
    before = measure(inputs, pyramid)
    num_sizes = len(pyramid.sizes[0])
    same = fit_anchors(inputs, pyramid, num_sizes)
    more = fit_anchors(inputs, pyramid, num_sizes + 1)
    shaped = fit_anchors(inputs, pyramid, num_sizes, ratios_too=True)
    fits = {"same": same, "more": more, "ratios_too": shaped}
    measured = {name: measure(inputs, each) for name, each in fits.items()}
    gained = measured["same"].mean_iou - before.mean_iou
    added = measured["more"].mean_iou - max(measured["same"].mean_iou, before.mean_iou)
    figures = {
        "before": _fit(before),
        **{name: _fit(each) for name, each in measured.items()},
        "anchors_per_cell": {"before": pyramid.anchors_per_cell, "more": more.anchors_per_cell},
        "fitted_ratios": list(shaped.ratios[0]),
    }
    # Fitted and told, not changed: on long thin objects they raised recall, and AP by nothing.
    by_ratios = measured["ratios_too"].mean_iou - max(measured["same"].mean_iou, before.mean_iou)
    ratios = ""
    if by_ratios >= _WORTH_TELLING:
        named = ", ".join(f"{ratio:g}" for ratio in shaped.ratios[0])
        ratios = (
            f" Ratios stay; fitted ones ({named}) would add {by_ratios:.2f} of IoU, which "
            "brought no AP where it was tried (docs/fitting.md)."
        )
    adding = added >= _WORTH_ADDING
    gain = gained + added if adding else gained
    if gain < _WORTH_CHANGING:
        return Recommendation(
            "anchors",
            {},
            f"Fitted anchors would overlap objects by {gained:+.2f} of IoU, and with a size more "
            f"a level by {gained + added:+.2f}; less than {_WORTH_CHANGING} brought no AP where "
            "it was tried (docs/fitting.md).",
            f"Nothing changes: {_told(before)}.{ratios}",
            figures,
        )
    if adding:
        chosen, after = more, measured["more"]
        reason = (
            f"With {num_sizes + 1} sizes a level anchors overlap objects better than {num_sizes} "
            f"can, wherever {'it is' if num_sizes == 1 else 'they are'} set (mean best IoU "
            f"{after.mean_iou:.2f} against {measured['same'].mean_iou:.2f})."
        )
    else:
        chosen, after = same, measured["same"]
        reason = (
            f"As many anchors, of other sizes, overlap objects better; a size more would add "
            f"{added:.2f} of IoU."
        )
    changes = {"MODEL.ANCHOR_GENERATOR.SIZES": [list(each) for each in chosen.sizes]}
    effect = f"Before: {_told(before)}. After: {_told(after)}."
    if chosen is more:
        effect += f" {more.anchors_per_cell} anchors a cell, {pyramid.anchors_per_cell} before."
    effect += ratios
    return Recommendation("anchors", changes, reason, effect, figures)


def _fit(measures: Measures) -> dict[str, float]:
    return {
        "mean_iou": measures.mean_iou,
        "recall_50": measures.recall(0.5),
        "recall_70": measures.recall(0.7),
    }


def _told(measures: Measures) -> str:
    return (
        f"mean best IoU {measures.mean_iou:.2f}, recall {measures.recall(0.5):.0%} at 0.5 and "
        f"{measures.recall(0.7):.0%} at 0.7"
    )

"""A fast check of many annotations: only those that it does not clear are looked at singly."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np

from .annotations import Known
from .requirements import empty_mask_problem, needs_problem
from .shapes import box_rules, is_polygon, keypoint_problem, mask_problem

__all__ = ["may_break_a_rule"]

_UNKNOWN_SIZE = (math.nan, math.nan)


def may_break_a_rule(records: Sequence[Any], start: int, known: Known) -> np.ndarray:
    """Which annotations may have a problem by :func:`.annotation_problems`.

    Args:
        records: annotations that follow each other in the file.
        start: index of the first of them.
        known: what they refer to.

    Returns:
        bool ``(len(records),)``: False if nothing is wrong.
    """
    try:
        return _screen(records, start, known)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        return np.ones(len(records), bool)  # values of other types: none is cleared


def _screen(records: Sequence[dict[str, Any]], start: int, known: Known) -> np.ndarray:
    count, number = len(records), {int, float}
    ids = _column(records, "id", {int})
    areas = np.array(_column(records, "area", number), np.float64)
    crowds = np.array(_column(records, "iscrowd", {int}))
    images = _column(records, "image_id", {int, str})
    categories = _column(records, "category_id", {int})
    boxes = _column(records, "bbox", {list})
    if set(map(len, boxes)) != {4} or not set(map(type, chain.from_iterable(boxes))) <= number:
        raise TypeError
    sizes = list(map(known.sizes.get, images))
    pixels = np.array([size or _UNKNOWN_SIZE for size in sizes], np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        broken = box_rules(*np.array(boxes, np.float64).T, *pixels.T)
    firsts = np.fromiter(map(known.first.__getitem__, ids), np.int64, count)
    # Comparisons with NaN are false: they clear nothing.
    clear = (
        (firsts == np.arange(start, start + count))
        & (np.array(ids, np.int64) >= 1)
        & (areas >= 0)
        & (areas < np.inf)
        & (crowds == 0)
        & np.fromiter(map(known.categories.__contains__, categories), bool, count)
        & np.isfinite(pixels[:, 0])
        & ~np.any(list(broken.values()), axis=0)
    )
    asked = known.needs.masks or known.needs.keypoints
    polygons: dict[int, list[Any]] = {}
    for i, (record, size) in enumerate(zip(records, sizes, strict=True)):
        mask = record.get("segmentation")
        if type(mask) is list and len(mask) == 1 and type(mask[0]) is list and is_polygon(mask[0]):
            polygons[i], mask = mask[0], None  # as most are: they are looked at together
        if (
            (mask is not None and mask_problem(mask, size)[0])
            or ("keypoints" in record and keypoint_problem(record["keypoints"], size)[0])
            or ("ignore" in record and record["ignore"] != 0)
            or (asked and needs_problem(record, known.needs)[0])
            or (asked and empty_mask_problem(record, size, known.needs)[0])
        ):
            clear[i] = False
    if polygons:
        indices = list(polygons)
        clear[indices] &= _near(polygons.values(), 2 * pixels[indices].max(axis=1))
    return ~clear


def _near(polygons: Iterable[list[Any]], farthest: np.ndarray) -> np.ndarray:
    """Whether all coordinates of each polygon are numbers within +-farthest of it.

    Raises:
        OverflowError, TypeError: some are no numbers.
    """
    flat = array("d")  # takes only numbers; numpy would read text as numbers too
    for polygon in polygons:
        flat.fromlist(polygon)
    lengths = np.fromiter(map(len, polygons), np.int64, len(farthest))
    near = np.abs(np.frombuffer(flat)) <= np.repeat(farthest, lengths)  # of NaN: False
    return np.logical_and.reduceat(near, lengths.cumsum() - lengths)


def _column(records: Sequence[dict[str, Any]], key: str, types: set[type]) -> list[Any]:
    """Values of a key, all of the types given.

    Raises:
        KeyError, TypeError: they are not.
    """
    values = [record[key] for record in records]
    if not set(map(type, values)) <= types:
        raise TypeError
    return values

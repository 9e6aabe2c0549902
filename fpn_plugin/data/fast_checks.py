"""Screening annotations with numpy, as they are many: only those that may break a rule are looked
at one by one.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from .annotations import Known, empty_mask_problem
from .requirements import needs_problem
from .shapes import box_rules, is_polygon, keypoint_problem, mask_problem

__all__ = ["may_break_a_rule"]

_UNKNOWN_SIZE = (math.nan, math.nan)


def may_break_a_rule(records: Sequence[Any], start: int, known: Known) -> np.ndarray:
    """Screens annotations: those it clears have no problem by :func:`annotation_problems`.

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
        return np.ones(len(records), bool)  # of a run with odd values, none is cleared


def _screen(records: Sequence[dict[str, Any]], start: int, known: Known) -> np.ndarray:
    count = len(records)
    ids = _column(records, "id", {int})
    areas = np.array(_column(records, "area", {int, float}), np.float64)
    crowds = np.array(_column(records, "iscrowd", {int}))
    images = _column(records, "image_id", {int, str})
    categories = _column(records, "category_id", {int})
    boxes = _column(records, "bbox", {list})
    if set(map(len, boxes)) != {4} or not set(map(type, chain.from_iterable(boxes))) <= {
        int,
        float,
    }:
        raise TypeError
    sizes = list(map(known.sizes.get, images))
    pixels = np.array([_UNKNOWN_SIZE if size is None else size for size in sizes], np.float64)
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
    outlines = []
    more = known.needs.masks or known.needs.keypoints
    for i, record in enumerate(records):
        if "segmentation" in record:
            if _is_plain(record["segmentation"]):
                outlines.append(i)
            elif mask_problem(record["segmentation"], sizes[i])[0]:
                clear[i] = False
        if "keypoints" in record and keypoint_problem(record["keypoints"], sizes[i])[0]:
            clear[i] = False
        if "ignore" in record and record["ignore"] != 0:
            clear[i] = False
        if more and (
            needs_problem(record, known.needs)[0]
            or empty_mask_problem(record, sizes[i], known.needs)[0]
        ):
            clear[i] = False
    if outlines:
        farthest = 2 * pixels[outlines].max(axis=1)
        clear[outlines] &= _near([records[i]["segmentation"][0] for i in outlines], farthest)
    return ~clear


def _is_plain(given: Any) -> bool:
    """Whether a segmentation is a list of one polygon, as most are."""
    if type(given) is not list or len(given) != 1 or type(given[0]) is not list:
        return False
    return is_polygon(given[0])


def _near(polygons: Sequence[list[Any]], farthest: np.ndarray) -> np.ndarray:
    """Whether all coordinates of each polygon are numbers within +-farthest of it.

    Raises:
        OverflowError, TypeError: some are no numbers.
    """
    flat = array("d")  # takes only numbers; numpy would read text as numbers too
    for polygon in polygons:
        flat.fromlist(polygon)
    lengths = np.fromiter(map(len, polygons), np.int64, len(polygons))
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    # Comparisons with NaN are false.
    near = np.abs(np.frombuffer(flat)) <= np.repeat(farthest, lengths)
    return np.logical_and.reduceat(near, starts)


def _column(records: Sequence[dict[str, Any]], key: str, types: set[type]) -> list[Any]:
    """Values of a key, all of the types given.

    Raises:
        KeyError, TypeError: they are not.
    """
    values = [record[key] for record in records]
    if not set(map(type, values)) <= types:
        raise TypeError
    return values

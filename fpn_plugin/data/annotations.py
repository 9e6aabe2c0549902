"""The rules for annotations of a COCO JSON.

They are written once, for one annotation. As annotations are many, whole runs of them are screened
with numpy first, and only those that may break a rule are looked at one by one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from .problems import Problem, shortened
from .shapes import (
    NO_EXTENT,
    NUMBER,
    ROUNDING,
    Size,
    box_problem,
    keypoint_problem,
    mask_problem,
)

__all__ = [
    "Known",
    "annotation_problems",
    "first_with",
    "has_id",
    "id_problems",
    "may_break_a_rule",
]

Id = int | str
_UNKNOWN_SIZE = (math.nan, math.nan)


@dataclass(frozen=True)
class Known:
    """What annotations refer to.

    Args:
        sizes: width and height by image id; None where an image's own record has none.
        categories: ids.
        first: index of the first annotation that has an id.
    """

    sizes: dict[Id, Size | None]
    categories: set[Id]
    first: dict[Id, int]


def has_id(record: Any) -> bool:
    """Whether a record has an id that is a number or text."""
    # type, because JSON's true is an int to isinstance.
    return isinstance(record, dict) and type(record.get("id")) in (int, str)


def first_with(records: Sequence[Any], key: str) -> dict[Id, int]:
    """Index of the first record that has a value, by value; numbers and text alone."""
    found: dict[Id, int] = {}
    for index in range(len(records) - 1, -1, -1):
        record = records[index]
        value = record.get(key) if isinstance(record, dict) else None
        if type(value) in (int, str):
            found[value] = index
    return found


def id_problems(
    part: str,
    index: int,
    record: Any,
    first: dict[Id, int],
    types: dict[str, type | tuple[type, ...]],
) -> Iterator[Problem]:
    """What is wrong with a record's id, and with the types of its values.

    Args:
        part: "images", "annotations" or "categories".
        index: of the record in it.
        record: anything.
        first: see :func:`first_with`.
        types: by key.
    """
    where = f"{part}[{index}]"
    if not has_id(record):
        yield Problem("id_missing", where, "has no id")
        return
    given = record["id"]
    if first[given] != index:
        yield Problem("id_twice", where, f"id {shortened(given)} is there twice")
    if type(given) is int and not -(2**63) <= given < 2**63:
        yield Problem("id_unusable", where, f"id {shortened(given)} does not fit into 64 bits")
    for key, kind in types.items():
        value = record.get(key)
        if not isinstance(value, kind) or (type(value) is bool and key != "iscrowd"):
            expected = "a number" if isinstance(kind, tuple) else kind.__name__
            told = f"{key!r} is {shortened(value)}, expected {expected}"
            yield Problem("value", f"{where} (id {shortened(given)})", told)


def annotation_problems(index: int, record: Any, known: Known) -> Iterator[Problem]:
    """What is wrong with an annotation.

    Args:
        index: of it in the file.
        record: anything.
        known: what it refers to.
    """
    types = {"id": int, "area": NUMBER, "iscrowd": int}
    yield from id_problems("annotations", index, record, known.first, types)
    if not has_id(record):
        return
    where = f"annotation {shortened(record['id'])}"
    if type(record["id"]) is int and record["id"] < 1:
        told = "COCO's evaluation takes ids from 1 on; 0 would never match"
        yield Problem("id_unusable", where, told)
    area, crowd = record.get("area"), record.get("iscrowd")
    if type(area) in NUMBER and not 0 <= area < math.inf:
        yield Problem("value", where, f"'area' is {shortened(area)}, expected square pixels")
    if isinstance(crowd, int) and crowd not in (0, 1):
        yield Problem("value", where, f"'iscrowd' is {shortened(crowd)}, expected 0 or 1")
    if record.get("ignore", 0) != 0:
        yield Problem("value", where, "'ignore' is not supported; use iscrowd")
    for part, ids in (("image", known.sizes), ("category", known.categories)):
        given = record.get(f"{part}_id")
        if type(given) not in (int, str) or given not in ids:
            yield Problem(f"{part}_unknown", where, f"no {part} has id {shortened(given)}")
    image = record.get("image_id")
    size = known.sizes.get(image) if type(image) in (int, str) else None
    for kind, told in (
        box_problem(record.get("bbox"), size),
        mask_problem(record.get("segmentation"), size),
        keypoint_problem(record.get("keypoints"), size),
    ):
        if kind:
            yield Problem(kind, where, told)


def may_break_a_rule(records: Sequence[Any], start: int, known: Known) -> np.ndarray:
    """Screens annotations: those it clears have no problem by :func:`annotation_problems`.

    Args:
        records: annotations that follow each other in the file.
        start: index of the first of them.
        known: what they refer to.

    Returns:
        bool ``(len(records),)``: False where nothing is wrong.
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
    x, y, width, height = np.array(boxes, np.float64).T
    sizes = list(map(known.sizes.get, images))
    pixels = np.array([_UNKNOWN_SIZE if size is None else size for size in sizes], np.float64)
    across, down = pixels.T
    right, bottom = x + width, y + height
    firsts = np.fromiter(map(known.first.__getitem__, ids), np.int64, count)
    with np.errstate(invalid="ignore"):
        # Comparisons with NaN are false: they clear nothing.
        clear = (
            (firsts == np.arange(start, start + count))
            & (np.array(ids, np.int64) >= 1)
            & (areas >= 0)
            & (areas < np.inf)
            & ((crowds == 0) | (crowds == 1))
            & np.fromiter(map(known.categories.__contains__, categories), bool, count)
            & (np.minimum(width, height) >= NO_EXTENT)
            & (np.minimum(x, y) >= -ROUNDING)
            & (right <= across + ROUNDING)
            & (bottom <= down + ROUNDING)
            & (right <= 2 * across)
            & (bottom <= 2 * down)
            & (np.minimum(right, bottom) >= NO_EXTENT)
            & (np.minimum(across - x, down - y) >= NO_EXTENT)
        )
    for i, record in enumerate(records):
        if "segmentation" in record and mask_problem(record["segmentation"], sizes[i])[0]:
            clear[i] = False
        if "keypoints" in record and keypoint_problem(record["keypoints"], sizes[i])[0]:
            clear[i] = False
        if "ignore" in record and record["ignore"] != 0:
            clear[i] = False
    return ~clear


def _column(records: Sequence[dict[str, Any]], key: str, types: set[type]) -> list[Any]:
    """Values of a key, all of the types given.

    Raises:
        KeyError, TypeError: they are not.
    """
    values = [record[key] for record in records]
    if not set(map(type, values)) <= types:
        raise TypeError
    return values

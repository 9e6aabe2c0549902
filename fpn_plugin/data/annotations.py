"""The rules for an annotation of a COCO JSON, and for any record's id."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .problems import Problem, shortened
from .requirements import Needs, empty_mask_problem, needs_problem
from .shapes import NUMBER, Size, box_problem, keypoint_problem, mask_problem

__all__ = ["Known", "annotation_problems", "first_with", "has_id", "id_problems"]

Id = int | str


@dataclass(frozen=True)
class Known:
    """What annotations refer to, and what a model needs of them."""

    sizes: dict[Id, Size | None]  # by image id; None if the image's record has none
    categories: set[Id]
    first: dict[Id, int]  # index of the first annotation that has an id
    needs: Needs


def has_id(record: Any) -> bool:
    """Whether a record has an id that is a number or text."""
    # By type: to isinstance JSON's true is an int.
    return isinstance(record, dict) and type(record.get("id")) in (int, str)


def first_with(records: Sequence[Any], key: str) -> dict[Id, int]:
    """Index of the first record that has a value of a key, by value; only numbers and text."""
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
        index: of the record in that list.
        record: anything.
        first: index of the first record by id.
        types: expected, by key.
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
            message = f"{key!r} is {shortened(value)}, expected {expected}"
            yield Problem("value", f"{where} (id {shortened(given)})", message)


def annotation_problems(index: int, record: Any, known: Known) -> Iterator[Problem]:
    """What is wrong with the annotation of an index, which may be anything."""
    types = {"id": int, "area": NUMBER, "iscrowd": int}
    yield from id_problems("annotations", index, record, known.first, types)
    if not has_id(record):
        return
    where = f"annotation {shortened(record['id'])}"
    if type(record.get("label_row")) is str:  # what it was converted from
        where += f" ({shortened(record['label_row'])})"
    if type(record["id"]) is int and record["id"] < 1:
        message = "COCO's evaluation takes ids from 1 on; 0 would never match"
        yield Problem("id_unusable", where, message)
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
    if crowd == 1:
        yield Problem("crowd", where, "is marked iscrowd")
    image = record.get("image_id")
    size = known.sizes.get(image) if type(image) in (int, str) else None
    for kind, message in (
        box_problem(record.get("bbox"), size),
        mask_problem(record.get("segmentation"), size),
        keypoint_problem(record.get("keypoints"), size),
        needs_problem(record, known.needs),
        empty_mask_problem(record, size, known.needs),
    ):
        if kind:
            yield Problem(kind, where, message)

"""Repairs of a COCO JSON: what it lacks and can be computed from the rest or the images."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from detectron2.structures.masks import polygon_area
from pycocotools import mask as coco_mask

from .box_layouts import COCO_LAYOUT, SLACK, box_layout
from .image_files import shown_size
from .problems import CONVERT, KINDS, Problem
from .records import declared_size, file_name_problems, records_of
from .shapes import (
    NUMBER,
    Size,
    are_pixels,
    box_problem,
    compressed,
    is_polygon,
    keypoint_problem,
    mask_problem,
)

__all__ = ["other_id", "repair", "repair_annotation", "same_objects"]

Record = dict[str, Any]
_WRITTEN = re.compile(r"[+-]?\d{1,15}(\.\d{1,15})?", re.ASCII)  # as a float holds them
_MOST = 2**53
_OF_AN_OBJECT = ("id", "image_id", "category_id", "bbox", "segmentation", "keypoints")
# Keys of numbers, and the types of values that stay.
_NUMBERS: dict[str, dict[str, tuple[type, ...]]] = {
    "images": {"id": (int, str), "width": (int,), "height": (int,)},
    "categories": {"id": (int,)},
    "annotations": {
        "image_id": (int, str), "category_id": (int,), "area": NUMBER, "iscrowd": (int, bool),
    },
}  # fmt: skip


def repair(content: Any, images: str | None, *, converting: bool = False) -> Iterator[Problem]:
    """Fills in what a COCO JSON lacks, and converts boxes that are written in another way.

    What cannot be repaired stays, for :func:`fpn_plugin.data.records.coco_problems` to find.

    Args:
        content: of the file, as json gives it; is changed.
        images: folder of its images; None if it is not known.
        converting: whether to convert also boxes whose layout is not certain.

    Yields:
        A problem for each kind of change.
    """
    parts = {part: records_of(content, part) for part in _NUMBERS}
    for part, records in parts.items():
        for key, types in _NUMBERS[part].items():
            message = f"{key!r} is a number in another form"
            yield from _reported(part, message, _read_numbers(records, key, types))
    annotations = parts["annotations"]
    if images is not None:
        message = "'width' or 'height' is missing, read from the image file"
        yield from _reported("images", message, _read_sizes(parts["images"], images))
    sizes = {r["id"]: declared_size(r) for r in parts["images"] if type(r.get("id")) in (int, str)}

    def size_of(record: Record) -> Size | None:
        image = record.get("image_id")
        return sizes.get(image) if type(image) in (int, str) else None

    def filled(key: str, value: Callable[[Record], Any], message: str) -> Iterator[Problem]:
        changed = _put([r for r in annotations if _lacks(r, key)], key, value)
        yield from _reported("annotations", f"{key!r} is missing, {message}", changed)

    message = "'image_id' is text and the image's id a number, or the reverse"
    strangers = [r for r in annotations if size_of(r) is None]
    changed = _put(strangers, "image_id", lambda record: other_id(record.get("image_id"), sizes))
    yield from _reported("annotations", message, changed)
    message = "'bbox' has numbers in another form"
    yield from _reported("annotations", message, _read_boxes(annotations))
    yield from filled("bbox", lambda r: _box_of_mask(r, size_of(r)), "that of the mask")
    yield from _turned(annotations, size_of, converting)
    yield from filled("area", lambda r: _area(r, size_of(r)), "that of mask or box")
    yield from filled("iscrowd", lambda _: 0, "0 is taken")
    yield from filled("num_keypoints", _num_keypoints, "those visible are counted")
    yield from _renumbered(annotations)


def repair_annotation(record: Any) -> Any:
    """Repairs an annotation that is read by itself, which may be anything; it is changed."""
    if type(record) is dict:
        for key, types in _NUMBERS["annotations"].items():
            _read_numbers([record], key, types)
        _read_boxes([record])
        if _lacks(record, "bbox"):
            _put([record], "bbox", lambda given: _box_of_mask(given, None))
    return record


def _lacks(record: Record, key: str) -> bool:
    value = record.get(key)
    return value is None or value == []


def _reported(part: str, message: str, changed: Sequence[Record]) -> Iterator[Problem]:
    if changed:
        yield Problem("filled_in", part, f"{message} ({len(changed)} records)")


def _put(records: Sequence[Record], key: str, value: Callable[[Record], Any]) -> list[Record]:
    """Gives records a value for a key unless it is None; returns those changed."""
    changed = []
    for record in records:
        given = value(record)
        if given is not None:
            record[key] = given
            changed.append(record)
    return changed


def _number(value: Any) -> Any:
    """The number of a text or a float, as int if it is whole; None if there is none."""
    if type(value) is str and _WRITTEN.fullmatch(value.strip()):
        value = float(value)
    if type(value) is not float or not math.isfinite(value):
        return None
    return int(value) if value.is_integer() and abs(value) < _MOST else value


def _read_numbers(records: Sequence[Record], key: str, types: tuple[type, ...]) -> list[Record]:
    odd = [record for record in records if type(record.get(key)) not in types]

    def number(record: Record) -> Any:
        found = _number(record.get(key))
        return found if type(found) in types else None

    return _put(odd, key, number)


def _read_boxes(annotations: Sequence[Record]) -> list[Record]:
    boxes = [r for r in annotations if type(r.get("bbox")) is list and len(r["bbox"]) == 4]
    if {type(value) for value in chain.from_iterable(r["bbox"] for r in boxes)} <= {int, float}:
        return []

    def numbers(record: Record) -> list[Any] | None:
        box = record["bbox"]
        found = [_number(value) if type(value) is str else value for value in box]
        return None if found == box or None in found else found

    return _put(boxes, "bbox", numbers)


def _read_sizes(records: Sequence[Record], images: str) -> list[Record]:
    changed = []
    for index, record in enumerate(records):
        name = record.get("file_name")
        lacking = record.get("width") is None or record.get("height") is None
        # A name that leads out of the folder is not opened.
        if lacking and type(name) is str and not any(file_name_problems(f"{index}", name)):
            size = shown_size(os.path.join(images, name))
            if size is not None:
                record["width"], record["height"] = size
                changed.append(record)
    return changed


def other_id(given: Any, known: Container[Any]) -> int | str | None:
    """The known id that is the same number in text, or the same text as a number."""
    if type(given) not in (int, str) or given in known:
        return None
    other = str(given) if type(given) is int else _number(given)
    return other if type(other) in (int, str) and other in known else None


def _polygons(mask: Any, size: Size | None) -> list[np.ndarray] | None:
    """Polygons of a mask that Detectron2 uses, ``(points, 2)`` each; None if there are none."""
    if type(mask) is not list or mask_problem(mask, size)[0]:
        return None
    return [np.array(p, float).reshape(-1, 2) for p in mask if is_polygon(p)] or None


def _runs(mask: Any, size: Size | None) -> dict[str, Any] | None:
    """The compressed run-length encoding of a mask; None if it has none."""
    return compressed(mask) if type(mask) is dict and not mask_problem(mask, size)[0] else None


def _box_of_mask(record: Record, size: Size | None) -> list[float] | None:
    mask = record.get("segmentation")
    polygons, runs = _polygons(mask, size), _runs(mask, size)
    if runs is not None:
        return coco_mask.toBbox(runs).tolist()
    if polygons is None:
        return None
    points = np.concatenate(polygons)
    start = points.min(axis=0)
    return [*start.tolist(), *(points.max(axis=0) - start).tolist()]


def _area(record: Record, size: Size | None) -> float | None:
    """As Detectron2's convert_to_coco_json computes it; None if neither mask nor box is usable."""
    mask = record.get("segmentation")
    polygons, runs = _polygons(mask, size), _runs(mask, size)
    if runs is not None:
        return float(coco_mask.area(runs))
    if polygons is not None:
        return float(sum(polygon_area(*polygon.T) for polygon in polygons))
    kind, _ = box_problem(record.get("bbox"), None)
    return float(record["bbox"][2] * record["bbox"][3]) if kind in ("", "box_empty") else None


def _num_keypoints(record: Record) -> int | None:
    keypoints = record.get("keypoints")
    usable = keypoints and not keypoint_problem(keypoints, None)[0]
    return sum(visible > 0 for visible in keypoints[2::3]) if usable else None


def _turned(
    annotations: Sequence[Record], size_of: Callable[[Record], Size | None], converting: bool
) -> Iterator[Problem]:
    """Reports boxes that are written in another way than COCO's; converts them if it is certain."""
    boxed = [r for r in annotations if type(r.get("bbox")) is list and len(r["bbox"]) == 4]
    if not _are_numbers([*chain.from_iterable(record["bbox"] for record in boxed)]):
        boxed = [record for record in boxed if _are_numbers(record["bbox"])]
    known = [(record, size) for record in boxed if (size := size_of(record)) is not None]
    used = [record for record, _ in known]
    boxes = np.array([record["bbox"] for record in used], float).reshape(-1, 4)
    sizes = np.array([size for _, size in known], float).reshape(-1, 2)
    layout = box_layout(boxes, sizes)
    if not layout.kind:
        return
    message = f"has boxes that look like {layout}, as {used[0]['bbox']}"
    yield Problem(layout.kind, "", f"{message}; expected {COCO_LAYOUT}: {CONVERT}")
    if not (converting or KINDS[layout.kind].refused):
        return
    turned = layout.turned(boxes, sizes).tolist()
    for record, box, size in zip(used, turned, sizes.tolist(), strict=True):
        area, (_, _, width, height) = record.get("area"), record["bbox"]
        if type(area) in NUMBER and math.isclose(area, width * height):
            del record["area"]  # was computed from the old box
        record["bbox"] = box
        if layout.normalised:
            _scale_mask(record, size)


def _are_numbers(values: Sequence[Any]) -> bool:
    """Whether all are finite numbers that numpy can hold."""
    return bool(values) and {*map(type, values)} <= {int, float} and are_pixels(values, None)


def _scale_mask(record: Record, size: Sequence[float]) -> None:
    """Converts polygons and keypoints that are fractions of the image to pixels."""
    mask, keypoints = record.get("segmentation"), record.get("keypoints")
    polygons = _polygons(mask, None)
    if polygons is not None and np.abs(np.concatenate(polygons)).max() <= 1 + SLACK:
        record["segmentation"] = [(polygon * size).ravel().tolist() for polygon in polygons]
    if keypoints and not keypoint_problem(keypoints, None)[0]:
        points = np.array(keypoints, float).reshape(-1, 3)
        if np.abs(points[:, :2]).max() <= 1 + SLACK:
            points[:, :2] *= size
            record["keypoints"] = points.ravel().tolist()


def _renumbered(annotations: Sequence[Record]) -> Iterator[Problem]:
    """Numbers annotations from 1 on if evaluation cannot use some of their ids.

    The records of an object that is there twice keep one id, so that they are refused.
    """
    again = same_objects(annotations)
    once = [record for record in annotations if id(record) not in again]
    ids = [record.get("id") for record in once]
    usable = all(type(given) is int and 1 <= given < 2**63 for given in ids)
    if usable and len(set(ids)) == len(ids):
        return
    for number, record in enumerate(once, 1):
        record["id"] = number
    for record in annotations:
        if id(record) in again:
            record["id"] = again[id(record)]["id"]
    message = "ids are missing, no numbers, below 1 or there twice; annotations are numbered from"
    yield Problem("renumbered", "annotations", f"{message} 1 on, in the order of the file")


def same_objects(annotations: Sequence[Record]) -> dict[int, Record]:
    """The first record of each object that is there again, by Python's ``id`` of the repetition."""
    ids = Counter(r["id"] for r in annotations if type(r.get("id")) in (int, str))
    first: dict[str, Record] = {}
    again = {}
    for record in annotations:
        if type(record.get("id")) in (int, str) and ids[record["id"]] > 1:
            one = first.setdefault(repr([record.get(key) for key in _OF_AN_OBJECT]), record)
            if one is not record:
                again[id(record)] = one
    return again

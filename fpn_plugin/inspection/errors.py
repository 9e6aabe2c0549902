"""Objects that a detector misses and false detections, by size and pyramid level."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

__all__ = ["FALSE_ALARM_KINDS", "MISS_KINDS", "SIZES", "Errors", "Mistake", "find_errors"]

SIZES = ("small", "medium", "large")
MISS_KINDS = ("score too low", "wrong class", "poorly placed", "not seen")
FALSE_ALARM_KINDS = ("duplicate", "wrong class", "poorly placed", "background")
_FOUND_IOU = 0.5
_NEAR_IOU = 0.1

LevelOf = Callable[[tuple[float, float, float, float], int], str]
Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Mistake:
    """A missed object or a false alarm.

    Attributes:
        image_id: COCO's.
        box: XYWH in pixels of the image.
        category: its name.
        size: "small" below 32^2 px of area, "medium" below 96^2, "large".
        level: of the pyramid; "" without one.
        kind: one of :data:`MISS_KINDS` or :data:`FALSE_ALARM_KINDS`.
        score: of a false alarm; 0 for a missed object.
    """

    image_id: int
    box: Box
    category: str
    size: str
    level: str
    kind: str
    score: float = 0.0

    @property
    def area(self) -> float:
        """Of the box, in square pixels of the image."""
        return self.box[2] * self.box[3]


@dataclass(frozen=True)
class Errors:
    """All mistakes of a detector on a dataset.

    Attributes:
        misses: largest first.
        false_alarms: most confident first.
        objects: ``{(size, level): count}`` of all objects, detected ones too.
        detections: likewise, of all detections that count.
        threshold: lowest score of a detection that counts.
    """

    misses: tuple[Mistake, ...]
    false_alarms: tuple[Mistake, ...]
    objects: Mapping[tuple[str, str], int]
    detections: Mapping[tuple[str, str], int]
    threshold: float


def find_errors(
    dataset: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    level_of: LevelOf,
    threshold: float = 0.5,
) -> Errors:
    """Matches detections to objects as COCO does at an IoU of 0.5, and gives a reason for the rest.

    An object is missed if no detection of its class with at least the threshold's score matches it.
    The reason is a match with a lower score ("score too low"), a detection of another class at an
    IoU of 0.5 ("wrong class"), one of its class at 0.1 ("poorly placed"), or none ("not seen"). A
    false alarm is a second detection of an object ("duplicate"), or has the same reasons, with
    "background" for none. Detections on crowds are not false alarms.

    Args:
        dataset: the content of a COCO JSON: images, annotations, categories.
        results: COCO results: image_id, category_id, bbox (XYWH), score.
        level_of: gives the level of a box XYWH in the image of an id.
        threshold: lowest score of a detection that counts.
    """
    names = {category["id"]: category["name"] for category in dataset["categories"]}
    truth = _numbered(dataset)
    objects, detections = _matched(truth, results)
    counted = [d for d in detections.values() if d["score"] >= threshold and not d["ignored"]]
    near: dict[int, list[dict[str, Any]]] = {}
    for detection in counted:
        near.setdefault(detection["image_id"], []).append(detection)
    truths: dict[int, list[dict[str, Any]]] = {}
    for thing in objects:
        truths.setdefault(thing["image_id"], []).append(thing)

    def mistake(record: Mapping[str, Any], kind: str, score: float = 0.0) -> Mistake:
        size, level = _place(record, level_of)
        box = tuple(float(v) for v in record["bbox"])
        name = names[record["category_id"]]
        return Mistake(record["image_id"], box, name, size, level, kind, score)

    misses = []
    for thing in objects:
        partner = detections.get(thing["partner"])
        if partner is not None and partner["score"] >= threshold:
            continue
        others = near.get(thing["image_id"], [])
        kind = "score too low" if partner is not None else _kind(thing, others, MISS_KINDS)
        misses.append(mistake(thing, kind))
    false_alarms = []
    for detection in counted:
        if detection["partner"] == 0:
            others = truths.get(detection["image_id"], [])
            kind = _kind(detection, others, FALSE_ALARM_KINDS)
            false_alarms.append(mistake(detection, kind, detection["score"]))
    return Errors(
        misses=tuple(sorted(misses, key=lambda m: -m.area)),
        false_alarms=tuple(sorted(false_alarms, key=lambda m: -m.score)),
        objects=_counts(objects, level_of),
        detections=_counts(counted, level_of),
        threshold=threshold,
    )


def _numbered(dataset: Mapping[str, Any]) -> COCO:
    """The dataset with annotations numbered from 1: for COCOeval, 0 means no annotation."""
    truth = COCO()
    annotations = [
        {**copy.copy(annotation), "id": number, "iscrowd": annotation.get("iscrowd", 0)}
        for number, annotation in enumerate(dataset["annotations"], start=1)
    ]
    for annotation in annotations:
        annotation.setdefault("area", annotation["bbox"][2] * annotation["bbox"][3])
    truth.dataset = {**dataset, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def _matched(
    truth: COCO, results: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """Objects, and detections by number; "partner" is the number of the match, or 0."""
    if not results:
        missed = [{**a, "partner": 0} for a in truth.dataset["annotations"] if not a["iscrowd"]]
        return missed, {}
    with contextlib.redirect_stdout(io.StringIO()):
        found = truth.loadRes([dict(result) for result in results])
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.iouThrs = np.array([_FOUND_IOU])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [len(results)]  # all: those that COCO leaves out are no misses
        evaluation.evaluate()
    objects: list[dict[str, Any]] = []
    detections: dict[int, dict[str, Any]] = {}
    for pair in evaluation.evalImgs:
        if pair is None:  # neither objects nor detections of this class in this image
            continue
        ignored = np.asarray(pair["gtIgnore"], dtype=bool)
        for number, partner, ignore in zip(
            pair["gtIds"], pair["gtMatches"][0], ignored, strict=True
        ):
            if not ignore:
                objects.append({**truth.anns[number], "partner": int(partner)})
        for number, partner, ignore in zip(
            pair["dtIds"], pair["dtMatches"][0], pair["dtIgnore"][0], strict=True
        ):
            record = {**found.anns[number], "partner": int(partner), "ignored": bool(ignore)}
            detections[number] = record
    return objects, detections


def _kind(
    record: Mapping[str, Any], others: Sequence[Mapping[str, Any]], kinds: Sequence[str]
) -> str:
    """The kind of a mistake, by the boxes that overlap it."""
    if not others:
        return kinds[3]
    boxes = [list(other["bbox"]) for other in others]
    overlaps = coco_mask.iou([list(record["bbox"])], boxes, [0] * len(boxes))[0]
    same = np.array([other["category_id"] == record["category_id"] for other in others])
    if kinds is FALSE_ALARM_KINDS and (overlaps[same] >= _FOUND_IOU).any():
        return kinds[0]
    if (overlaps[~same] >= _FOUND_IOU).any():
        return kinds[1]
    return kinds[2] if (overlaps[same] >= _NEAR_IOU).any() else kinds[3]


def _place(record: Mapping[str, Any], level_of: LevelOf) -> tuple[str, str]:
    area = record["area"]
    size = SIZES[0] if area < 32**2 else SIZES[1] if area < 96**2 else SIZES[2]
    return size, level_of(tuple(record["bbox"]), record["image_id"])


def _counts(records: Sequence[Mapping[str, Any]], level_of: LevelOf) -> dict[tuple[str, str], int]:
    counts: dict[tuple[str, str], int] = {}
    for record in records:
        place = _place(record, level_of)
        counts[place] = counts.get(place, 0) + 1
    return counts

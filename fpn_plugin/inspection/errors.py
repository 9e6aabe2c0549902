"""Objects that a detector misses, and false detections, by size and pyramid level."""

from __future__ import annotations

import contextlib
import io
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

__all__ = [
    "FALSE_ALARM_KINDS", "MISS_KINDS", "SIZES", "Errors", "Mistake", "confusion", "find_errors",
]  # fmt: skip

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
        false_alarms: highest score first.
        objects: ``{(size, level): count}`` of all objects, including detected ones.
        detections: the same of all detections that count.
        threshold: lowest score of a detection that counts.
    """

    misses: tuple[Mistake, ...]
    false_alarms: tuple[Mistake, ...]
    objects: Mapping[tuple[str, str], int]
    detections: Mapping[tuple[str, str], int]
    threshold: float

    def missed_in(self, group: str) -> tuple[int, ...]:
        """Counts for a size or level: objects, missed objects, and those by each kind."""
        return _group_counts(self.objects, self.misses, MISS_KINDS, group)

    def false_in(self, group: str) -> tuple[int, ...]:
        """Counts for a size or level: detections, false ones, and those by each kind."""
        return _group_counts(self.detections, self.false_alarms, FALSE_ALARM_KINDS, group)


def _group_counts(
    totals: Mapping[tuple[str, str], int],
    mistakes: Sequence[Mistake],
    kinds: Sequence[str],
    group: str,
) -> tuple[int, ...]:
    found = [mistake.kind for mistake in mistakes if group in (mistake.size, mistake.level)]
    total = sum(count for place, count in totals.items() if group in place)
    return total, len(found), *map(found.count, kinds)


def find_errors(
    dataset: Mapping[str, Any],
    results: Sequence[Mapping[str, Any]],
    level_of: LevelOf,
    threshold: float = 0.5,
) -> Errors:
    """Matches detections to objects as COCO does at an IoU of 0.5. The others get a reason.

    An object is missed if no detection of its class with a score of at least the threshold matches
    it. The reason is a match with a lower score ("score too low"), a detection of another class at
    an IoU of 0.5 ("wrong class"), one of its class at 0.1 ("poorly placed"), or none ("not seen").
    A false alarm is a second detection of an object ("duplicate"), or has one of these reasons,
    with "background" for none. Detections on crowds are not false alarms.

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
    near, truths = _by_image(counted), _by_image(objects)

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
        others = near[thing["image_id"]]
        kind = "score too low" if partner is not None else _kind(thing, others, MISS_KINDS)
        misses.append(mistake(thing, kind))
    false_alarms = []
    for detection in counted:
        if detection["partner"] == 0:
            kind = _kind(detection, truths[detection["image_id"]], FALSE_ALARM_KINDS)
            false_alarms.append(mistake(detection, kind, detection["score"]))
    return Errors(
        misses=tuple(sorted(misses, key=lambda m: -m.area)),
        false_alarms=tuple(sorted(false_alarms, key=lambda m: -m.score)),
        objects=Counter(_place(record, level_of) for record in objects),
        detections=Counter(_place(record, level_of) for record in counted),
        threshold=threshold,
    )


def confusion(
    dataset: Mapping[str, Any], results: Sequence[Mapping[str, Any]], threshold: float = 0.5
) -> np.ndarray:
    """Counts objects by their class and the class that is detected in their place.

    pycocotools matches detections and objects of all classes, at an IoU of 0.5: the detection with
    the highest score is the first to take an object.

    Args:
        dataset: see :func:`find_errors`.
        results: likewise.
        threshold: lowest score of a detection that counts.

    Returns:
        int64 ``(K + 1, K + 1)``. Rows are the classes of objects, in the dataset's order; columns
        are those of detections. Detections on no object are in the last row, missed objects in the
        last column. Crowds, and detections on them, do not count.
    """
    places = {category["id"]: index for index, category in enumerate(dataset["categories"])}
    counted = [each for each in results if each["score"] >= threshold]
    objects, detections = _matched(_numbered(dataset), counted, by_class=False)
    none = len(places)
    counts = np.zeros((none + 1, none + 1), np.int64)
    for thing in objects:
        partner = detections.get(thing["partner"])
        column = none if partner is None else places[partner["category_id"]]
        counts[places[thing["category_id"]], column] += 1
    for detection in detections.values():
        if detection["partner"] == 0 and not detection["ignored"]:
            counts[none, places[detection["category_id"]]] += 1
    return counts


def _by_image(records: Iterable[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    grouped: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for record in records:
        grouped[record["image_id"]].append(record)
    return grouped


def _numbered(dataset: Mapping[str, Any]) -> COCO:
    """The dataset with annotations numbered from 1: for COCOeval, 0 means no annotation."""
    truth = COCO()
    annotations = [
        {"iscrowd": 0, "area": record["bbox"][2] * record["bbox"][3], **record, "id": number}
        for number, record in enumerate(dataset["annotations"], start=1)
    ]
    truth.dataset = {**dataset, "annotations": annotations}
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
    return truth


def _matched(
    truth: COCO, results: Sequence[Mapping[str, Any]], by_class: bool = True
) -> tuple[list[dict[str, Any]], dict[int, dict[str, Any]]]:
    """Objects, and detections by number; "partner" is the number of the match, or 0."""
    if not results:
        missed = [{**a, "partner": 0} for a in truth.dataset["annotations"] if not a["iscrowd"]]
        return missed, {}
    with contextlib.redirect_stdout(io.StringIO()):
        found = truth.loadRes([dict(result) for result in results])
        evaluation = COCOeval(truth, found, "bbox")
        evaluation.params.useCats = int(by_class)
        evaluation.params.iouThrs = np.array([_FOUND_IOU])
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [len(results)]  # all detections; COCO uses only the best 100
        evaluation.evaluate()
    objects: list[dict[str, Any]] = []
    detections: dict[int, dict[str, Any]] = {}
    for pair in evaluation.evalImgs:
        if pair is None:  # neither objects nor detections of this class in this image
            continue
        matches = zip(pair["gtIds"], pair["gtMatches"][0], pair["gtIgnore"], strict=True)
        for number, partner, ignore in matches:
            if not ignore:
                objects.append({**truth.anns[number], "partner": int(partner)})
        matches = zip(pair["dtIds"], pair["dtMatches"][0], pair["dtIgnore"][0], strict=True)
        for number, partner, ignore in matches:
            record = {**found.anns[number], "partner": int(partner), "ignored": bool(ignore)}
            detections[number] = record
    return objects, detections


def _kind(
    record: Mapping[str, Any], others: Sequence[Mapping[str, Any]], kinds: Sequence[str]
) -> str:
    """The kind of a mistake, given the other boxes in the image."""
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

"""The rules that a COCO JSON must keep to be trained on and evaluated."""

from __future__ import annotations

import ntpath
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from .annotations import Known, annotation_problems, first_with, has_id, id_problems
from .fast_checks import may_break_a_rule
from .keypoints import category_keypoint_problems
from .problems import CONVERT, KINDS, Contents, Problem, shortened
from .requirements import BOXES, Needs
from .shapes import MOST_PIXELS, Size, is_dropped

__all__ = [
    "coco_problems", "declared_size", "file_name_problems", "image_problems", "image_record",
    "records_of", "root_category", "visible_keypoints",
]  # fmt: skip

_PARTS = ("images", "annotations", "categories")
_SCREENED_AT_ONCE = 8192


def coco_problems(
    content: Any,
    advance: Callable[[int], object] = lambda records: None,
    *,
    needs: Needs = BOXES,
    file_names: bool = True,
    contents: Contents | None = None,
) -> Iterator[Problem]:
    """All that is wrong with a COCO JSON: problems of the file, categories, images, annotations.

    Args:
        content: of the file, as json gives it.
        advance: is called with the number of annotations that were checked since the last call.
        needs: what the model needs of it.
        file_names: whether file names must stay within a folder.
        contents: receives the counts.
    """
    if not isinstance(content, dict):
        message = f"it holds a {type(content).__name__}, not an object with {', '.join(_PARTS)}"
        yield Problem("not_coco", "", f"is not COCO: {message}")
        return
    if not needs.training and "annotations" not in content:
        content = {**content, "annotations": []}  # as of COCO's test sets
    for part in _PARTS:
        if not isinstance(content.get(part), list):
            there = shortened(list(content))
            yield Problem("not_coco", "", f"is not COCO: it has no list {part!r}; it has {there}")
            return
    for part in _PARTS:
        if not content[part] and (needs.training or part != "annotations"):
            yield Problem("nothing", "", f"has no {part}")
    yield from _category_problems(content["categories"])
    root = root_category(content)
    if root is not None:
        message = "no annotation has it, and it counts as a class (Roboflow writes such categories)"
        where = f"category {shortened(root['id'])}"
        yield Problem("category_root", where, f"{shortened(root['name'])}: {message}: {CONVERT}")
    yield from category_keypoint_problems(content["categories"], needs)
    yield from image_problems(content["images"], needs.max_size, file_names)
    annotations = content["annotations"]
    contents = Contents() if contents is None else contents
    contents.images, contents.classes = len(content["images"]), len(content["categories"])
    contents.boxes = len(annotations)
    known = Known(
        sizes={record["id"]: declared_size(record) for record in filter(has_id, content["images"])},
        categories={record["id"] for record in filter(has_id, content["categories"])},
        first=first_with(annotations, "id"),
        needs=needs,
    )
    left_out: dict[int, str] = {}  # why, by index
    for start in range(0, len(annotations), _SCREENED_AT_ONCE):
        rows = annotations[start : start + _SCREENED_AT_ONCE]
        for i in np.flatnonzero(may_break_a_rule(rows, start, known)).tolist():
            for problem in annotation_problems(start + i, rows[i], known):
                if KINDS[problem.kind].left_out:
                    left_out.setdefault(start + i, problem.kind)
                yield problem
        advance(len(rows))
    if needs.training and needs.keypoints and needs.visible:
        yield from _invisible(content["images"], annotations, needs.visible, left_out)
    if needs.training:
        contents.trained_on = len(annotations) - len(left_out)
    yield from _uses(annotations, left_out, needs.training)


def _uses(
    annotations: Sequence[Any], left_out: dict[int, str], training: bool
) -> Iterator[Problem]:
    """Whether nothing is left to train on, or to evaluate on."""
    why = Counter(left_out.values())
    if not annotations:
        if not training:
            yield Problem("nothing_to_find", "", "has no annotations: evaluation gives no AP")
        return
    none_left = len(left_out) if training else why["crowd"]
    if none_left < len(annotations):
        return
    reasons = ", ".join(f"{count} {kind}" for kind, count in why.items())
    use = "train" if training else "evaluate"
    message = f"has nothing to {use} on: of {len(annotations)} annotations, {reasons}"
    if why["crowd"]:
        message += "; CVAT's brush writes iscrowd 1: --convert NEW.json --no-crowds writes 0"
    yield Problem("nothing", "", message)


def _invisible(
    images: Sequence[Any], annotations: Sequence[Any], least: int, left_out: dict[int, str]
) -> Iterator[Problem]:
    """Images that Detectron2 leaves out because they show fewer keypoints than ``least``.

    Their annotations are added to ``left_out``.
    """
    visible: Counter[Any] = Counter()
    of_image: dict[Any, list[int]] = {}
    for index, record in enumerate(annotations):
        image = record.get("image_id") if isinstance(record, dict) else None
        if type(image) not in (int, str):
            continue
        of_image.setdefault(image, []).append(index)
        visible[image] += visible_keypoints(record)
    for number, record in enumerate(images):
        if has_id(record) and record["id"] in of_image and visible[record["id"]] < least:
            message = f"shows {visible[record['id']]} keypoints; {least} or more are expected"
            yield Problem("keypoints_invisible", image_record(number, record), message)
            for index in of_image[record["id"]]:
                left_out.setdefault(index, "keypoints_invisible")


def visible_keypoints(record: dict[str, Any]) -> int:
    """How many keypoints of an annotation, crowds' too, count for its image to be trained on."""
    keypoints = record.get("keypoints")
    if type(keypoints) is not list or is_dropped(record.get("segmentation")):
        return 0
    return sum(type(visible) in (int, float) and visible > 0 for visible in keypoints[2::3])


def records_of(content: Any, part: str) -> list[dict[str, Any]]:
    """The records of a part of a JSON that are objects, whatever the JSON holds."""
    records = content.get(part) if type(content) is dict else None
    return [record for record in records if type(record) is dict] if type(records) is list else []


def root_category(content: Any) -> dict[str, Any] | None:
    """The empty category that Roboflow puts above all others; None if there is none."""
    categories, annotations = records_of(content, "categories"), records_of(content, "annotations")
    named = [c for c in categories if has_id(c) and type(c.get("name")) is str]
    roots = [category for category in named if category.get("supercategory") == "none"]
    if len(roots) != 1 or len(categories) < 2 or not annotations:
        return None
    used = any(record.get("category_id") == roots[0]["id"] for record in annotations)
    return None if used else roots[0]


def declared_size(record: dict[str, Any]) -> Size | None:
    """Width and height of an image's record; None if no image could have them."""
    width, height = record.get("width"), record.get("height")
    return (width, height) if _is_side(width) and _is_side(height) else None


def _is_side(value: Any) -> bool:
    return type(value) is int and 0 < value < MOST_PIXELS


def image_record(index: int, record: dict[str, Any]) -> str:
    """The name of an image's record in messages."""
    return f"images[{index}] (id {shortened(record.get('id'))})"


def _category_problems(records: Sequence[Any]) -> Iterator[Problem]:
    first, first_names = first_with(records, "id"), first_with(records, "name")
    for index, record in enumerate(records):
        yield from id_problems("categories", index, record, first, {"id": int, "name": str})
        if not has_id(record) or type(record.get("name")) is not str:
            continue
        where, name = f"category {shortened(record['id'])}", record["name"]
        try:
            name.encode()
        except UnicodeEncodeError:  # JSON may have halves of characters
            yield Problem("value", where, f"name {shortened(name)} is no text")
        if first_names[name] != index:
            message = f"another one is named {shortened(name)} too"
            yield Problem("category_name_twice", where, message)


def image_problems(records: Sequence[Any], max_size: int, file_names: bool) -> Iterator[Problem]:
    """What is wrong with a JSON's images.

    Args:
        records: the images.
        max_size: longest side that they are resized to, in pixels.
        file_names: whether file names must stay within a folder.
    """
    first, first_files = first_with(records, "id"), first_with(records, "file_name")
    types = {"file_name": str, "width": int, "height": int}
    kind = next((type(record["id"]) for record in records if has_id(record)), None)
    for index, record in enumerate(records):
        yield from id_problems("images", index, record, first, types)
        if not has_id(record):
            continue
        where = image_record(index, record)
        if type(record["id"]) is not kind:
            message = "some ids are numbers and some text, which Detectron2 cannot sort"
            yield Problem("id_unusable", where, message)
        for key in ("width", "height"):
            side = record.get(key)
            if type(side) is int and not _is_side(side):
                message = f"{key!r} is {shortened(side)}, expected pixels from 1 to"
                yield Problem("value", where, f"{message} {MOST_PIXELS - 1}")
        size = declared_size(record)
        if size is not None and max(size) > 2 * max_size * min(size):
            message = f"{size[0]} x {size[1]} pixels, resized to a longest side of {max_size}, is"
            yield Problem("image_thin", where, f"{message} 0 wide")
        name = record.get("file_name")
        if type(name) is str:
            if file_names:
                yield from file_name_problems(where, name)
            if first_files[name] != index:
                yield Problem("file_name_twice", where, f"another image is {shortened(name)} too")


def file_name_problems(where: str, name: str) -> Iterator[Problem]:
    """What is wrong with an image's path, which must stay in the folder: a JSON from someone else
    does not choose which files are read.
    """
    message = f"file_name is {shortened(name)}"
    try:
        named = bool(name.strip("./\\")) and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        named = False
    if not named:
        yield Problem("file_name", where, f"{message}, which names no file")
        return
    path = name.replace("\\", "/")  # a name made on Windows must not lead out either
    leads_out = path.startswith("/") or ntpath.isabs(path) or os.path.splitdrive(name)[0] != ""
    if ".." in path:
        leads_out = leads_out or os.path.normpath(path).replace("\\", "/").split("/")[0] == ".."
    if leads_out:
        message += ", which leads out of the image folder; expected a path relative to that folder"
        yield Problem("file_name", where, f"{message}; if the file is in it, {CONVERT}")

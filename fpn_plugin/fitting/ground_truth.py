"""The boxes of a dataset: those that a detector is trained on, and why others are left out."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from tqdm import tqdm

from fpn_plugin.data import Needs, check_datasets, current_json
from fpn_plugin.data.annotations import has_id
from fpn_plugin.data.box_layouts import COCO_LAYOUT, box_layout
from fpn_plugin.data.problems import CONVERT, KINDS, shortened
from fpn_plugin.data.reading import read_json
from fpn_plugin.data.records import declared_size, image_problems, records_of, visible_keypoints
from fpn_plugin.data.repairs import other_id, repair, repair_annotation
from fpn_plugin.data.requirements import BOXES, empty_mask_problem
from fpn_plugin.data.shapes import Size, box_rules, is_dropped
from fpn_plugin.errors import UserError
from fpn_plugin.mini import ensure_mini_datasets

__all__ = ["LEFT_OUT", "GroundTruth", "read_ground_truth"]

# Why a box is left out. A box with several reasons counts under the first.
LEFT_OUT = {
    "crowd": "marked iscrowd",
    "ignored": "marked ignore",
    "box_not_finite": "a coordinate is NaN or infinite",
    "box_negative": "width or height is negative",
    "box_empty": "width or height is 0, or next to it",
    "box_outside": "no part of it lies in the image",
    "segmentation_unusable": "no polygon of three points",
    "mask_empty": "the mask has no pixel",
    "keypoints_invisible": "the image does not show enough keypoints",
}
_NUMBER = frozenset({int, float})
_FLAG_TYPES = (int, bool, type(None))
# Reasons that do not depend on the box.
_FLAGS = [name for name in LEFT_OUT if not name.startswith("box_")]


@dataclass(frozen=True)
class GroundTruth:
    """Labelled boxes, in pixels of the images as they are stored.

    Attributes:
        boxes: float64 ``(N, 4)``, XYXY, clipped to their images as Detectron2 does in training.
        image: int64 ``(N,)``, the image of each box, an index into ``shapes``.
        shapes: int64 ``(M, 2)``, height and width of every image, those without boxes too.
        left_out: how many boxes were left out, by the names of :data:`LEFT_OUT`.
        clipped: how many of ``boxes`` reached beyond their image.
        classes: their names, "" for one without; None if they are not given, or datasets differ in
            them.
    """

    boxes: np.ndarray
    image: np.ndarray
    shapes: np.ndarray
    left_out: dict[str, int]
    clipped: int
    classes: tuple[str, ...] | None = None

    def sample(self, most_images: int) -> GroundTruth:
        """At most ``most_images`` images that have boxes, drawn with a fixed seed, and their boxes.

        Counts of what was left out stay those of all images.
        """
        present = np.unique(self.image)
        if len(present) <= most_images:
            return self
        chosen = np.sort(np.random.default_rng(0).choice(present, most_images, replace=False))
        kept = np.isin(self.image, chosen)
        image = np.searchsorted(chosen, self.image[kept])
        return replace(self, boxes=self.boxes[kept], image=image, shapes=self.shapes[chosen])


def read_ground_truth(
    sources: Sequence[str], needs: Needs = BOXES, key: str = "--data"
) -> GroundTruth:
    """Reads the boxes of datasets, with a progress bar.

    Args:
        sources: each a registered dataset or the path of a COCO instances JSON; taken together.
        needs: what the model asks of the data, which decides what it is trained on.
        key: the argument or config key that names the sources, for messages.

    Raises:
        UserError: a source is neither or is not COCO, or no box is left.
    """
    raw = _Raw(needs)
    for source in sources:
        path = source
        if not Path(source).is_file():
            if source.endswith(".json"):
                raise UserError(f"{key} names {source!r}, and there is no such file")
            check_datasets([source], key)
            ensure_mini_datasets([source])
            path = MetadataCatalog.get(source).get("json_file") and current_json(source)
        if path:
            _read_json(Path(path), raw)
        else:
            _read_records(source, raw)
    return raw.finish(", ".join(sources))


class _Raw:
    """Boxes as they are read; a million take tens of megabytes."""

    def __init__(self, needs: Needs) -> None:
        self.needs = needs
        self.boxes, self.image, self.flags = array("d"), array("q"), array("b")
        self.shapes = array("q")
        self.classes: set[tuple[str, ...] | None] = set()

    @property
    def num_images(self) -> int:
        return len(self.shapes) // 2

    def finish(self, source: str) -> GroundTruth:
        """Leaves out the boxes that are not trained on; refuses data of which none is left."""
        boxes = np.frombuffer(self.boxes, np.float64).reshape(-1, 4)  # x, y, width, height
        image = np.frombuffer(self.image, np.int64)
        flags = np.frombuffer(self.flags, np.int8)
        shapes = np.frombuffer(self.shapes, np.int64).reshape(-1, 2)
        sizes = shapes[image, ::-1]
        self._check_layout(source, boxes, sizes)
        with np.errstate(invalid="ignore", over="ignore"):
            corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
            reasons = box_rules(*boxes.T, *sizes.T)
        reasons |= {name: flags == number for number, name in enumerate(_FLAGS, 1)}
        kept = np.ones(len(boxes), bool)
        left_out = {}
        for name in LEFT_OUT:
            left_out[name] = int((reasons[name] & kept).sum())
            kept &= ~reasons[name]
        if not kept.any():
            found = ", ".join(f"{count} {name}" for name, count in left_out.items() if count)
            raise UserError(f"{source} has no box to fit to" + (f": {found}" if found else ""))
        inside = np.clip(corners[kept], 0, np.tile(sizes[kept], 2))
        clipped = int((inside != corners[kept]).any(axis=1).sum())
        [classes] = self.classes if len(self.classes) == 1 else [None]
        return GroundTruth(inside, image[kept], shapes, left_out, clipped, classes)

    @staticmethod
    def _check_layout(source: str, boxes: np.ndarray, sizes: np.ndarray) -> None:
        """Refuses a layout of boxes that training refuses."""
        finite = np.isfinite(boxes).all(axis=1)
        layout = box_layout(boxes[finite], sizes[finite])
        if layout.kind and KINDS[layout.kind].refused:
            message = f"{source} has boxes that look like {layout}"
            raise UserError(f"{message}; expected {COCO_LAYOUT}: {CONVERT}")


class _Annotations:
    """What is kept of a JSON's annotations; ``sizes`` are of images before them in the file."""

    def __init__(
        self, path: Path, records: Iterable[Any], sizes: dict[Any, Size | None], needs: Needs
    ) -> None:
        self.boxes, self.flags = array("d"), array("b")
        self.image_ids: list[Any] = []
        self.visible: Counter[Any] = Counter()
        for number, record in enumerate(records):
            try:
                if not _is_whole(record):
                    repair_annotation(record)
                x, y, width, height = record["bbox"]
                self.boxes.extend((x, y, width, height))
                image_id = record["image_id"]
                self.image_ids.append(image_id)
                flag = _flag(record, needs, sizes.get(image_id))
                if needs.keypoints:
                    self.visible[image_id] += visible_keypoints(record)
            except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
                raise UserError(
                    f"{path}: annotations[{number}] lacks an image_id, or a bbox that is [x, y, "
                    f"width, height] in pixels: {shortened(record)}"
                ) from None
            self.flags.append(1 + _FLAGS.index(flag) if flag else 0)


def _sizes(content: dict[str, Any]) -> dict[Any, Size | None]:
    """Width and height by id of a JSON's images, which are repaired."""
    images = records_of(content, "images")
    list(repair({"images": images}, None))
    return {record["id"]: declared_size(record) for record in images if has_id(record)}


def _read_json(path: Path, raw: _Raw) -> None:
    """Adds the boxes of a COCO JSON."""
    content, *_ = read_json(
        str(path), lambda records, before: _Annotations(path, records, _sizes(before), raw.needs)
    )
    for part, kind in (("images", list), ("annotations", _Annotations)):
        there = content if type(content) is dict else {}
        if type(there.get(part)) is not kind:
            found = f"it has {shortened(list(there))}" if there else "it is no object"
            raise UserError(f"{path} is not COCO: it has no list {part!r}; {found}")
    sizes, annotations = _sizes(content), content["annotations"]
    for problem in image_problems(content["images"], raw.needs.max_size, file_names=False):
        if problem.refused:
            raise UserError(f"{path}: {problem}")
    index = {image_id: number for number, image_id in enumerate(sizes, raw.num_images)}
    raw.shapes.extend(side for size in sizes.values() for side in size[::-1])
    categories = content.get("categories")
    named = (each if type(each) is dict else {} for each in categories or ())
    names = tuple(str(each.get("name", "")) for each in named)
    raw.classes.add(names if type(categories) is list else None)
    few = raw.needs.visible if raw.needs.keypoints else 0
    for number, image_id in enumerate(annotations.image_ids):
        known = image_id if image_id in index else other_id(image_id, index)
        if known is None:
            raise UserError(f"{path}: no image has id {shortened(image_id)}, which a box names")
        raw.image.append(index[known])
        if annotations.visible[image_id] < few and not annotations.flags[number]:
            annotations.flags[number] = 1 + _FLAGS.index("keypoints_invisible")
    raw.boxes.extend(annotations.boxes)
    raw.flags.extend(annotations.flags)


def _is_whole(record: dict[str, Any]) -> bool:
    """Whether nothing that is read of an annotation needs repair, as in most of them."""
    box = record.get("bbox")
    return (
        type(box) is list
        and _NUMBER.issuperset(map(type, box))
        and type(record.get("iscrowd")) in _FLAG_TYPES
    )


def _flag(record: dict[str, Any], needs: Needs, size: Size | None) -> str:
    """Why an annotation is not trained on, whatever its box: one of ``_FLAGS``, or ""."""
    if record.get("iscrowd"):
        return "crowd"
    if record.get("ignore"):
        return "ignored"
    mask = record.get("segmentation")
    if not mask:
        return ""
    if is_dropped(mask):
        return "segmentation_unusable"
    return empty_mask_problem(record, size, needs)[0]  # "" if the size is not known yet


def _read_records(name: str, raw: _Raw) -> None:
    """Adds the boxes of a dataset that a function registers, in Detectron2's form."""
    for record in tqdm(DatasetCatalog.get(name), desc=f"reading {name}", unit="image"):
        if "height" not in record or "width" not in record:
            file = record.get("file_name")
            raise UserError(f"dataset {name!r}: {file!r} has no height and width")
        for label in record.get("annotations", ()):
            box = BoxMode.convert(list(label["bbox"]), label["bbox_mode"], BoxMode.XYWH_ABS)
            raw.boxes.extend(float(value) for value in box)
            raw.image.append(raw.num_images)
            raw.flags.append(1 if label.get("iscrowd") else 2 if label.get("ignore") else 0)
        raw.shapes.extend((record["height"], record["width"]))
    classes = MetadataCatalog.get(name).get("thing_classes")
    raw.classes.add(None if classes is None else tuple(classes))

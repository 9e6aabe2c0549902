"""The boxes of a dataset: those that a detector is trained on, and those left out, by name."""

from __future__ import annotations

import json
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
from fpn_plugin.data.annotations import empty_mask_problem
from fpn_plugin.data.box_layouts import COCO_LAYOUT, box_layout
from fpn_plugin.data.problems import CONVERT, KINDS
from fpn_plugin.data.records import visible_keypoints
from fpn_plugin.data.repairs import mended_annotation, other_id
from fpn_plugin.data.requirements import BOXES
from fpn_plugin.data.shapes import NO_EXTENT, Size, is_dropped
from fpn_plugin.errors import UserError
from fpn_plugin.mini import ensure_mini_datasets

from .json_stream import JsonStream

__all__ = ["LEFT_OUT", "GroundTruth", "read_ground_truth"]

_MOST_PIXELS = 1 << 21  # of an image's side
# Why a box is left out; one that has several reasons counts under the first.
LEFT_OUT = {
    "crowd": "marked iscrowd",
    "ignored": "marked ignore",
    "not_finite": "a coordinate is NaN or infinite",
    "zero_area": "width or height is 0 or less, or next to it",
    "out_of_image": "no part of it lies in the image",
    "segmentation_unusable": "no polygon of three points",
    "mask_empty": "the mask has no pixel",
    "keypoints_invisible": "the image does not show enough keypoints",
}
# The other reasons are a record's own values, whatever its box.
_OF_BOX = ("not_finite", "zero_area", "out_of_image")
_NUMBER = frozenset({int, float})
_FLAG_TYPES = (int, bool, type(None))
_FLAGS = [name for name in LEFT_OUT if name not in _OF_BOX]


@dataclass(frozen=True)
class GroundTruth:
    """Labelled boxes, in pixels of the images as they are stored.

    Attributes:
        boxes: float64 ``(N, 4)``, XYXY, clipped to their images as Detectron2 does in training.
        image: int64 ``(N,)``, the image of each box, an index into ``shapes``.
        shapes: int64 ``(M, 2)``, height and width of every image, those without boxes too.
        left_out: how many boxes were left out, by the names of :data:`LEFT_OUT`.
        clipped: how many of ``boxes`` reached beyond their image.
        categories: how many each dataset has; None where they differ or do not say.
    """

    boxes: np.ndarray
    image: np.ndarray
    shapes: np.ndarray
    left_out: dict[str, int]
    clipped: int
    categories: int | None = None

    def sample(self, most_images: int) -> GroundTruth:
        """At most so many of the images that have boxes, drawn with a fixed seed, and their boxes.

        Counts of what was left out stay those of all.
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
        key: what names the sources, for messages.

    Raises:
        UserError: a source that is neither, is not COCO, or has no box left.
    """
    raw = _Raw(needs)
    for source in sources:
        if Path(source).is_file():
            _read_json(Path(source), raw)
            continue
        if source.endswith(".json"):
            raise UserError(f"{key} names {source!r}, and there is no such file")
        check_datasets([source], key)
        ensure_mini_datasets([source])
        if MetadataCatalog.get(source).get("json_file"):
            _read_json(Path(current_json(source)), raw)
        else:
            _read_records(source, raw)
    return raw.finish(", ".join(sources))


class _Raw:
    """Boxes as they are read, in arrays that hold a million in tens of megabytes."""

    def __init__(self, needs: Needs) -> None:
        self.needs = needs
        self.boxes, self.image, self.flags = array("d"), array("q"), array("b")
        self.shapes = array("q")
        self.categories: set[int | None] = set()

    @property
    def num_images(self) -> int:
        return len(self.shapes) // 2

    def size(self, image: int | None) -> Size | None:
        """Width and height of an image, if it has been read."""
        return None if image is None else (self.shapes[2 * image + 1], self.shapes[2 * image])

    def finish(self, source: str) -> GroundTruth:
        """Sorts the boxes out.

        Raises:
            UserError: none is left.
        """
        boxes = np.frombuffer(self.boxes, np.float64).reshape(-1, 4)  # x, y, width, height
        image = np.frombuffer(self.image, np.int64)
        flags = np.frombuffer(self.flags, np.int8)
        shapes = np.frombuffer(self.shapes, np.int64).reshape(-1, 2)
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        limits = np.tile(shapes[:, ::-1], 2)[image] if len(boxes) else np.zeros((0, 4))
        self._check_layout(source, boxes, shapes[image, ::-1])
        inside = np.clip(corners, 0, limits)  # NaN stays NaN
        by_flag = {name: flags == number for number, name in enumerate(_FLAGS, 1)}
        by_box = {
            "not_finite": ~np.isfinite(corners).all(axis=1),
            "zero_area": boxes[:, 2:].min(axis=1) < NO_EXTENT,
            "out_of_image": np.hstack([corners[:, 2:], limits[:, :2] - corners[:, :2]]).min(axis=1)
            < NO_EXTENT,
        }
        reasons = {name: (by_flag | by_box)[name] for name in LEFT_OUT}
        kept = np.ones(len(boxes), bool)
        left_out = {}
        for name, applies in reasons.items():
            left_out[name] = int((applies & kept).sum())
            kept &= ~applies
        if not kept.any():
            told = ", ".join(f"{count} {name}" for name, count in left_out.items() if count)
            raise UserError(f"{source} has no box to fit to" + (f": {told}" if told else ""))
        clipped = int((inside[kept] != corners[kept]).any(axis=1).sum())
        [categories] = self.categories if len(self.categories) == 1 else [None]
        return GroundTruth(inside[kept], image[kept], shapes, left_out, clipped, categories)

    @staticmethod
    def _check_layout(source: str, boxes: np.ndarray, sizes: np.ndarray) -> None:
        """Refuses boxes that training refuses for the way they are written."""
        finite = np.isfinite(boxes).all(axis=1)
        layout = box_layout(boxes[finite], sizes[finite])
        if layout.kind and KINDS[layout.kind].refused:
            told = f"{source} has boxes that look like {layout}"
            raise UserError(f"{told}; expected {COCO_LAYOUT}: {CONVERT}")


def _read_json(path: Path, raw: _Raw) -> None:
    """Adds the boxes of a COCO JSON."""
    index: dict[Any, int] = {}
    image_ids: list[Any] = []  # of boxes; images may come after them
    first, visible = len(raw.flags), Counter()
    found = set()
    categories = None
    try:
        with path.open("rb") as file:
            encoding = json.detect_encoding(file.read(4))
        with (
            path.open(encoding=encoding) as stream,
            tqdm(
                total=path.stat().st_size,
                desc=f"reading {path.name}",
                unit="B",
                unit_scale=True,
                leave=False,  # an error stands by itself
            ) as bar,
        ):
            parts = JsonStream(stream, lambda: bar.update(stream.buffer.tell() - bar.n))
            for key in parts.keys():  # noqa: SIM118
                if key == "images":
                    _read_images(path, parts.items(), index, raw)
                elif key == "annotations":
                    _read_annotations(path, parts.items(), index, image_ids, visible, raw)
                elif key == "categories":
                    categories = sum(1 for _ in parts.items())
                found.add(key)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not COCO JSON: {error}") from error
    for key in ("images", "annotations"):
        if key not in found:
            raise UserError(
                f"{path} is not COCO: it has no list {key!r}; it has {', '.join(sorted(found))}"
            )
    raw.categories.add(categories)
    for number, image_id in enumerate(image_ids, first):
        known = image_id if image_id in index else other_id(image_id, index)
        if known is None:
            raise UserError(f"{path}: no image has id {_shown(image_id)}, which a box names")
        raw.image.append(index[known])
        if raw.needs.keypoints and visible[image_id] < raw.needs.visible and not raw.flags[number]:
            raw.flags[number] = 1 + _FLAGS.index("keypoints_invisible")


def _read_images(path: Path, records: Iterable[Any], index: dict[Any, int], raw: _Raw) -> None:
    for number, record in enumerate(records):
        try:
            image_id, height, width = record["id"], record["height"], record["width"]
            seen = image_id in index
            sides = 0 < height < _MOST_PIXELS and 0 < width < _MOST_PIXELS
        except (TypeError, KeyError):
            raise UserError(
                f"{path}: images[{number}] lacks one of id, height, width: {_shown(record)}"
            ) from None
        if seen:
            raise UserError(f"{path}: images[{number}]: id {image_id!r} is there twice")
        if not sides or type(width) is not int or type(height) is not int:
            raise UserError(
                f"{path}: images[{number}] is {_shown(width)} x {_shown(height)} px, expected "
                f"whole numbers from 1 to {_MOST_PIXELS - 1}"
            )
        index[image_id] = raw.num_images
        raw.shapes.extend((height, width))


def _read_annotations(
    path: Path,
    records: Iterable[Any],
    index: dict[Any, int],
    image_ids: list[Any],
    visible: Counter[Any],
    raw: _Raw,
) -> None:
    for number, record in enumerate(records):
        try:
            if not _is_whole(record):
                mended_annotation(record)
            x, y, width, height = record["bbox"]
            raw.boxes.extend((x, y, width, height))
            image_id = record["image_id"]
            hash(image_id)  # a list would be found too late to name the record
            image_ids.append(image_id)
            flag = _flag(record, raw.needs, raw.size(index.get(image_id)))
            if raw.needs.keypoints:
                visible[image_id] += visible_keypoints(record)
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
            raise UserError(
                f"{path}: annotations[{number}] lacks an image_id, or a bbox that is [x, y, width, "
                f"height] in pixels: {_shown(record)}"
            ) from None
        raw.flags.append(1 + _FLAGS.index(flag) if flag else 0)


def _is_whole(record: dict[str, Any]) -> bool:
    """Whether there is nothing to mend in what is read of an annotation; most are so."""
    box = record.get("bbox")
    return (
        type(box) is list
        and _NUMBER.issuperset(map(type, box))
        and type(record.get("iscrowd")) in _FLAG_TYPES
    )


def _flag(record: dict[str, Any], needs: Needs, size: Size | None) -> str:
    """Why an annotation is not trained on, whatever its box: one of the flags, or ""."""
    if record.get("iscrowd"):
        return "crowd"
    if record.get("ignore"):
        return "ignored"
    mask = record.get("segmentation")
    if not mask:
        return ""
    if is_dropped(mask):
        return "segmentation_unusable"
    # Of images that come after their annotations it cannot be said.
    kind, _ = empty_mask_problem(record, size, needs)
    return kind


def _shown(record: object) -> str:
    text = repr(record)
    return text if len(text) <= 120 else text[:117] + "..."


def _read_records(name: str, raw: _Raw) -> None:
    """Adds the boxes of a dataset that is registered by a function, in Detectron2's form."""
    for record in tqdm(DatasetCatalog.get(name), desc=f"reading {name}", unit="image"):
        if "height" not in record or "width" not in record:
            raise UserError(
                f"dataset {name!r}: {record.get('file_name')!r} has no height and width"
            )
        for label in record.get("annotations", ()):
            box = BoxMode.convert(list(label["bbox"]), label["bbox_mode"], BoxMode.XYWH_ABS)
            raw.boxes.extend(float(value) for value in box)
            raw.image.append(raw.num_images)
            raw.flags.append(1 if label.get("iscrowd") else 2 if label.get("ignore") else 0)
        raw.shapes.extend((record["height"], record["width"]))
    classes = MetadataCatalog.get(name).get("thing_classes")
    raw.categories.add(None if classes is None else len(classes))

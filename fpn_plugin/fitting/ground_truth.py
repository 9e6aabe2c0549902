"""The boxes of a dataset: those that a detector is trained on, and those left out, by name."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from tqdm import tqdm

from fpn_plugin.data import check_datasets, ensure_mini_datasets
from fpn_plugin.errors import UserError

from .json_stream import JsonStream

__all__ = ["LEFT_OUT", "GroundTruth", "read_ground_truth"]

_MOST_PIXELS = 1 << 21  # of an image's side
# Why a box is left out; one that has several reasons counts under the first.
LEFT_OUT = {
    "crowd": "marked iscrowd",
    "ignored": "marked ignore",
    "not_finite": "a coordinate is NaN or infinite",
    "zero_area": "width or height is 0 or less",
    "out_of_image": "no part of it lies in the image",
}


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


def read_ground_truth(sources: Sequence[str], key: str = "--data") -> GroundTruth:
    """Reads the boxes of datasets, with a progress bar.

    Args:
        sources: each a registered dataset or the path of a COCO instances JSON; taken together.
        key: what names them, for messages.

    Raises:
        UserError: a source that is neither, is not COCO, or has no box left.
    """
    raw = _Raw()
    for source in sources:
        if Path(source).is_file():
            _read_json(Path(source), raw)
            continue
        if source.endswith(".json"):
            raise UserError(f"{key} names {source!r}, and there is no such file")
        check_datasets([source], key)
        ensure_mini_datasets([source])
        json_file = MetadataCatalog.get(source).get("json_file")
        if json_file:
            _read_json(Path(json_file), raw)
        else:
            _read_records(source, raw)
    return raw.finish(", ".join(sources))


class _Raw:
    """Boxes as they are read, in arrays that hold a million in tens of megabytes."""

    def __init__(self) -> None:
        self.boxes, self.image, self.flags = array("d"), array("q"), array("b")
        self.shapes = array("q")
        self.categories: set[int | None] = set()

    @property
    def num_images(self) -> int:
        return len(self.shapes) // 2

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
        inside = np.clip(corners, 0, limits)  # NaN stays NaN
        reasons = {
            "crowd": flags == 1,
            "ignored": flags == 2,
            "not_finite": ~np.isfinite(corners).all(axis=1),
            "zero_area": (boxes[:, 2:] <= 0).any(axis=1),
            "out_of_image": (inside[:, 2:] <= inside[:, :2]).any(axis=1),
        }
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


def _read_json(path: Path, raw: _Raw) -> None:
    """Adds the boxes of a COCO JSON."""
    index: dict[Any, int] = {}
    image_ids: list[Any] = []  # of boxes; images may come after them
    found = set()
    categories = None
    try:
        with (
            path.open(encoding="utf-8-sig") as stream,  # some editors begin a file with its mark
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
                    _read_annotations(path, parts.items(), image_ids, raw)
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
    try:
        raw.image.extend([index[image_id] for image_id in image_ids])
    except KeyError as error:
        told = _shown(error.args[0])
        raise UserError(f"{path}: no image has id {told}, which a box names") from None


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


def _read_annotations(path: Path, records: Iterable[Any], image_ids: list[Any], raw: _Raw) -> None:
    for number, record in enumerate(records):
        try:
            x, y, width, height = record["bbox"]
            raw.boxes.extend((x, y, width, height))
            hash(record["image_id"])  # a list would be found too late to name the record
            image_ids.append(record["image_id"])
            crowd, ignored = record.get("iscrowd"), record.get("ignore")
        except (TypeError, KeyError, ValueError, AttributeError, OverflowError):
            raise UserError(
                f"{path}: annotations[{number}] lacks an image_id, or a bbox that is [x, y, width, "
                f"height] in pixels: {_shown(record)}"
            ) from None
        raw.flags.append(1 if crowd else 2 if ignored else 0)


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

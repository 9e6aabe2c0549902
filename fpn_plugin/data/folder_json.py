"""COCO JSONs that folders of labels are converted to."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from detectron2.structures.masks import polygon_area

from fpn_plugin.errors import UserError

from . import label_folders, label_formats
from .label_folders import JSON_STEM, LabelFolder, LabelledImage
from .label_formats import read_labels
from .problems import KINDS, Problem
from .reading import JsonStream

__all__ = ["folder_json", "label_problems", "labels_of"]

logger = logging.getLogger(__name__)
_ORIGIN = "fpn_plugin"  # the key of a converted JSON for its labels, and what is wrong with them


def folder_json(folder: str, split: str = "") -> str:
    """The COCO JSON of a folder of labels, written unless it is there and no file has changed.

    It is in the folder, or in the user's cache if the folder cannot be written.

    Args:
        folder: of images, and labels in the format of VOC, YOLO or LabelMe.
        split: the part of it to convert, such as "train"; "" for a folder that has no splits.

    Returns:
        Its path. File names in it are relative to the folder. :func:`label_problems` gives what
        could not be converted.

    Raises:
        UserError: the folder has no labels, those of several formats or splits, or no such split;
            or the JSON cannot be written.
    """
    data, absolute = LabelFolder(folder, split), os.path.abspath(folder)
    code = [Path(module.__file__).read_bytes() for module in (label_folders, label_formats)]
    digest = _digest(repr([code, absolute, split, *data.files.items()]))
    name = f"{JSON_STEM}_{split.replace('/', '_')}.json" if split else f"{JSON_STEM}.json"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "fpn_plugin").expanduser()
    places = (Path(folder, name), cache / _digest(absolute) / name)
    for path in places:
        if _origin(path).get("digest") == digest:
            return str(path)
    label_format, names, labelled = read_labels(data)
    origin = {
        "digest": digest,
        "labels": f"{absolute}:{split}" if split else absolute,
        "problems": [[each.kind, each.record, each.message] for each in data.problems],
    }
    content = {_ORIGIN: origin, **_coco(names, labelled)}
    for path in places:
        aside = path.with_suffix(f".{os.getpid()}")  # other processes may convert it too
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            aside.write_text(json.dumps(content), encoding="utf-8")
            os.replace(aside, path)
        except OSError as error:
            failed = error
            with contextlib.suppress(OSError):
                aside.unlink()
        else:
            logger.warning(
                "%s: %s labels of %d images, with %d objects, are converted to %s",
                folder, label_format, len(labelled), len(content["annotations"]), path,
            )  # fmt: skip
            return str(path)
    raise UserError(f"cannot write {places[0]}, nor {places[1]}: {failed.strerror}")


def labels_of(content: Any) -> str:
    """The ``FOLDER`` or ``FOLDER:SPLIT`` that a JSON was converted from; "" for others."""
    origin = content.get(_ORIGIN) if isinstance(content, dict) else None
    return str(origin.get("labels", "")) if isinstance(origin, dict) else ""


def label_problems(content: Any) -> Iterator[Problem]:
    """What was wrong with the labels that a JSON was converted from."""
    problems = content[_ORIGIN].get("problems") if labels_of(content) else None
    for each in problems if isinstance(problems, list) else ():
        if type(each) is list and [*map(type, each)] == [str] * 3 and each[0] in KINDS:
            yield Problem(*each)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:32]


def _origin(path: Path) -> dict[str, Any]:
    """What a converted JSON says of its labels, at its beginning."""
    try:
        with open(path, "rb") as file:
            stream = JsonStream(file)
            found = stream.value() if next(stream.keys(), "") == _ORIGIN else None
    except (OSError, ValueError):
        found = None
    return found if isinstance(found, dict) else {}


def _coco(names: Sequence[str], labelled: Sequence[LabelledImage]) -> dict[str, Any]:
    ids = {name: number for number, name in enumerate(names, 1)}
    images, annotations = [], []
    for image_id, image in enumerate(labelled, 1):
        width, height = image.size
        record = {"id": image_id, "file_name": image.file_name, "width": width, "height": height}
        images.append(record)
        for each in image.objects:
            x0, y0, x1, y1 = each.corners
            areas = [polygon_area(outline[::2], outline[1::2]) for outline in each.polygons]
            annotations.append({
                "id": len(annotations) + 1, "image_id": image_id, "category_id": ids[each.name],
                "bbox": [x0, y0, x1 - x0, y1 - y0],
                "area": float(sum(areas)) if areas else abs((x1 - x0) * (y1 - y0)),
                "iscrowd": each.crowd, "segmentation": each.polygons, "label_row": each.where,
            })  # fmt: skip
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    return {"images": images, "annotations": annotations, "categories": categories}

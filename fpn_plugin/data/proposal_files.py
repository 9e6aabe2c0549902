"""Files of proposals. Detectron2's unpickling may run code of a file; reading here does not."""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np
from detectron2.structures import BoxMode
from detectron2.utils.file_io import PathManager

from fpn_plugin.errors import UserError
from fpn_plugin.utils.pickles import load_arrays

__all__ = ["read_proposals", "with_proposals"]

_OLDER_NAMES = {"indexes": "ids", "scores": "objectness_logits"}  # Detectron1's
_MADE_BY = "fpn-plugin dump-proposals makes such files"
_MODES = (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS)  # that Detectron2 can convert
_LARGEST = np.finfo(np.float32).max


def read_proposals(file: IO[bytes], encoding: str = "latin1") -> dict[str, Any]:
    """The content of a file of proposals, with Detectron2's keys.

    Args:
        file: opened for reading bytes.
        encoding: of Python 2's text.

    Raises:
        UserError: it is no pickle, has more than arrays, or the proposals of an image are not
            finite boxes with a finite logit each.
    """
    name = getattr(file, "name", "of proposals")
    try:
        content = load_arrays(file, encoding)
    except UserError as error:
        raise UserError(f"{name!r} is not loaded: {error}; {_MADE_BY}") from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{name!r} is no file of proposals: {error}; {_MADE_BY}") from error
    if isinstance(content, dict):
        content = {_OLDER_NAMES.get(key, key): value for key, value in content.items()}
    wrong = next(_problems(content), None)
    if wrong:
        raise UserError(f"{name!r} is no file of proposals: {wrong}; {_MADE_BY}")
    return content


def _problems(content: Any) -> Iterator[str]:
    if not isinstance(content, dict):
        yield f"it holds a value of type {type(content).__name__}, expected a dict"
        return
    parts = ("ids", "boxes", "objectness_logits")
    for part in parts:
        rows = content.get(part)
        listed = isinstance(rows, list | tuple)
        if not listed and not (isinstance(rows, np.ndarray) and rows.ndim > 0):
            yield f"it has no list {part!r}"
            return
    counts = [len(content[part]) for part in parts]
    if len(set(counts)) > 1:
        message = ", ".join(f"{count} {part}" for count, part in zip(counts, parts, strict=True))
        yield f"it has {message}, expected one of each for an image"
        return
    mode = content.get("bbox_mode", BoxMode.XYXY_ABS)
    if not isinstance(mode, int | np.integer) or mode not in _MODES:
        expected = ", ".join(f"{int(known)} ({known.name})" for known in _MODES)
        yield f"bbox_mode is {str(mode)[:20]!r}, expected one of {expected}"
    seen: set[str] = set()
    for image, boxes, logits in zip(*(content[part] for part in parts), strict=True):
        if isinstance(image, bool) or not isinstance(image, int | str | np.integer):
            yield f"it has an image id of type {type(image).__name__}"
            continue
        if str(image) in seen:  # as Detectron2 looks them up
            yield f"image {str(image)[:40]!r} is in it twice"
        seen.add(str(image))
        message = _problem_of(boxes, logits)
        if message:
            yield f"image {str(image)[:40]!r} has {message}"


def _problem_of(boxes: Any, logits: Any) -> str:
    """What is wrong with an image's proposals; "" if nothing is."""
    for what, values in (("boxes", boxes), ("logits", logits)):
        if not isinstance(values, np.ndarray):
            return f"{what} of type {type(values).__name__}, expected an array"
        if values.dtype.kind not in "iuf":
            return f"{what} of dtype {values.dtype}, expected numbers"
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        return f"boxes of shape {boxes.shape}, expected (N, 4)"
    if logits.shape != boxes.shape[:1]:
        return f"logits of shape {logits.shape} for {len(boxes)} boxes"
    for what, values in (("boxes", boxes), ("logits", logits)):
        if not (np.abs(values) <= _LARGEST).all():
            return f"{what} that are not finite"
    return ""


def with_proposals(records: Sequence[dict[str, Any]], file: str) -> list[dict[str, Any]]:
    """Records of a dataset with the proposals that Detectron2's mapper reads.

    Args:
        records: in Detectron2's form.
        file: the proposals, a path that Detectron2's PathManager opens.

    Raises:
        UserError: as :func:`read_proposals`, or the file lacks an image of the dataset.
    """
    with PathManager.open(file, "rb") as opened:
        content = read_proposals(opened)
    mode = BoxMode(content.get("bbox_mode", BoxMode.XYXY_ABS))
    of_image = {str(image): index for index, image in enumerate(content["ids"])}
    proposed = []
    for record in records:
        index = of_image.get(str(record["image_id"]))
        if index is None:
            raise UserError(
                f"{file!r} has no proposals of image {str(record['image_id'])!r}; fpn-plugin "
                "dump-proposals makes those of a whole dataset"
            )
        logits = content["objectness_logits"][index]
        best_first = logits.argsort()[::-1]
        proposed.append(record | {
            "proposal_boxes": content["boxes"][index][best_first],
            "proposal_objectness_logits": logits[best_first],
            "proposal_bbox_mode": mode,
        })  # fmt: skip
    return proposed

"""The rules for what an annotation marks in its image: box, segmentation, keypoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from .problems import shortened

__all__ = [
    "MOST_PIXELS", "NO_EXTENT", "NUMBER", "ROUNDING", "Found", "Size", "are_pixels", "box_problem",
    "box_rules", "compressed", "is_dropped", "is_empty_mask", "is_polygon", "keypoint_problem",
    "mask_problem",
]  # fmt: skip

NUMBER = (int, float)
# Detectron2 drops thinner boxes: nothing of them is left in float32 pixels.
NO_EXTENT = 1e-3
# Annotation tools round: what reaches out by no more pixels is not reported.
ROUNDING = 1.0
MOST_PIXELS = 2**21  # of an image's side
_NOTHING = ("", "")
_XYWH = "[x, y, width, height]"

Found = tuple[str, str]
"""A kind of :data:`fpn_plugin.data.problems.KINDS` and a message; two "" if nothing is wrong."""
Size = tuple[int, int]
"""Width and height of an image, in pixels."""


def box_rules(x: Any, y: Any, width: Any, height: Any, across: Any, down: Any) -> dict[str, Any]:
    """Which rules boxes break, by kind of problem; a box has the first of its problems.

    Args are numbers or arrays of one shape, in pixels. The image is ``across`` wide and ``down``
    high.
    """
    right, bottom = x + width, y + height
    return {
        # NaN and infinity are no JSON, but Python reads them. Either times 0 is NaN.
        "box_not_finite": (x * 0 != 0) | (y * 0 != 0) | (width * 0 != 0) | (height * 0 != 0),
        "box_negative": (width < 0) | (height < 0),
        "box_far_out": (x < -across) | (y < -down) | (right > 2 * across) | (bottom > 2 * down),
        "box_empty": (width < NO_EXTENT) | (height < NO_EXTENT),
        "box_outside": (right < NO_EXTENT) | (bottom < NO_EXTENT)
        | (across - x < NO_EXTENT) | (down - y < NO_EXTENT),
        "box_reaches_out": (x < -ROUNDING) | (y < -ROUNDING)
        | (right > across + ROUNDING) | (bottom > down + ROUNDING),
    }  # fmt: skip


def box_problem(box: Any, size: Size | None) -> Found:
    """What is wrong with a box [x, y, width, height]; the size is None if it is not known."""
    if type(box) is not list or len(box) != 4 or any(type(v) not in NUMBER for v in box):
        return "box_malformed", f"bbox is {shortened(box)}, expected {_XYWH} in pixels"
    try:
        broken = box_rules(*map(float, box), *(size or (math.inf, math.inf)))
    except OverflowError:  # an integer of hundreds of digits
        broken = {"box_not_finite": True}
    kinds = broken if size else ("box_not_finite", "box_negative", "box_empty")
    kind = next((kind for kind in kinds if broken.get(kind)), "")
    if not kind:
        return _NOTHING
    where = f" in an image of {size[0]} x {size[1]} pixels" if size else ""
    reason = {
        "box_not_finite": f", expected {_XYWH} in pixels",
        "box_negative": f", whose width or height is negative; expected {_XYWH}, not corners",
    }.get(kind, where)
    return kind, f"bbox is {shortened(box)}{reason}"


def mask_problem(given: Any, size: Size | None) -> Found:
    """What is wrong with a segmentation.

    Args:
        given: polygons ``[[x, y, ...], ...]`` in pixels, or a run-length encoding
            ``{"size": [height, width], "counts": ...}``; None or [] if there is no mask.
        size: of the image; None if it is not known.
    """
    if given is None or given == []:
        return _NOTHING
    if type(given) is dict:
        return _rle_problem(given, size)
    if type(given) is not list or set(map(type, given)) != {list}:
        message = f"segmentation is {shortened(given)}, expected [[x, y, ...], ...] or an RLE"
        return "segmentation", message
    for polygon in given:
        # Coordinates far outside would be drawn edge by edge, pixel by pixel.
        if polygon and not are_pixels(polygon, size):
            where = f"in an image of {size[0]} x {size[1]}" if size else "an image"
            message = f"segmentation is {shortened(given)}, which is not all near or inside {where}"
            return "segmentation", message
    if is_dropped(given):
        return "segmentation_unusable", f"segmentation is {shortened(given)}"
    return _NOTHING


def is_empty_mask(given: Any, size: Size | None) -> bool:
    """Whether a segmentation without a problem has no pixel at its image's own size."""
    if not given or size is None or mask_problem(given, size) != _NOTHING:
        return False
    if type(given) is dict:
        return not coco_mask.area(compressed(given))
    polygons = [polygon for polygon in given if is_polygon(polygon)]
    return not any(coco_mask.area(coco_mask.frPyObjects(polygons, size[1], size[0])))


def compressed(runs: dict[str, Any]) -> dict[str, Any]:
    """A run-length encoding without a problem, as pycocotools reads it."""
    return coco_mask.frPyObjects(runs, *runs["size"]) if type(runs["counts"]) is list else runs


def is_polygon(given: Sequence[Any]) -> bool:
    """Whether a list of coordinates has three points or more; Detectron2 drops others."""
    return len(given) >= 6 and len(given) % 2 == 0


def is_dropped(given: Any) -> bool:
    """Whether a segmentation has polygons, but none that Detectron2 takes."""
    if type(given) is not list or not given:
        return False
    return not any(type(polygon) is list and is_polygon(polygon) for polygon in given)


def _rle_problem(given: dict[Any, Any], size: Size | None) -> Found:
    shape, counts = given.get("size"), given.get("counts")
    fits = type(shape) is list and [type(side) for side in shape] == [int, int]
    fits = fits and (size is None or tuple(shape) == size[::-1])
    if fits and type(counts) is list:
        fits = all(type(count) is int and count >= 0 for count in counts)
        fits = fits and sum(counts) == shape[0] * shape[1]
    elif fits:
        # pycocotools gives uninitialised memory if runs end early.
        fits = type(counts) is str and _pixels_of(counts) == shape[0] * shape[1]
    if fits:
        return _NOTHING
    expected = f"{list(size[::-1])}" if size else "[height, width]"
    message = f"segmentation is {shortened(given)}, expected an RLE of size {expected}"
    return "segmentation", message


def _pixels_of(counts: str) -> int:
    """How many pixels the runs of a compressed RLE cover; -1 if it is none.

    The format is pycocotools': groups of 5 bits, the lowest first, in characters from "0" on. The
    sixth bit says that the number goes on. From the fourth run on, a number is the difference from
    the run before the last.
    """
    try:
        groups = np.frombuffer(counts.encode("ascii"), np.uint8).astype(np.int64) - 48
    except UnicodeEncodeError:
        return -1
    ends = np.flatnonzero(groups & 32 == 0)
    if not len(ends) or ends[-1] != len(groups) - 1 or groups.min() < 0 or groups.max() > 63:
        return -1
    starts = np.concatenate([[0], ends[:-1] + 1])
    lengths = ends - starts + 1
    if lengths.max() > 7:  # 35 bits: more than any image
        return -1
    place = 5 * (np.arange(len(groups)) - np.repeat(starts, lengths))
    numbers = np.add.reduceat((groups & 31) << place, starts)
    numbers -= np.where(groups[ends] & 16, 1 << (5 * lengths), 0)
    runs = numbers.copy()
    # The first run is as it is; of the others, every second is a sum of differences.
    runs[1::2] = np.cumsum(numbers[1::2])
    runs[2::2] = np.cumsum(numbers[2::2])
    return int(runs.sum()) if runs.min() >= 0 else -1


def keypoint_problem(given: Any, size: Size | None) -> Found:
    """What is wrong with keypoints ``[x, y, visible, ...]`` in pixels; None or [] if none."""
    if given is None or given == []:
        return _NOTHING
    if type(given) is list and len(given) % 3 == 0 and are_pixels(given, size):
        return _NOTHING
    message = f"keypoints are {shortened(given)}, expected [x, y, visible, ...] in pixels"
    return "keypoints", message


def are_pixels(values: Sequence[Any], size: Size | None) -> bool:
    """Whether all of one value or more are finite, and no farther out than the longer side."""
    farthest = 2 * max(size) if size else 2 * MOST_PIXELS
    try:
        # A sum is the fastest way to find a NaN, which compares with nothing.
        return math.isfinite(sum(values)) and -farthest <= min(values) and max(values) <= farthest
    except (TypeError, OverflowError):
        return False

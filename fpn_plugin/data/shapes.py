"""The rules for what an annotation marks in its image: box, segmentation, keypoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from .problems import shortened

__all__ = [
    "MOST_PIXELS",
    "NO_EXTENT",
    "NUMBER",
    "ROUNDING",
    "Size",
    "are_pixels",
    "box_problem",
    "box_rules",
    "covers_no_pixel",
    "is_dropped",
    "is_polygon",
    "keypoint_problem",
    "mask_problem",
]

NUMBER = (int, float)
# Thinner boxes than this have no extent left in float32 pixels, and Detectron2 drops them.
NO_EXTENT = 1e-3
# Annotation tools round; what reaches out by no more pixels is not worth telling.
ROUNDING = 1.0
MOST_PIXELS = 2**21  # of an image's side
_NOTHING = ("", "")

# A kind of problem and its message; empty if there is none.
Found = tuple[str, str]
Size = tuple[int, int]


def box_rules(x: Any, y: Any, width: Any, height: Any, across: Any, down: Any) -> dict[str, Any]:
    """Which rules boxes break; of numbers, or of arrays of one shape.

    Args:
        x: left side, in pixels.
        y: upper side.
        width: of the box.
        height: of the box.
        across: width of the image.
        down: height of the image.

    Returns:
        Whether each box breaks a rule, by the kind of problem. A box has the first of them.
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
    """What is wrong with a box.

    Args:
        box: XYWH in pixels of the image.
        size: width and height of the image, if they are known.

    Returns:
        The kind of the problem and its message; two empty strings if there is none.
    """
    message = f"bbox is {shortened(box)}"
    if type(box) is not list or len(box) != 4 or any(type(v) not in NUMBER for v in box):
        return "box_malformed", f"{message}, expected [x, y, width, height] in pixels"
    try:
        broken = box_rules(*map(float, box), *(size or (math.inf, math.inf)))
    except OverflowError:  # an integer of hundreds of digits
        broken = {"box_not_finite": True}
    kinds = broken if size else ("box_not_finite", "box_negative", "box_empty")
    kind = next((kind for kind in kinds if broken.get(kind)), "")
    if kind == "box_not_finite":
        message += ", expected [x, y, width, height] in pixels"
    elif kind == "box_negative":
        message += (
            ", whose width or height is negative; expected [x, y, width, height], not corners"
        )
    elif size:
        message += f" in an image of {size[0]} x {size[1]} pixels"
    return (kind, message) if kind else _NOTHING


def mask_problem(given: Any, size: Size | None) -> Found:
    """What is wrong with a segmentation.

    Args:
        given: polygons ``[[x, y, ...], ...]`` in pixels, or a run-length encoding
            ``{"size": [height, width], "counts": ...}``; None or [] if there is no mask.
        size: width and height of the image, if they are known.

    Returns:
        As :func:`box_problem`.
    """
    if given is None or given == []:
        return _NOTHING
    if type(given) is dict:
        return _rle_problem(given, size)
    message = f"segmentation is {shortened(given)}"
    if type(given) is not list or any(type(polygon) is not list for polygon in given):
        return "segmentation", f"{message}, expected [[x, y, ...], ...] or an RLE"
    for polygon in given:
        # Coordinates far outside would be drawn edge by edge, pixel by pixel.
        if polygon and not are_pixels(polygon, size):
            where = f"in an image of {size[0]} x {size[1]}" if size else ""
            return (
                "segmentation",
                f"{message}, which is not all near or inside {where or 'an image'}",
            )
    return ("segmentation_unusable", message) if is_dropped(given) else _NOTHING


def covers_no_pixel(given: Any, size: Size) -> bool:
    """Whether a mask has no pixel at its image's own size.

    Args:
        given: polygons or a run-length encoding in which :func:`mask_problem` finds nothing.
        size: width and height of the image.
    """
    if type(given) is dict:
        compressed = type(given["counts"]) is not list
        runs = given if compressed else coco_mask.frPyObjects(given, *given["size"])
        return not coco_mask.area(runs)
    polygons = [polygon for polygon in given if is_polygon(polygon)]
    return not any(coco_mask.area(coco_mask.frPyObjects(polygons, size[1], size[0])))


def is_polygon(given: Sequence[Any]) -> bool:
    """Whether a list of coordinates has three points or more; Detectron2 drops others."""
    return len(given) >= 6 and len(given) % 2 == 0


def is_dropped(given: Any) -> bool:
    """Whether a segmentation is of polygons, but none that Detectron2 takes."""
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
        # pycocotools hands out uninitialised memory where runs end early.
        fits = type(counts) is str and _pixels_of(counts) == shape[0] * shape[1]
    if fits:
        return _NOTHING
    expected = f"{list(size[::-1])}" if size else "[height, width]"
    message = f"segmentation is {shortened(given)}, expected an RLE of size {expected}"
    return "segmentation", message


def _pixels_of(counts: str) -> int:
    """How many pixels the runs of a compressed RLE cover; -1 if it is none.

    The format is pycocotools': groups of 5 bits, the lowest first, in characters from "0" on,
    whose sixth bit says that the number goes on; from the third run on, the difference from the
    run before the last.
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
    """What is wrong with keypoints.

    Args:
        given: ``[x, y, visible, ...]``, in pixels; None or [] if there are none.
        size: width and height of the image, if they are known.

    Returns:
        As :func:`box_problem`.
    """
    if given is None or given == []:
        return _NOTHING
    if type(given) is list and len(given) % 3 == 0 and are_pixels(given, size):
        return _NOTHING
    message = f"keypoints are {shortened(given)}, expected [x, y, visible, ...] in pixels"
    return "keypoints", message


def are_pixels(values: Sequence[Any], size: Size | None) -> bool:
    """Whether all are finite numbers, no farther from the image than its longer side.

    Args:
        values: at least one.
        size: width and height of the image, if they are known.
    """
    farthest = 2 * max(size) if size else 2 * MOST_PIXELS
    try:
        # A sum is the fastest way to find a NaN, which compares with nothing.
        return math.isfinite(sum(values)) and -farthest <= min(values) and max(values) <= farthest
    except (TypeError, OverflowError):
        return False

"""The rules for image files."""

from __future__ import annotations

import os
from pathlib import Path

from detectron2.data.detection_utils import read_image
from PIL import Image

from .shapes import Found, Size

__all__ = ["DEEP_MODES", "UNREADABLE", "image_problem", "shown_size", "why_unreadable"]

# What Pillow raises on files that are missing, cut off, damaged or no images.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
# Others are refused: for EPS Pillow starts Ghostscript, for WMF a program of Windows, and some may
# hold an image of these formats.
_FORMATS = (
    "AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PCX", "PNG", "PPM", "SGI", "TGA",
    "TIFF", "WEBP",
)  # fmt: skip
_ORIENTATION = 0x0112  # the EXIF tag; 5 to 8 swap width and height
DEEP_MODES = ("I", "F")  # what Pillow's modes of more than 8 bits per pixel begin with
# Modes of files that hold gray or colours, and values of INPUT.FORMAT that keep gray, or alpha.
_GRAY, _COLOURS = ("1", "L", "LA"), ("P", "PA", "RGB", "RGBA")
_OF_GRAY, _WITH_ALPHA = ("L", "LA"), ("LA", "RGBA")


def image_problem(
    path: str | Path, size: Size | None, *, decode: bool, image_format: str = "BGR"
) -> Found:
    """What is wrong with an image file.

    Args:
        path: of the file.
        size: that its record states, if any, of the image turned as its EXIF says: Detectron2 turns
            images.
        decode: whether to read all of it, not only its header.
        image_format: INPUT.FORMAT, in which it is read.
    """
    if not os.path.isfile(path):
        return "image_missing", "is not there"
    try:
        with Image.open(path) as image:
            if image.format not in _FORMATS:
                message = f"is of format {image.format}, which is not read: write it as PNG or JPEG"
                return "image_unreadable", message
            mode = image.mode
            width, height = _shown_size(image)
            turned = (width, height) != image.size
            transparent = "A" in image.getbands() or "transparency" in image.info
            frames = getattr(image, "n_frames", 1)
        if mode.startswith(DEEP_MODES):
            message = f"has pixels of more than 8 bits ({mode}), which would be clipped at 255"
            return "image_depth", f"{message}: write it with 8"
        if decode:
            height, width = read_image(str(path), format=image_format).shape[:2]
    except UNREADABLE as error:
        return "image_unreadable", f"cannot be read: {why_unreadable(error)}"
    if size is not None and size != (width, height):
        message = f"is {width} x {height} pixels, but the JSON says {size[0]} x {size[1]}"
        if turned and size == (height, width):
            message += ", its size before it is turned as its EXIF says; boxes are read as shown"
        return "image_other_size", message
    if transparent and image_format not in _WITH_ALPHA:
        return "image_converted", f"is {mode}, read as {image_format} without its alpha"
    if frames > 1:
        return "image_converted", f"has {frames} frames, of which only the first is read"
    if mode not in _GRAY and image_format in _OF_GRAY:
        return "image_converted", f"is {mode}, read as {image_format}: colours become gray"
    if mode not in (*_GRAY, *_COLOURS, image_format):
        return "image_converted", f"is {mode}, read as {image_format} without a colour profile"
    return "", ""


def shown_size(path: str | Path) -> Size | None:
    """Width and height of an image file, turned as its EXIF says; None if it cannot be read."""
    try:
        with Image.open(path) as image:
            return _shown_size(image) if image.format in _FORMATS else None
    except UNREADABLE:
        return None


def _shown_size(image: Image.Image) -> Size:
    turned = image.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


def why_unreadable(error: Exception) -> str:
    """Pillow's error in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split()) or type(error).__name__

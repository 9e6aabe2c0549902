"""Images of a config: read from files, as input of its model, and in colours for pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import transforms as T
from detectron2.data.detection_utils import convert_image_to_rgb, convert_PIL_to_numpy
from PIL import Image, ImageOps
from torch import Tensor

from fpn_plugin.errors import UserError, near_names

from .image_files import DEEP_MODES
from .mapper import read_image_or_say

__all__ = [
    "IMAGE_FORMATS", "channels_first", "check_channels", "read_picture", "resized_picture",
    "rgb_of",
]  # fmt: skip

IMAGE_FORMATS = {
    "BGR": 3, "RGB": 3, "L": 1, "RGBA": 4, "LA": 2, "CMYK": 4, "HSV": 3, "LAB": 3, "RGBX": 4,
    "YCbCr": 3, "YUV-BT.601": 3,
}  # fmt: skip
"""Values of INPUT.FORMAT and their channels: Pillow's modes of 8 bits, and two of Detectron2's."""


def check_channels(
    image_format: str,
    mean: Sequence[float],
    std: Sequence[float],
    keys: tuple[str, str, str] = ("INPUT.FORMAT", "MODEL.PIXEL_MEAN", "MODEL.PIXEL_STD"),
) -> None:
    """Refuses a format in which no image can be read, and means for another number of channels.

    Args:
        image_format: in which images are read.
        mean: a value for each channel. A single channel may have several, and is repeated.
        std: a value for each of these.
        keys: the names of the three.

    Raises:
        UserError: names the key, and what is expected.
    """
    if image_format not in IMAGE_FORMATS:
        raise UserError(f"{keys[0]} is {image_format!r}: {near_names(image_format, IMAGE_FORMATS)}")
    if len(mean) != len(std):
        raise UserError(
            f"{keys[1]} has {len(mean)} values and {keys[2]} {len(std)}: give both a value for "
            f"each channel of {keys[0]} {image_format}"
        )
    channels = IMAGE_FORMATS[image_format]
    if channels not in (1, len(mean)):
        raise UserError(
            f"{keys[0]} {image_format} has {channels} channels, {keys[1]} and {keys[2]} "
            f"{len(mean)}: give them {channels} values each"
        )


def picture_format(cfg: CfgNode) -> str:
    """BGR for colours, as Detectron2's DefaultPredictor takes them, or another INPUT.FORMAT."""
    return "BGR" if cfg.INPUT.FORMAT in ("BGR", "RGB") else cfg.INPUT.FORMAT


def read_picture(cfg: CfgNode, image: str | Path | Image.Image) -> np.ndarray:
    """Reads an image, of a file or of Pillow, as ``(H, W, C)``, turned as its EXIF says.

    Channels are BGR, or those of another INPUT.FORMAT. Values are uint8; of YUV-BT.601, float64.

    Raises:
        UserError: it cannot be read.
    """
    if not isinstance(image, Image.Image):
        return read_image_or_say(image, picture_format(cfg))
    if image.mode.startswith(DEEP_MODES):
        raise UserError(f"the image has pixels of more than 8 bits ({image.mode}): give it 8")
    return convert_PIL_to_numpy(ImageOps.exif_transpose(image), picture_format(cfg))


def resized_picture(cfg: CfgNode, picture: np.ndarray) -> tuple[np.ndarray, T.Transform]:
    """A picture resized as the config tests, and the transform.

    Raises:
        UserError: it has not the channels of :func:`read_picture`.
    """
    expected = IMAGE_FORMATS[picture_format(cfg)]
    if picture.ndim != 3 or picture.shape[2] != expected:
        raise UserError(
            f"the image has shape {picture.shape}; for INPUT.FORMAT {cfg.INPUT.FORMAT} it must be "
            f"(H, W, {expected}), {picture_format(cfg)}"
        )
    shortest = T.ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
    transform = shortest.get_transform(picture)
    return transform.apply_image(picture), transform


def channels_first(cfg: CfgNode, picture: np.ndarray) -> Tensor:
    """A picture as input of the config's model: float32 ``(C, H, W)`` in INPUT.FORMAT."""
    pixels = picture[:, :, ::-1] if cfg.INPUT.FORMAT == "RGB" else picture
    return torch.as_tensor(pixels.astype("float32").transpose(2, 0, 1))


def rgb_of(cfg: CfgNode, picture: np.ndarray) -> np.ndarray:
    """A picture for display: uint8 RGB ``(H, W, 3)``, gray for one channel, without alpha."""
    rgb = convert_image_to_rgb(picture, picture_format(cfg))
    return np.ascontiguousarray(rgb.clip(0, 255).astype(np.uint8))

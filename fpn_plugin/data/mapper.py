"""Reading images, with the name of the one that cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import SizeMismatchError, read_image
from PIL import Image

from fpn_plugin.errors import UserError

__all__ = ["ReadableImageMapper", "read_image_or_say"]

# What Pillow raises on files that are missing, cut off, damaged or no images.
_UNREADABLE = (OSError, SyntaxError, EOFError, Image.DecompressionBombError)


class ReadableImageMapper(DatasetMapper):
    """DatasetMapper that names an image which cannot be read or has another size than declared."""

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Maps a record; see :class:`detectron2.data.DatasetMapper`.

        Raises:
            UserError: its image cannot be read, or the dataset states another size for it.
        """
        try:
            return super().__call__(dataset_dict)
        except _UNREADABLE as error:
            raise _unreadable(dataset_dict["file_name"], error) from error
        except SizeMismatchError as error:
            raise UserError(
                f"image {dataset_dict['file_name']} has another size than its dataset says: "
                f"{' '.join(str(error).split())}"
            ) from error


def read_image_or_say(path: str | Path) -> np.ndarray:
    """Reads an image as uint8 BGR ``(H, W, 3)``, turned as its EXIF says.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return read_image(str(path), format="BGR")
    except _UNREADABLE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str | Path, error: Exception) -> UserError:
    if isinstance(error, FileNotFoundError):
        return UserError(f"no image {str(path)!r}")
    return UserError(f"cannot read image {str(path)!r}: {' '.join(str(error).split())}")

"""The images that a user names: files, folders, or a dataset with its labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog
from PIL import Image

from fpn_plugin.errors import UserError

from .coco import check_datasets, check_records
from .requirements import Needs

__all__ = ["GivenImage", "free_name", "images_in", "images_of_dataset"]


@dataclass(frozen=True)
class GivenImage:
    """An image, and its annotations if it is of a dataset."""

    path: Path
    annotations: list[dict[str, Any]] | None = None


def images_in(paths: Sequence[str], argument: str) -> list[GivenImage]:
    """Image files, and those in folders, by name.

    Args:
        paths: of files and folders.
        argument: that the user gave them with, for messages.

    Raises:
        UserError: a path does not exist, or a folder has no images.
    """
    suffixes = Image.registered_extensions()
    images: list[GivenImage] = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes)
            if not found:
                raise UserError(f"{argument} {str(path)!r} is a folder without images")
            images += map(GivenImage, found)
        elif path.is_file():
            images.append(GivenImage(path))
        else:
            raise UserError(f"{argument} {str(path)!r} is neither a file nor a folder")
    return images


def images_of_dataset(name: str, argument: str) -> list[GivenImage]:
    """A registered dataset's images.

    Args:
        name: of the dataset.
        argument: that the user gave it with, for messages.

    Raises:
        UserError: the dataset does not exist, or has records that could not be evaluated.
    """
    check_datasets([name], argument)
    # It may be registered without a check, and have files outside of its folder.
    check_records([name], Needs(training=False))
    return [
        GivenImage(Path(record["file_name"]), record.get("annotations", []))
        for record in DatasetCatalog.get(name)
    ]


def free_name(stem: str, taken: set[str]) -> str:
    """The name, with a number if it is taken, for the output of an image; is added to ``taken``."""
    number, name = 1, stem
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return name

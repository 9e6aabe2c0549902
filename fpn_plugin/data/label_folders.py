"""The files of a folder of labels, its splits, and what is found in it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from posixpath import basename, dirname, join, normpath, splitext
from typing import NoReturn

from PIL import Image
from tqdm import tqdm

from fpn_plugin.errors import UserError, near_names, one_line

from .image_files import shown_size
from .problems import Problem
from .shapes import Size

__all__ = [
    "JSON_STEM", "LabelError", "LabelFolder", "LabelledImage", "LabelledObject", "folder_and_split",
    "stem", "suffix",
]  # fmt: skip

JSON_STEM = "fpn_plugin"
"""How the names of JSONs that folders are converted to begin; these are no labels."""

_LABELS = (".xml", ".json", ".txt", ".yaml", ".yml")
_SPLITS = ("train", "val", "valid", "validation", "test")
# Folders of labels, and those of images that may be in their place.
_LABEL_FOLDERS = ("annotations", "annotation", "labels", "label", "xml", "xmls", "json")
_IMAGE_FOLDERS = ("JPEGImages", "images", "Images", "")


class LabelError(UserError):
    """A label that cannot be converted: why, and its kind of problem."""

    def __init__(self, message: str, kind: str = "label_file") -> None:
        super().__init__(message)
        self.kind = kind


@dataclass
class LabelledObject:
    """An object of an image."""

    where: str  # file and row
    name: str  # of its class
    corners: tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels, as COCO counts them
    polygons: list[list[float]] = field(default_factory=list)  # x, y, x, y, ... likewise
    crowd: int = 0


@dataclass
class LabelledImage:
    """An image and its objects."""

    file_name: str
    size: Size
    objects: list[LabelledObject]


class LabelFolder:
    """The files of a folder, by their names relative to it, and what is wrong in them.

    Args:
        path: of the folder.
        split: the part of it to read; "" for all.

    Attributes:
        files: size and time of each image and each file that may hold labels.
        images: names of the images.
        problems: what was found to be wrong.

    Raises:
        UserError: a folder cannot be read.
    """

    def __init__(self, path: str, split: str = "") -> None:
        self.path, self.split = path, split
        self.problems: list[Problem] = []
        suffixes = Image.registered_extensions()
        self.files = {
            name: size_and_time
            for name, size_and_time in _files(path, {*suffixes, *_LABELS})
            if not (suffix(name) == ".json" and basename(name).startswith(JSON_STEM))
        }
        self.images = {name: None for name in self.files if suffix(name) in suffixes}

    def report(self, kind: str, where: str, message: str) -> None:
        """Adds a problem."""
        self.problems.append(Problem(kind, where, message))

    @contextmanager
    def reported(self, where: str) -> Iterator[None]:
        """Makes a :class:`LabelError` within it a problem, which ends the block."""
        try:
            yield
        except LabelError as error:
            self.report(error.kind, where, str(error))

    def ending(self, *suffixes: str) -> list[str]:
        """The files of these suffixes."""
        return [name for name in self.files if suffix(name) in suffixes]

    def progress(self, names: Sequence[str]) -> Iterable[str]:
        """The names, with a progress bar if it takes long."""
        return tqdm(names, f"labels of {basename(self.path)}", unit="file", delay=2)

    def text(self, name: str) -> str:
        """The text of a file."""
        try:
            return Path(self.path, name).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise LabelError(f"{name} cannot be read: {one_line(error)}") from error

    def in_split(self, name: str) -> bool:
        """Whether a file is in a folder of the split's name."""
        return not self.split or self.split in dirname(name).split("/")

    def check_split(self, known: Collection[str] = ()) -> None:
        """Refuses a split that is not there, and several if none is named.

        Args:
            known: the splits; if there are none, folders are.
        """
        folders = {part for name in self.files for part in dirname(name).split("/")} - {""}
        several = [*known] or [name for name in _SPLITS if name in folders]
        known = known or folders
        if self.split and self.split not in known:
            near = near_names(self.split, known)
            raise UserError(f"{self.path} has no split {self.split!r}: {near}")
        if not self.split and len(several) > 1:
            raise UserError(
                f"{self.path} has the splits {', '.join(several)}: name one, as in "
                f"{self.path}:{several[0]}"
            )

    def image_of(self, label: str, named: str) -> str:
        """The image that a label file names, or else the one with the label file's stem."""
        named, parts = named.replace("\\", "/"), dirname(label).split("/")
        folders = ["/".join(parts)]
        for at, part in enumerate(parts):
            if part.lower() in _LABEL_FOLDERS:
                folders += [join(*parts[:at], new, *parts[at + 1 :]) for new in _IMAGE_FOLDERS]
        same_stem = [stem(label) + each for each in sorted({suffix(name) for name in self.images})]
        for name in (named, basename(named), *same_stem):
            for folder in folders:
                if (found := normpath(join(folder, name))) in self.images:
                    return found
        message = f"there is no image {named!r} for it, and none of its own name"
        raise LabelError(message, "image_missing")

    def size_of(self, image: str) -> Size:
        """Width and height of an image, read from its file."""
        size = shown_size(os.path.join(self.path, image))
        if size is None:
            raise LabelError(f"{image} cannot be read, so its size is unknown", "image_unreadable")
        return size


def folder_and_split(given: str) -> tuple[str, str] | None:
    """The parts of ``FOLDER`` or ``FOLDER:SPLIT``; None if it is neither."""
    if os.path.isdir(given):
        return given, ""
    folder, _, split = given.rpartition(":")
    # IMAGES:JSON is a mistake for JSON:IMAGES.
    return (folder, split) if os.path.isdir(folder) and splitext(split)[1] != ".json" else None


def suffix(name: str) -> str:
    """The suffix of a file's name, in lower case."""
    return splitext(name)[1].lower()


def stem(name: str) -> str:
    """The name of a file without folders and suffix."""
    return splitext(basename(name))[0]


def _files(folder: str, suffixes: Collection[str]) -> Iterator[tuple[str, tuple[int, int]]]:
    """Names of the files of these suffixes, with size and time; without hidden ones."""

    def refuse(error: OSError) -> NoReturn:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error

    seen = set()
    for where, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (real := os.path.realpath(where)) in seen:  # by a link
            folders.clear()
            continue
        seen.add(real)
        for name in sorted(names):
            path = os.path.join(where, name)
            if suffix(name) in suffixes and not name.startswith(".") and os.path.isfile(path):
                status = os.stat(path)
                relative = os.path.relpath(path, folder).replace(os.sep, "/")
                yield relative, (status.st_size, status.st_mtime_ns)

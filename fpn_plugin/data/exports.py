"""Mistakes in the exports of annotation tools, which ``fpn-plugin check --convert`` corrects."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from .records import file_name_problems, records_of, root_category
from .repairs import same_objects

__all__ = ["converted", "name_in_folder"]


def name_in_folder(images: str, name: str) -> str | None:
    """The file in a folder that an image's name seems to mean, relative to the folder, or None.

    The name may be escaped as in a URL, be of another system, or have more folders before it.
    """
    for plain in (name.replace("\\", "/"), unquote(name).replace("\\", "/")):
        parts = plain.split("/")
        for start in range(len(parts)):
            candidate = "/".join(parts[start:])
            if candidate != name and _is_there(images, candidate):
                return candidate
    return None


def converted(content: Any, images: str | None, *, no_crowds: bool) -> Iterator[str]:
    """Corrects what :func:`.repairs.repair` must not change without being asked.

    Args:
        content: of a JSON that is repaired; is changed.
        images: folder of its images; None if it is not known.
        no_crowds: whether all annotations are single objects.

    Yields:
        What was changed, a line for each kind of change.
    """
    root = root_category(content)
    if root is not None:
        content["categories"].remove(root)
        yield f"category {root['name']!r} is left out"
    annotations, pictures = records_of(content, "annotations"), records_of(content, "images")
    again = same_objects(annotations)
    if again:
        content["annotations"] = [r for r in content["annotations"] if id(r) not in again]
        yield f"{len(again)} annotations that were there twice are left out"
    if no_crowds:
        crowds = [record for record in annotations if record.get("iscrowd") == 1]
        for record in crowds:
            record["iscrowd"] = 0
        yield f"{len(crowds)} annotations with iscrowd 1 are single objects now"
    renamed = 0
    for record in pictures if images is not None else ():
        name = record.get("file_name")
        if type(name) is str and not _is_there(images, name):
            found = name_in_folder(images, name)
            record["file_name"] = found or name
            renamed += found is not None
    if renamed:
        yield f"{renamed} file names are those in the folder now"


def _is_there(images: str, name: str) -> bool:
    return not any(file_name_problems("", name)) and os.path.isfile(os.path.join(images, name))

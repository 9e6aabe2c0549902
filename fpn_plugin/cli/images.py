"""The images that a tool is given: files, folders, or a dataset with its labels."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog
from PIL import Image

from fpn_plugin.data import Needs, check_datasets, check_records
from fpn_plugin.errors import UserError

from .common import at_least

__all__ = ["GivenImage", "add_input_arguments", "given_images"]


@dataclass(frozen=True)
class GivenImage:
    """An image to look at; ``annotations`` are a dataset's, None where there is none."""

    path: Path
    annotations: list[dict[str, Any]] | None = None


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --input, --ground-truth and --max-images to a tool's arguments."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", nargs="+", metavar="PATH", help="images, or folders of images")
    source.add_argument(
        "--ground-truth", metavar="DATASET", help="images of a dataset, its labels drawn beside"
    )
    parser.add_argument("--max-images", type=at_least(1), help="take only the first so many")


def given_images(args: argparse.Namespace) -> list[GivenImage]:
    """The images that the arguments of :func:`add_input_arguments` name.

    Raises:
        UserError: a path or a dataset is not there, a folder has no images, or a dataset has
            records that could not be evaluated.
    """
    return list(_images(args))[: args.max_images]


def _images(args: argparse.Namespace) -> Iterator[GivenImage]:
    if args.ground_truth:
        check_datasets([args.ground_truth], "--ground-truth")
        # It may have been registered without, and its JSON name files out of its folder.
        check_records([args.ground_truth], Needs(training=False))
        for record in DatasetCatalog.get(args.ground_truth):
            yield GivenImage(Path(record["file_name"]), record.get("annotations", []))
        return
    for given in map(Path, args.input):
        if given.is_dir():
            suffixes = Image.registered_extensions()
            found = sorted(p for p in given.iterdir() if p.suffix.lower() in suffixes)
            if not found:
                raise UserError(f"--input {str(given)!r} is a folder without images")
            yield from map(GivenImage, found)
        elif given.is_file():
            yield GivenImage(given)
        else:
            raise UserError(f"--input {str(given)!r} is neither a file nor a folder")

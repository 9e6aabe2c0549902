"""Checks COCO-format data: the first problem as an error, or all of them as a report."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from detectron2.utils.logger import log_first_n
from tqdm import tqdm

from fpn_plugin.errors import UserError

from .exports import converted, name_in_folder
from .folder_json import label_problems, labels_of
from .image_files import image_problem
from .problems import CONVERT, KINDS, Contents, Problem, Report
from .reading import no_garbage_collection, read_json
from .records import coco_problems, declared_size, image_record
from .repairs import repair
from .requirements import BOXES, Needs

__all__ = ["CheckedCoco", "check_coco", "check_dataset", "convert_dataset", "read_coco"]


@dataclass(frozen=True)
class CheckedCoco:
    """A COCO JSON in which nothing is refused."""

    content: dict[str, Any]  # repaired
    repairs: list[Problem]  # what was repaired in it; then the file itself is not to be used
    classes: list[str]  # names of the categories by id, as Detectron2 numbers them
    digest: str  # of the file


def check_coco(json_file: str, images: str | None = None, *, needs: Needs = BOXES) -> list[str]:
    """Refuses a JSON that could not be trained on or evaluated as COCO instances.

    Args:
        json_file: path of the annotation file.
        images: folder in which each image must be; None does not look, and with "" file names may
            lead anywhere.
        needs: what the model needs of the data.

    Returns:
        Names of the categories in the order of their ids, as Detectron2 numbers them.

    Raises:
        UserError: names the file and the first record that is refused.
    """
    return read_coco(json_file, images, needs=needs).classes


def read_coco(
    json_file: str, images: str | None = None, *, needs: Needs = BOXES, files: bool = True
) -> CheckedCoco:
    """:func:`check_coco`, which repairs what it can first, and logs once what it repairs.

    ``files`` says whether each image must be there.
    """
    report = Report(10)
    content, changes, digest = read_json(json_file)
    given = labels_of(content) or f"{json_file} {images or 'IMAGES'}"
    all_problems = f"fpn-plugin check {given} lists all"
    for problem in _problems(json_file, content, changes, images, needs, report.contents):
        report.add(problem)
        if problem.refused:
            reason = f": {problem}" if problem.record else f" {problem}"
            raise UserError(f"{json_file}{reason} ({all_problems})")
    if images is not None and files:
        for record in content["images"]:
            path = os.path.join(images, record["file_name"])
            if not os.path.isfile(path):
                hint = _elsewhere(images, record["file_name"])
                raise UserError(f"{json_file}: image {record['id']!r}: no file {path!r}{hint}")
    for kind in report.kinds(refused=False):
        # All repairs are reported, and of other kinds the first record.
        shown = report.kept[kind][: None if kind == "filled_in" else 1]
        reason = f"{kind} ({report.counts[kind]}), {KINDS[kind].meaning}: "
        reason += f"{'; '.join(map(str, shown))} ({all_problems})"
        log_first_n(logging.WARNING, f"{json_file}: {reason}", key="message", name=__name__)
    categories = sorted(content["categories"], key=lambda category: category["id"])
    return CheckedCoco(content, changes, [category["name"] for category in categories], digest)


def _problems(
    json_file: str,
    content: Any,
    changes: list[Problem],
    images: str | None,
    needs: Needs,
    contents: Contents,
) -> Iterator[Problem]:
    """Repairs the content of a JSON: its repairs, which are added to ``changes``, and problems."""
    annotations = content.get("annotations") if isinstance(content, dict) else None
    total = len(annotations) if isinstance(annotations, list) else 0
    bar = tqdm(total=total, desc=Path(json_file).name, unit="annotation", delay=2)
    with bar, no_garbage_collection():
        yield from label_problems(content)
        changes += repair(content, images)
        yield from changes
        yield from coco_problems(
            content, bar.update, needs=needs, file_names=images != "", contents=contents
        )


def _elsewhere(images: str, name: str) -> str:
    """A hint for an image that is there under another name."""
    found = name_in_folder(images, name)
    return "" if found is None else f", but {found!r} is there: {CONVERT}"


def convert_dataset(
    json_file: str, images: str, output: str, *, no_crowds: bool = False
) -> list[str]:
    """Writes a JSON anew without the mistakes of annotation tools that are certain.

    Args:
        json_file: path of the annotation file.
        images: folder of its images.
        output: path of the new JSON.
        no_crowds: whether all annotations are single objects, as CVAT's brush means them.

    Returns:
        What was changed, a line for each kind of change.

    Raises:
        UserError: the JSON is not there or not JSON, or the new one cannot be written.
    """
    if os.path.realpath(output) == os.path.realpath(json_file):
        raise UserError(f"{output} is the JSON that is converted: name another file")
    content, changes, _ = read_json(json_file)
    changes += repair(content, images, converting=True)
    reason = [str(change).removesuffix(f": {CONVERT}") for change in changes]
    reason += converted(content, images, no_crowds=no_crowds)
    reason += [str(change) for change in repair(content, images)]  # ids that are free now
    try:
        Path(output).write_text(json.dumps(content), encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from error
    return reason


def check_dataset(
    json_file: str,
    images: str,
    *,
    look: str = "decode",
    keep: int | None = 3,
    needs: Needs = BOXES,
    threads: int = 4,
) -> Report:
    """Finds all that is wrong with COCO-format data.

    Args:
        json_file: path of the annotation file.
        images: folder of its images.
        look: "decode" to read all images; "headers" to read only their sizes and kinds, which does
            not find files that are cut off; or "none".
        keep: problems of a kind to keep; None for all.
        needs: what the model needs of the data.
        threads: images read at a time.

    Raises:
        UserError: the JSON is not there or not JSON, or there is no such folder.
    """
    if look != "none" and not Path(images).is_dir():
        raise UserError(f"no folder {images!r}")
    content, changes, _ = read_json(json_file)
    report = Report(keep)
    refused_names: set[str] = set()
    for problem in _problems(json_file, content, changes, images, needs, report.contents):
        report.add(problem)
        if problem.kind == "file_name":
            refused_names.add(problem.record)
    if look != "none" and isinstance(content, dict) and isinstance(content.get("images"), list):
        for problem in _image_file_problems(
            content["images"], images, look, threads, refused_names, needs.image_format
        ):
            report.add(problem)
    return report


def _image_file_problems(
    records: list[Any], images: str, look: str, threads: int, refused: set[str], image_format: str
) -> Iterator[Problem]:
    """What is wrong with image files; one whose name leads out of the folder is not opened."""

    def of(at: tuple[int, Any]) -> Problem | None:
        index, record = at
        name = record.get("file_name") if isinstance(record, dict) else None
        if type(name) is not str or image_record(index, record) in refused:
            return None
        path = Path(images, name)
        kind, reason = image_problem(
            path, declared_size(record), decode=look == "decode", image_format=image_format
        )
        if kind == "image_missing":
            reason += _elsewhere(images, name)
        record_name = f"{image_record(index, record)} {str(path)!r}"
        return Problem(kind, record_name, reason) if kind else None

    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(of, enumerate(records))
        try:
            for problem in tqdm(found, "images", len(records), unit="image", delay=2):
                if problem is not None:
                    yield problem
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise

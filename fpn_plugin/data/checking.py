"""Checking COCO-format data: the first problem as an error, or all of them as a report."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm

from fpn_plugin.errors import UserError

from .image_files import image_problem
from .needs import BOXES, Needs
from .problems import Problem, Report
from .records import coco_problems, declared_size, image_record

__all__ = ["check_coco", "check_dataset", "read_json"]


def read_json(json_file: str) -> Any:
    """What a JSON file holds.

    Raises:
        UserError: it is not there or not JSON.
    """
    try:
        with _no_garbage_collection():
            return json.loads(Path(json_file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {json_file}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{json_file} is not JSON: {error}") from error


def check_coco(
    json_file: str,
    images: str | None = None,
    *,
    needs: Needs = BOXES,
) -> list[str]:
    """Refuses a JSON that could not be trained on or evaluated as COCO instances.

    Args:
        json_file: path of the annotation file.
        images: folder of its images, each of which must be there then; None does not look. Of ""
            file names may lead anywhere.
        needs: what the model asks of the data.

    Returns:
        Names of the categories in the order of their ids, as Detectron2 numbers them.

    Raises:
        UserError: names the file and the first record that is refused.
    """
    content = read_json(json_file)
    within = images != ""
    with _bar(content, json_file) as bar, _no_garbage_collection():
        found = coco_problems(content, bar.update, needs=needs, file_names=within)
        for problem in found:
            if problem.refused:
                told = f": {problem}" if problem.record else f" {problem}"
                all_told = f"tools/check_dataset.py {json_file} {images or 'IMAGES'} tells all"
                raise UserError(f"{json_file}{told} ({all_told})")
    if images is not None:
        for record in content["images"]:
            path = os.path.join(images, record["file_name"])
            if not os.path.isfile(path):
                raise UserError(f"{json_file}: image {record['id']!r}: no file {path!r}")
    return [category["name"] for category in sorted(content["categories"], key=lambda c: c["id"])]


def check_dataset(
    json_file: str,
    images: str,
    *,
    look: str = "decode",
    keep: int | None = 3,
    needs: Needs = BOXES,
    threads: int = 4,
) -> Report:
    """Finds whatever is wrong with COCO-format data.

    Args:
        json_file: path of the annotation file.
        images: folder of its images.
        look: "decode" to read all images, "headers" to look at their headers, which tell sizes and
            kinds but not that a file is cut off, or "none".
        keep: problems of a kind to keep; None for all.
        needs: what the model asks of the data.
        threads: images read at a time.

    Raises:
        UserError: the JSON is not there or not JSON, or there is no such folder.
    """
    if look != "none" and not Path(images).is_dir():
        raise UserError(f"no folder {images!r}")
    content = read_json(json_file)
    report = Report(keep)
    refused_names: set[str] = set()
    with _bar(content, json_file) as bar, _no_garbage_collection():
        for problem in coco_problems(content, bar.update, needs=needs):
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
        kind, told = image_problem(
            path, declared_size(record), decode=look == "decode", image_format=image_format
        )
        record_name = f"{image_record(index, record)} {str(path)!r}"
        return Problem(kind, record_name, told) if kind else None

    with ThreadPoolExecutor(threads) as pool:
        found = pool.map(of, enumerate(records))
        try:
            for problem in tqdm(found, "images", len(records), unit="image", delay=2):
                if problem is not None:
                    yield problem
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _bar(content: Any, json_file: str) -> tqdm:
    annotations = content.get("annotations") if isinstance(content, dict) else None
    total = len(annotations) if isinstance(annotations, list) else 0
    return tqdm(total=total, desc=Path(json_file).name, unit="annotation", delay=2)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Within it, the collector does not walk over millions of records again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

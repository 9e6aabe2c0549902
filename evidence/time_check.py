"""``python -m evidence.time_check``: times the check of a COCO-format JSON of COCO's size."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from fpn_plugin.cli.common import ToolParser, at_least
from fpn_plugin.data import Needs, check_dataset
from fpn_plugin.engine import run_tool

__all__ = ["time_check_main", "write_big_dataset"]

_WIDTH, _HEIGHT = 640, 480
_POINTS = 20  # of a polygon; fewer than COCO's have on average


def write_big_dataset(folder: Path, images: int, per_image: int) -> Path:
    """Writes a COCO-format JSON without problems to a folder, and prints its size.

    Boxes are random, each with a polygon in it. They are written a part at a time, so that what is
    started after it is not measured with this process's memory.

    Args:
        folder: to write to.
        images: how many.
        per_image: annotations of each.
    """
    file = folder / "big.json"
    print("making the JSON", flush=True)
    rng = np.random.default_rng(0)
    with file.open("w") as stream:
        stream.write('{"images": [')
        for number in range(images):
            record = {"id": number, "file_name": f"{number:012d}.jpg"}
            _write_record(stream, number, {**record, "width": _WIDTH, "height": _HEIGHT})
        categories = [{"id": i, "name": f"category {i}"} for i in range(1, 81)]
        stream.write(f'], "categories": {json.dumps(categories)}, "annotations": [')
        for number, record in enumerate(_annotations(rng, images, per_image)):
            _write_record(stream, number, {"id": number + 1, **record})
        stream.write("]}")
    size = file.stat().st_size >> 20
    print(f"{images} images, {images * per_image} annotations, {size} MiB", flush=True)
    return file


def _write_record(stream: TextIO, number: int, record: dict[str, Any]) -> None:
    stream.write(("\n" if number == 0 else ",\n") + json.dumps(record))


def _annotations(rng: np.random.Generator, images: int, per_image: int) -> Iterator[dict[str, Any]]:
    for image in range(images):
        low = rng.uniform(0, [_WIDTH - 60, _HEIGHT - 60], (per_image, 2)).round(2)
        extent = rng.uniform(4, 60, (per_image, 2)).round(2)
        outlines = low[:, None] + rng.uniform(0, 1, (per_image, _POINTS, 2)) * extent[:, None]
        outlines = outlines.round(2).reshape(per_image, -1).tolist()
        categories = rng.integers(1, 81, per_image).tolist()
        rows = zip(low.tolist(), extent.tolist(), outlines, categories, strict=True)
        for corner, sides, outline, category in rows:
            yield {
                "image_id": image,
                "category_id": category,
                "bbox": [*corner, *sides],
                "area": sides[0] * sides[1],
                "iscrowd": 0,
                "segmentation": [outline],
            }


def time_check_main(argv: Sequence[str] | None = None) -> None:
    """Makes a JSON, checks it, and prints how long that took, reading included.

    Args:
        argv: arguments; those of the command line by default.
    """
    parser = ToolParser(description="Time the check of a large COCO JSON.")
    parser.add_argument("--images", type=at_least(1), default=100_000)
    parser.add_argument("--per-image", type=at_least(1), default=7, help="annotations of an image")
    parser.add_argument("--runs", type=at_least(1), default=3)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        file = write_big_dataset(Path(folder), args.images, args.per_image)
        for _ in range(args.runs):
            begun, busy = time.perf_counter(), time.process_time()
            report = check_dataset(str(file), folder, look="none", needs=Needs(masks="polygon"))
            wall, cpu = time.perf_counter() - begun, time.process_time() - busy
            print(f"{wall:.1f} s, of which {cpu:.1f} s on the CPU; problems: {report.counts}")


if __name__ == "__main__":
    run_tool(time_check_main)

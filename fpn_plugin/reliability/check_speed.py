"""What tools/time_check.py does: times the check of a COCO-format JSON of COCO's size."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fpn_plugin.arguments import at_least
from fpn_plugin.data import Needs, check_dataset

__all__ = ["big_dataset", "time_check_main", "write_big_dataset"]

_WIDTH, _HEIGHT = 640, 480
_POINTS = 20  # of a polygon; fewer than COCO's have on average


def big_dataset(images: int, per_image: int) -> dict[str, Any]:
    """A COCO-format dataset without problems: random boxes, each with a polygon in it."""
    rng = np.random.default_rng(0)
    count = images * per_image
    low = rng.uniform(0, [_WIDTH - 60, _HEIGHT - 60], (count, 2)).round(2)
    extent = rng.uniform(4, 60, (count, 2)).round(2)
    outlines = (low[:, None] + rng.uniform(0, 1, (count, _POINTS, 2)) * extent[:, None]).round(2)
    categories = rng.integers(1, 81, count).tolist()
    rows = zip(low.tolist(), extent.tolist(), outlines.reshape(count, -1).tolist(), strict=True)
    return {
        "images": [
            {"id": i, "file_name": f"{i:012d}.jpg", "width": _WIDTH, "height": _HEIGHT}
            for i in range(images)
        ],
        "categories": [{"id": i, "name": f"category {i}"} for i in range(1, 81)],
        "annotations": [
            {
                "id": i + 1,
                "image_id": i // per_image,
                "category_id": categories[i],
                "bbox": [*corner, *sides],
                "area": sides[0] * sides[1],
                "iscrowd": 0,
                "segmentation": [outline],
            }
            for i, (corner, sides, outline) in enumerate(rows)
        ],
    }


def write_big_dataset(folder: Path, images: int, per_image: int) -> Path:
    """Writes a :func:`big_dataset` to a folder, and prints its size."""
    file = folder / "big.json"
    print("making the JSON", flush=True)
    file.write_text(json.dumps(big_dataset(images, per_image)))
    size = file.stat().st_size >> 20
    print(f"{images} images, {images * per_image} annotations, {size} MiB", flush=True)
    return file


def time_check_main(argv: Sequence[str] | None = None) -> None:
    """Makes a JSON, checks it, and prints how long that took, reading included.

    Args:
        argv: arguments; those of the command line by default.
    """
    parser = argparse.ArgumentParser(description="Time the check of a large COCO JSON.")
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

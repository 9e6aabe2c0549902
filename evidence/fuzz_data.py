"""``python -m evidence.fuzz_data``: corrupts datasets at random and judges what the plugin does.

A corrupt dataset is refused in one line that names the record, or it loads right; and the check
predicts which.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import load_coco_json
from detectron2.utils.logger import setup_logger
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tqdm import tqdm

from fpn_plugin import model_zoo
from fpn_plugin.cli.common import ToolParser, at_least
from fpn_plugin.data import Needs, ReadableImageMapper, check_dataset
from fpn_plugin.data.dataset_check import read_coco
from fpn_plugin.data.problems import Report
from fpn_plugin.engine import run_tool
from fpn_plugin.errors import UserError

from .corruptions import CORRUPTIONS, CorruptDataset, make_dataset

__all__ = ["fuzz_main", "judge", "load_records", "make_mapper"]

_SIZES = (32, 64)  # shortest and longest side of mapped images
_COLOUR_TOLERANCE = 3  # of JPEG's and of Pillow's integer arithmetic
_PIXELS = 1e-3
_LEAST_EXTENT = 1e-3  # that check_dataset says is trained on
_SAID_OF_IMAGES = ("image_unreadable", "image_other_size", "image_depth")


def make_mapper() -> ReadableImageMapper:
    """A training's mapper, for small images and without flips."""
    cfg = model_zoo.get_config("mini/faster_rcnn_R_18_FPN.yaml")
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (_SIZES[0],), _SIZES[1]
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.INPUT.FORMAT = "RGB"
    return ReadableImageMapper(cfg, is_train=True)


def judge(made: CorruptDataset, mapper: ReadableImageMapper) -> str:
    """Judges what the plugin does with a dataset.

    Args:
        made: the dataset; this writes its JSON.
        mapper: of :func:`make_mapper`.

    Returns:
        "refused before training", "refused at an image" or "loads".

    Raises:
        AssertionError: it does neither, or not what the check predicts. Other errors likewise.
    """
    made.write()
    needs = Needs(max_size=_SIZES[1])
    report = check_dataset(made.json_file, made.images, keep=None, needs=needs, threads=1)
    of_images = {kind for kind in report.counts if kind in _SAID_OF_IMAGES}
    before = set(report.kinds(refused=True)) - of_images
    try:
        coco = read_coco(made.json_file, made.images, needs=needs)
    except UserError as error:
        _expect(before, f"refused, but the report finds nothing: {error}")
        _expect_one_line(str(error), made.json_file)
        named = [p.record for kind in before for p in report.kept[kind]]
        message = str(error)
        found = any(not record or record.split(" '")[0] in message for record in named)
        _expect(found or "no file" in message, f"names none of {named[:3]}: {message}")
        return "refused before training"
    _expect(not before, f"accepted, but the report finds {before}")
    # Training and evaluation get data with the missing parts filled in.
    mended = CorruptDataset(made.folder / "mended", coco.content, made.colours)
    mended.folder.mkdir(exist_ok=True)
    mended.write()
    with contextlib.redirect_stdout(io.StringIO()):
        records = load_records(mended, made.images)
        _evaluate_itself(mended)
    images = {image["id"]: image for image in mended.content["images"]}
    _expect([r["image_id"] for r in records] == sorted(images), "images are lost")
    outcome, trained_on = "loads", 0
    for record in records:
        image = images[record["image_id"]]
        unusable = _is_named(report, image)
        try:
            mapped = mapper(record)
        except UserError as error:
            _expect(unusable, f"the check has not found it: {error}")
            _expect_one_line(str(error), repr(record["file_name"]))
            outcome = "refused at an image"
        else:
            _expect(not unusable, f"the check refuses {record['file_name']!r}, which is mapped")
            _expect_right(mended, image, mapped)
            trained_on += len(mapped["instances"])
    said = report.contents.trained_on
    _expect(outcome != "loads" or trained_on == said, f"{trained_on} trained on, not {said}")
    return outcome


def load_records(made: CorruptDataset, images: str = "") -> list[dict[str, Any]]:
    """Detectron2's records of a dataset, categories numbered.

    Args:
        made: the dataset.
        images: folder of its images, if it is not its own.
    """
    name = "fpn_plugin_corrupt"
    try:
        return load_coco_json(made.json_file, images or made.images, name)
    finally:
        MetadataCatalog.pop(name, None)


def _expect(condition: object, otherwise: str) -> None:
    if not condition:
        raise AssertionError(otherwise)


def _expect_one_line(message: str, name: str) -> None:
    _expect("\n" not in message, f"more than one line: {message}")
    _expect(name in message, f"does not name {name}: {message}")


def _is_named(report: Report, image: dict[str, Any]) -> bool:
    kept = [problem for kind in _SAID_OF_IMAGES for problem in report.kept.get(kind, [])]
    return any(f"(id {image['id']!r})" in problem.record for problem in kept)


def _evaluate_itself(made: CorruptDataset) -> None:
    """COCO's evaluation of the annotations as if a model had found them."""
    truth = COCO(made.json_file)
    keys = ("image_id", "category_id", "bbox")
    found = [{**{key: a[key] for key in keys}, "score": 0.9} for a in truth.anns.values()]
    evaluation = COCOeval(truth, truth.loadRes(found), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()


def _expect_right(made: CorruptDataset, image: dict[str, Any], mapped: dict[str, Any]) -> None:
    """Compares pixels, boxes and classes with those that the JSON and the colour call for."""
    width, height = image["width"], image["height"]
    shown = mapped["image"].numpy()
    scale = min(_SIZES[0] / min(width, height), _SIZES[1] / max(width, height))
    across, down = shown.shape[2], shown.shape[1]
    right_size = abs(across - width * scale) <= 1 and abs(down - height * scale) <= 1
    _expect(right_size, f"{width} x {height} is mapped to {across} x {down}")
    colour = made.colours.get(image["file_name"])
    if colour is not None:
        off = np.abs(shown.astype(int) - np.array(colour).reshape(3, 1, 1)).max()
        _expect(off <= _COLOUR_TOLERANCE, f"{image['file_name']!r} is off its colour by {off}")
    order = sorted(category["id"] for category in made.content["categories"])
    expected = []
    for annotation in made.content["annotations"]:
        mask = annotation.get("segmentation")
        if annotation["image_id"] != image["id"] or annotation["iscrowd"]:
            continue
        polygons = mask if isinstance(mask, list) else []
        if polygons and not any(len(p) >= 6 and len(p) % 2 == 0 for p in polygons):
            continue  # Detectron2 leaves these out; check_dataset warns of them
        x, y, box_width, box_height = annotation["bbox"]
        corners = np.array([x, y, x + box_width, y + box_height], float)
        corners = np.clip(corners, 0, [width, height] * 2)
        if (corners[2:] - corners[:2] >= _LEAST_EXTENT).all():
            corners *= [across / width, down / height] * 2
            expected.append((*corners, order.index(annotation["category_id"])))
    given = mapped["instances"]
    rows = np.column_stack([given.gt_boxes.tensor.numpy(), given.gt_classes.numpy()])
    expected_rows = np.array(expected, float).reshape(-1, 5)
    same = rows.shape == expected_rows.shape and np.allclose(rows, expected_rows, atol=_PIXELS)
    _expect(same, f"boxes are {rows.tolist()}, expected {expected_rows.tolist()}")


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    parser = ToolParser(
        description="Corrupt datasets at random: each must load right or be refused by name."
    )
    parser.add_argument("--cases", type=at_least(1), default=2000, help="datasets to corrupt")
    parser.add_argument(
        "--seed",
        type=at_least(0),
        default=0,
        help="of the first dataset; the next has the next seed",
    )
    return parser


def fuzz_main(argv: Sequence[str] | None = None) -> None:
    """Prints how the datasets were handled; exits with status 1 if one was handled wrong.

    Args:
        argv: arguments; those of the command line by default.
    """
    args = argument_parser().parse_args(argv)
    setup_logger(name="detectron2").setLevel("ERROR")
    mapper, outcomes, failures = make_mapper(), Counter(), []
    names = list(CORRUPTIONS)
    for seed in tqdm(range(args.seed, args.seed + args.cases), "corrupt datasets", unit="case"):
        rng = np.random.default_rng(seed)
        with tempfile.TemporaryDirectory() as folder:
            made = make_dataset(Path(folder, "data"), rng)
            # Each corruption comes first in turn; up to two more follow.
            chosen = [names[seed % len(names)], *rng.choice(names, int(rng.integers(3)))]
            try:
                for name in chosen:
                    CORRUPTIONS[name](made, rng)
                outcomes[judge(made, mapper)] += 1
            except Exception as error:
                failures.append(f"seed {seed} ({', '.join(chosen)}): {error!r}")
    print(f"{args.cases} datasets corrupted in {len(names)} ways and their combinations")
    for outcome, count in sorted(outcomes.items()):
        print(f"{count:6} {outcome}")
    print(f"{len(failures):6} neither, or not what the check predicts")
    print(*failures[:20], sep="\n")
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    run_tool(fuzz_main)

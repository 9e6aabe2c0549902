"""Find what is wrong with a dataset before a model is trained on it.

Examples:
  fpn-plugin check cells/train.json cells/images
  fpn-plugin check cells_yolo:train
  fpn-plugin check coco_2017_val --images headers
  fpn-plugin check cells/train.json cells/images --json problems.json --examples 10
  fpn-plugin check cells/export.json cells/images --convert cells/train.json

Exit status: 0 if nothing is refused, 1 if something is, 2 if a file cannot be found.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from fpn_plugin.data.coco import check_datasets, given_json, near_datasets, register_datasets
from fpn_plugin.data.dataset_check import check_dataset, convert_dataset
from fpn_plugin.data.folder_json import folder_json
from fpn_plugin.data.label_folders import folder_and_split
from fpn_plugin.data.pictures import IMAGE_FORMATS
from fpn_plugin.data.requirements import Needs
from fpn_plugin.errors import UserError
from fpn_plugin.mini.dataset import MINI_NAMES, ensure_mini

from .common import Arguments, ToolParser, at_least, command_parser, output_file

__all__ = ["check_files", "check_main"]


def _parser() -> ToolParser:
    parser = command_parser("check", __doc__)
    add = parser.add_argument
    add(
        "dataset",
        help="a COCO JSON, NAME=JSON:IMAGES, a folder of VOC, YOLO or LabelMe labels (FOLDER or "
        "FOLDER:SPLIT), or the name of a registered dataset",
    )
    add("folder", nargs="?", help="image folder; a registered dataset has its own")
    add(
        "--images",
        choices=("decode", "headers", "none"),
        default="decode",
        help="what is read of images; decode: all of each, the only way to find cut-off files "
        "(default); headers: sizes and kinds; none: nothing",
    )
    add("--examples", type=at_least(0), default=3, help="records to show of each kind of problem")
    add("--json", type=output_file(), metavar="FILE", help="write all problems to this JSON")
    add(
        "--convert",
        type=output_file(),
        metavar="FILE",
        help="write a repaired JSON, and check that one. Missing values are filled in. Boxes in "
        "fractions, corners or centres become x, y, width, height in pixels. Roboflow's root "
        "category and duplicate records are left out. File names become those in the folder",
    )
    add(
        "--no-crowds",
        action="store_true",
        help="with --convert: set iscrowd to 0 everywhere, for CVAT's brush, which writes 1",
    )
    add("--max-size", type=at_least(1), default=1333, help="the model's INPUT.MAX_SIZE_TRAIN")
    masks = ("polygon", "bitmask")
    add("--masks", choices=masks, default="", help="INPUT.MASK_FORMAT of a model with masks")
    add("--keypoints", type=at_least(0), default=0, help="keypoints of an object, if the model has")
    add("--format", choices=IMAGE_FORMATS, default="BGR", help="the model's INPUT.FORMAT")
    add("--test", action="store_true", help="data to evaluate on, which may have no annotations")
    threads = min(os.cpu_count() or 1, 16)
    add("--threads", type=at_least(1, 1024), default=threads, help="images to read at a time")
    return parser


def check_main(argv: Arguments = None) -> None:
    """Prints what is wrong with a dataset. Exits with status 1 if training would refuse it."""
    if check_files(argv)["refused"]:
        sys.exit(1)


def check_files(argv: Arguments = None) -> dict[str, Any]:
    """Prints what is wrong with a dataset, and returns it as :meth:`Report.as_json` does."""
    args = _parser().parse_args(argv)
    json_file, folder = _files(args.dataset, args.folder)
    if args.no_crowds and not args.convert:
        raise UserError("--no-crowds is for --convert FILE: it writes other annotations")
    if args.convert:
        changes = convert_dataset(json_file, folder, args.convert, no_crowds=args.no_crowds)
        print(*(f"converted: {change}" for change in changes or ["nothing"]), sep="\n")
        json_file = args.convert
    print(f"checking {json_file}", flush=True)
    report = check_dataset(
        json_file,
        folder,
        look=args.images,
        keep=None if args.json else args.examples,
        needs=Needs(
            args.max_size, args.masks, args.keypoints, not args.test, image_format=args.format
        ),
        threads=args.threads,
    )
    if report.counts:
        print(report.text(args.examples))
    content, read = report.as_json(), report.contents
    classes = "1 class" if read.classes == 1 else f"{read.classes} classes"
    summary = f"{read.images} images, {read.boxes} boxes and {classes} were read"
    if not args.test and not content["refused"]:
        summary += f"; {read.trained_on} boxes are trained on"
    print(f"{summary}\n{content['refused']} refused, {content['warnings']} warnings")
    if args.images != "decode":
        print("images were not read to their ends: cut-off files are not found")
    if args.json:
        try:
            Path(args.json).write_text(json.dumps(content, indent=1), encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write {args.json}: {error.strerror}") from error
    return content


def _files(dataset: str, folder: str | None) -> tuple[str, str]:
    """JSON and image folder."""
    if folder is not None:
        return dataset, folder
    if "=" in dataset and not Path(dataset).exists():
        register_datasets([dataset], checked=True)
        dataset = dataset.partition("=")[0]
    if Path(dataset).is_file():
        raise UserError(f"{dataset} is a JSON: give its image folder too")
    labels = folder_and_split(dataset)
    if labels is not None:
        return folder_json(*labels), labels[0]
    if dataset not in DatasetCatalog.list():
        near = near_datasets(dataset) or "give a COCO JSON, then its image folder"
        raise UserError(
            f"{dataset!r} is neither a file, a folder of labels nor a registered dataset: {near}"
        )
    if dataset in MINI_NAMES:
        ensure_mini()
    check_datasets([dataset], "the command line")
    metadata = MetadataCatalog.get(dataset)
    if metadata.get("json_file") is None or metadata.get("image_root") is None:
        raise UserError(f"dataset {dataset!r} is not in COCO format: it has no JSON and folder")
    return given_json(dataset), metadata.image_root

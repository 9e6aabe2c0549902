"""What tools/demo.py does: images in, pictures with boxes and a JSON of detections out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode, Instances
from tqdm import tqdm

from fpn_plugin.data import read_picture, register_datasets, rgb_of
from fpn_plugin.engine.inference import Detector, class_names, keypoint_layout
from fpn_plugin.engine.settings import load_config, settle_device
from fpn_plugin.errors import UserError
from fpn_plugin.visualization import DrawnBox, KeypointLayout, draw_detections

from .common import ToolParser, between, output_folder
from .images import add_input_arguments, given_images
from .optimize_arguments import add_optimize_argument, optimize_dtype, print_steps

__all__ = ["argument_parser", "demo_main"]

_EXAMPLES = """
Examples:
  demo.py --config-file output/demo/config.yaml --input photos/ --output pictures/ \\
      MODEL.WEIGHTS output/demo/model_final.pth
  demo.py --config-file output/demo/config.yaml --ground-truth mini_val --max-images 12 \\
      MODEL.WEIGHTS output/demo/model_final.pth
"""


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of tools/demo.py."""
    parser = ToolParser(
        description="Draw detections, each box tinted by the pyramid level it was pooled from.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--config-file", required=True, help="path of a config, or packaged name")
    add_input_arguments(parser)
    parser.add_argument(
        "--output", type=output_folder, default="output/pictures", help="folder to write to"
    )
    parser.add_argument(
        "--threshold",
        type=between(0, 1),
        default=0.5,
        help="least score to draw; the JSON has all",
    )
    add_optimize_argument(parser)
    parser.add_argument("--dataset", action="append", default=[], metavar="NAME=JSON:IMAGES")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def demo_main(argv: Sequence[str] | None = None) -> None:
    """Writes a picture for each image and detections.json.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: something given cannot be used. An image that cannot be read among others that
            can is reported at the end.
    """
    args = argument_parser().parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    settle_device(cfg, "MODEL.DEVICE" in args.opts[::2])
    register_datasets(args.dataset)
    jobs = given_images(args)
    originals = {job.path.resolve() for job in jobs}
    names, layout = class_names(cfg), keypoint_layout(cfg)
    # The dataset was loaded for its images, and told its categories.
    truth_names = names
    if args.ground_truth:
        truth_names = MetadataCatalog.get(args.ground_truth).get("thing_classes", names)
    detector = Detector(cfg, optimize_dtype(args))
    print_steps(detector.model)
    if not names:
        print(
            "category names are not known: --dataset NAME=JSON:IMAGES of DATASETS.TEST tells them"
        )
    output = Path(args.output)
    records, unreadable = [], []
    for job in tqdm(jobs, desc="detecting", unit="image"):
        try:
            image = read_picture(cfg, job.path)
        except UserError as error:
            unreadable.append(str(error))
            continue
        found = detector(image)
        detections = _describe(found, names, layout)
        picture = _free_name(job.path.stem, {record["picture"] for record in records})
        if (output / picture).resolve() in originals:
            raise UserError(
                f"--output {args.output!r} would write over the image {str(output / picture)!r}"
            )
        truth = None if job.annotations is None else _drawn_truth(job.annotations, truth_names)
        drawn = [_drawn(d) for d in detections if d["score"] >= args.threshold]
        draw_detections(rgb_of(cfg, image), drawn, output / picture, truth, layout)
        records.append(
            {
                "file": str(job.path),
                "picture": picture,
                "width": image.shape[1],
                "height": image.shape[0],
                "detections": detections,
            }
        )
    output.mkdir(parents=True, exist_ok=True)
    (output / "detections.json").write_text(json.dumps(records, indent=1))
    print(f"{len(records)} pictures and detections.json in {output}")
    if unreadable:
        raise UserError(f"{len(unreadable)} of {len(jobs)} images left out: {unreadable[0]}")


def _class_name(index: int, names: Sequence[str]) -> str:
    return names[index] if index < len(names) else f"class {index}"


def _describe(
    found: Instances, names: Sequence[str], layout: KeypointLayout
) -> list[dict[str, Any]]:
    """Detections as JSON has them, best first; boxes XYWH in pixels, as COCO's."""
    points = found.pred_keypoints.tolist() if found.has("pred_keypoints") else [None] * len(found)
    levels = found.pyramid_level.tolist() if found.has("pyramid_level") else [None] * len(found)
    rows = zip(
        found.pred_boxes.tensor.tolist(),
        found.scores.tolist(),
        found.pred_classes.tolist(),
        levels,
        points,
        strict=True,
    )
    return [
        {
            "category": _class_name(index, names),
            "class": index,
            "score": round(score, 5),
            "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
            "level": level,
            **({} if keypoints is None else {"keypoints": _named_keypoints(keypoints, layout)}),
        }
        for (x0, y0, x1, y1), score, index, level, keypoints in rows
    ]


def _named_keypoints(
    points: Sequence[Sequence[float]], layout: KeypointLayout
) -> list[dict[str, Any]]:
    return [
        {"name": layout.name(index), "x": round(x, 2), "y": round(y, 2), "score": round(score, 5)}
        for index, (x, y, score) in enumerate(points)
    ]


def _drawn(detection: dict[str, Any]) -> DrawnBox:
    x, y, width, height = detection["bbox"]
    text = f"{detection['category']} {detection['score']:.2f}"
    points = tuple((point["x"], point["y"]) for point in detection.get("keypoints", ()))
    return DrawnBox((x, y, x + width, y + height), text, detection["level"], points)


def _drawn_truth(annotations: Sequence[dict[str, Any]], names: Sequence[str]) -> list[DrawnBox]:
    drawn = []
    for annotation in annotations:
        box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        triples = np.asarray(annotation.get("keypoints") or (), float).reshape(-1, 3).tolist()
        points = tuple((x, y) if visible else None for x, y, visible in triples)
        name = _class_name(annotation["category_id"], names)
        drawn.append(DrawnBox(tuple(box), name, keypoints=points))
    return drawn


def _free_name(stem: str, taken: set[str]) -> str:
    """A file name for a picture; images of one name in several folders get numbers."""
    number, name = 1, f"{stem}.png"
    while name in taken:
        number += 1
        name = f"{stem}-{number}.png"
    return name

"""Pictures and a JSON of a detector's detections on images."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.structures import BoxMode, Instances
from tqdm import tqdm

from fpn_plugin.data import read_picture, rgb_of
from fpn_plugin.data.given_images import GivenImage, free_name
from fpn_plugin.errors import UserError
from fpn_plugin.visualization import DrawnBox, KeypointLayout, draw_detections

from .inference import Detector, class_names, keypoint_layout

__all__ = ["detect_images"]


def detect_images(
    detector: Detector,
    cfg: CfgNode,
    images: Sequence[GivenImage],
    output: Path,
    threshold: float,
    truth_names: Sequence[str] = (),
) -> list[str]:
    """Writes a picture for each image, and detections.json.

    Args:
        detector: the config's.
        cfg: the config.
        images: if one has annotations, its picture shows them next to the detections.
        output: folder to write to.
        threshold: least score to draw; the JSON has all detections.
        truth_names: categories of the annotations; by default those of the model.

    Returns:
        A message for each image that cannot be read. The others are written.

    Raises:
        UserError: a picture would be written over an image.
    """
    originals = {image.path.resolve() for image in images}
    names, layout = class_names(cfg), keypoint_layout(cfg)
    records, unreadable = [], []
    taken: set[str] = set()
    for given in tqdm(images, desc="detecting", unit="image"):
        try:
            image = read_picture(cfg, given.path)
        except UserError as error:
            unreadable.append(str(error))
            continue
        detections = _describe(detector(image), names, layout)
        picture = f"{free_name(given.path.stem, taken)}.png"
        if (output / picture).resolve() in originals:
            raise UserError(
                f"--output {str(output)!r} would write over the image {str(output / picture)!r}"
            )
        truth = None
        if given.annotations is not None:
            truth = _drawn_truth(given.annotations, truth_names or names)
        drawn = [_drawn(d) for d in detections if d["score"] >= threshold]
        draw_detections(rgb_of(cfg, image), drawn, output / picture, truth, layout)
        height, width = image.shape[:2]
        record = {"file": str(given.path), "picture": picture, "width": width, "height": height}
        records.append({**record, "detections": detections})
    output.mkdir(parents=True, exist_ok=True)
    (output / "detections.json").write_text(json.dumps(records, indent=1))
    return unreadable


def _class_name(index: int, names: Sequence[str]) -> str:
    return names[index] if index < len(names) else f"class {index}"


def _describe(
    found: Instances, names: Sequence[str], layout: KeypointLayout
) -> list[dict[str, Any]]:
    """Detections for the JSON, best first; boxes XYWH in pixels, as COCO's."""
    fields = found.get_fields()
    levels = fields["pyramid_level"].tolist() if "pyramid_level" in fields else [None] * len(found)
    boxes, scores = found.pred_boxes.tensor.tolist(), found.scores.tolist()
    described: list[dict[str, Any]] = [
        {
            "category": _class_name(index, names),
            "class": index,
            "score": round(score, 5),
            "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
            "level": level,
        }
        for (x0, y0, x1, y1), score, index, level in zip(
            boxes, scores, found.pred_classes.tolist(), levels, strict=True
        )
    ]
    for detection, points in zip(described, fields.get("pred_keypoints", ()), strict=False):
        detection["keypoints"] = [
            {"name": layout.name(k), "x": round(x, 2), "y": round(y, 2), "score": round(score, 5)}
            for k, (x, y, score) in enumerate(points.tolist())
        ]
    return described


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

"""Pictures and a JSON of a detector's detections on images."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from detectron2.config import CfgNode
from detectron2.structures import BoxMode
from tqdm import tqdm

from fpn_plugin.data import read_picture, rgb_of
from fpn_plugin.data.given_images import GivenImage, free_name
from fpn_plugin.errors import UserError
from fpn_plugin.visualization import DrawnBox
from fpn_plugin.visualization.palette import category_colors

from .inference import Detections, Detector, class_name, class_names, keypoint_layout
from .run_datasets import class_colors

__all__ = ["detect_images"]


def detect_images(
    detector: Detector,
    cfg: CfgNode,
    images: Sequence[GivenImage],
    output: Path,
    threshold: float,
    truth_names: Sequence[str] = (),
    color_by: Literal["level", "class"] = "level",
) -> list[str]:
    """Writes a picture for each image, and detections.json.

    Args:
        detector: made from the config.
        cfg: the config.
        images: if one has annotations, its picture shows them next to the detections.
        output: folder to write to.
        threshold: least score to draw; the JSON has all detections.
        truth_names: categories of the annotations; by default those of the model.
        color_by: what the colour of a box stands for.

    Returns:
        A message for each image that cannot be read. The others are written.

    Raises:
        UserError: a picture would be written over an image.
    """
    originals = {image.path.resolve() for image in images}
    names, layout = class_names(cfg), keypoint_layout(cfg)
    own = class_colors(Path(cfg.MODEL.WEIGHTS).parent)
    colors = category_colors(names, own)
    truth_colors = {**own, **dict(zip(names, colors, strict=True))} if color_by == "class" else {}
    records, unreadable = [], []
    taken: set[str] = set()
    for given in tqdm(images, desc="detecting", unit="image"):
        try:
            image = read_picture(cfg, given.path)
        except UserError as error:
            unreadable.append(str(error))
            continue
        found = Detections(rgb_of(cfg, image), detector(image), names, layout, colors=colors)
        picture = f"{free_name(given.path.stem, taken)}.png"
        if (output / picture).resolve() in originals:
            raise UserError(
                f"--output {str(output)!r} would write over the image {str(output / picture)!r}"
            )
        truth = None
        if given.annotations is not None:
            truth = _drawn_truth(given.annotations, truth_names or names, truth_colors)
        found.draw(output / picture, threshold, truth, color_by)
        height, width = image.shape[:2]
        record = {"file": str(given.path), "picture": picture, "width": width, "height": height}
        records.append({**record, "detections": found.records()})
    output.mkdir(parents=True, exist_ok=True)
    (output / "detections.json").write_text(json.dumps(records, indent=1))
    return unreadable


def _drawn_truth(
    annotations: Sequence[dict[str, Any]], names: Sequence[str], colors: Mapping[str, str]
) -> list[DrawnBox]:
    drawn = []
    for annotation in annotations:
        box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
        triples = np.asarray(annotation.get("keypoints") or (), float).reshape(-1, 3).tolist()
        points = tuple((x, y) if visible else None for x, y, visible in triples)
        name = class_name(annotation["category_id"], names)
        drawn.append(DrawnBox(tuple(box), name, None, points, colors.get(name)))
    return drawn

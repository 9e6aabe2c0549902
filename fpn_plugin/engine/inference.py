"""Inference with a trained detector, and the pyramid level each detection is pooled from."""

from __future__ import annotations

import copy
import io
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.modeling import build_model
from detectron2.structures import Instances
from PIL import Image
from torch import nn

from fpn_plugin.data import (
    channels_first,
    class_order,
    describe_keypoints,
    read_picture,
    resized_picture,
    rgb_of,
)
from fpn_plugin.data.reading import read_json
from fpn_plugin.deploy import optimize_for_inference
from fpn_plugin.errors import UserError
from fpn_plugin.inspection.forward_trace import recorded_levels
from fpn_plugin.modeling import without_network_weights
from fpn_plugin.utils.weight_files import classes_in
from fpn_plugin.visualization import DrawnBox, KeypointLayout, draw_detections
from fpn_plugin.visualization.palette import CATEGORY_COLORS, category_colors

from .build_errors import explained_build_errors
from .checkpoint import StrictCheckpointer
from .run_datasets import class_colors, run_datasets
from .settings import config_on_device

__all__ = ["Detections", "Detector", "class_name", "class_names", "keypoint_layout"]

logger = logging.getLogger(__name__)

_WEIGHTS = ("model_best.pth", "model_final.pth")


@dataclass(frozen=True, eq=False, repr=False)
class Detections:
    """What a detector finds in an image, best first. Jupyter shows it as a picture.

    Attributes:
        image: uint8 RGB ``(H, W, 3)``.
        instances: Detectron2's, on the CPU, with ``pyramid_level`` if the model gives it.
        names: of the model's classes; empty if unknown.
        layout: names and skeleton of keypoints.
        category_ids: gives the id of each class in the data's JSON; None if unknown.
        colors: of the classes, "#RRGGBB"; empty for those of the palette.
    """

    image: np.ndarray
    instances: Instances
    names: Sequence[str]
    layout: KeypointLayout
    category_ids: Callable[[], Sequence[int] | None] = lambda: None
    colors: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.instances)

    @property
    def boxes(self) -> np.ndarray:
        """float32 ``(N, 4)``, XYXY in pixels of the image."""
        return self.instances.pred_boxes.tensor.numpy()

    @property
    def scores(self) -> np.ndarray:
        """float32 ``(N,)``, from 0 to 1."""
        return self.instances.scores.numpy()

    @property
    def classes(self) -> np.ndarray:
        """int64 ``(N,)``, numbers of the classes from 0."""
        return self.instances.pred_classes.numpy()

    @property
    def class_names(self) -> np.ndarray:
        """``(N,)`` text; "class 3" for a class whose name is unknown."""
        return np.array([class_name(index, self.names) for index in self.classes], dtype=str)

    @property
    def levels(self) -> np.ndarray | None:
        """int64 ``(N,)``, the pyramid level that each is pooled from, 2 for P2.

        None for models whose detections have no level: cascades, RetinaNet, models of one level.
        """
        return self._field("pyramid_level")

    @property
    def masks(self) -> np.ndarray | None:
        """Of bool, ``(N, H, W)``; None for a model without masks."""
        return self._field("pred_masks")

    @property
    def keypoints(self) -> np.ndarray | None:
        """float32 ``(N, K, 3)``: x, y and score of each; None for a model without keypoints."""
        return self._field("pred_keypoints")

    def _field(self, name: str) -> np.ndarray | None:
        return self.instances.get(name).numpy() if self.instances.has(name) else None

    def to_coco(self, image_id: int = 0) -> list[dict[str, Any]]:
        """The detections as COCO's results, by Detectron2's function for them.

        Args:
            image_id: of the image in its JSON.

        Returns:
            Dicts with ``image_id``, ``category_id``, ``bbox`` (XYWH in pixels) and ``score``. Masks
            are added as ``segmentation`` (run-length encoded), and ``keypoints``. ``category_id``
            is that of the training's JSON. If it is unknown it is the number of the class, and a
            warning says so.
        """
        results = instances_to_coco_json(copy.deepcopy(self.instances), image_id)  # it changes them
        ids = self.category_ids() if results else ()
        if ids is None:
            logger.warning("ids of categories are unknown: category_id is the class's number")
            return results
        return [{**each, "category_id": ids[each["category_id"]]} for each in results]

    def draw(
        self,
        path: str | Path | IO[bytes],
        threshold: float = 0.5,
        ground_truth: Sequence[DrawnBox] | None = None,
        color_by: Literal["level", "class"] = "level",
    ) -> None:
        """Writes a picture of the detections; see :func:`draw_detections`.

        Args:
            path: the file to write, whose suffix sets the format, or a stream for a PNG.
            threshold: least score to draw.
            ground_truth: labelled boxes to draw next to them.
            color_by: what the colour of a box stands for.

        Raises:
            UserError: color_by is something else.
        """
        if color_by not in ("level", "class"):
            raise UserError(f"color_by is {color_by!r}, expected 'level' or 'class'")
        drawn = [
            self._drawn(each, color_by) for each in self.records() if each["score"] >= threshold
        ]
        path = Path(path) if isinstance(path, str) else path
        draw_detections(self.image, drawn, path, ground_truth, self.layout)

    def records(self) -> list[dict[str, Any]]:
        """The detections as ``fpn-plugin detect`` writes them; boxes XYWH in pixels, as COCO's."""
        levels = [None] * len(self) if self.levels is None else self.levels.tolist()
        described: list[dict[str, Any]] = [
            {
                "category": class_name(index, self.names),
                "class": index,
                "score": round(score, 5),
                "bbox": [round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
                "level": level,
            }
            for (x0, y0, x1, y1), score, index, level in zip(
                self.boxes.tolist(),
                self.scores.tolist(),
                self.classes.tolist(),
                levels,
                strict=True,
            )
        ]
        if self.keypoints is not None:
            for detection, points in zip(described, self.keypoints.tolist(), strict=True):
                detection["keypoints"] = [
                    {
                        "name": self.layout.name(k),
                        "x": round(x, 2),
                        "y": round(y, 2),
                        "score": round(score, 5),
                    }
                    for k, (x, y, score) in enumerate(points)
                ]
        return described

    def _drawn(self, detection: dict[str, Any], color_by: str) -> DrawnBox:
        x, y, width, height = detection["bbox"]
        text = f"{detection['category']} {detection['score']:.2f}"
        points = tuple((point["x"], point["y"]) for point in detection.get("keypoints", ()))
        color = None
        if color_by == "class":
            colors = self.colors or CATEGORY_COLORS
            color = colors[detection["class"] % len(colors)]
        return DrawnBox((x, y, x + width, y + height), text, detection["level"], points, color)

    def __repr__(self) -> str:
        found = Counter(self.class_names.tolist())
        return f"Detections({', '.join(f'{count} {name}' for name, count in found.items())})"

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.draw(picture)
        return picture.getvalue()


class Detector:
    """A trained detector on one image at a time.

    With the folder of a run it gives :class:`Detections`::

        detector = Detector("output/run")
        found = detector("photo.jpg")

    With a config it takes the place of Detectron2's DefaultPredictor. It takes the same image and
    resizes it in the same way. It differs in this:

    * It returns the ``Instances``, on the CPU, not a dict that holds them. It leaves out a panoptic
      model's segmentation, and refuses a model that gives only proposals.
    * Detections of R-CNN models have ``pyramid_level``.
    * It refuses weights that lack a parameter of the model.
    * INPUT.FORMAT may also be L or RGBA.

    Args:
        cfg: the OUTPUT_DIR of a training, with config.yaml and model_best.pth, model_final.pth or
            the checkpoint that last_checkpoint names, the first that is there; or a config, whose
            MODEL.WEIGHTS must give every parameter of its model.
        optimize: run :func:`fpn_plugin.optimize_for_inference`'s copy, of this dtype.

    Raises:
        UserError: the folder is not that of a run, or the weights do not exist or do not fit the
            model.
    """

    def __init__(self, cfg: CfgNode | str | Path, optimize: torch.dtype | None = None) -> None:
        self._of_run = not isinstance(cfg, CfgNode)
        cfg = _config_of_run(Path(cfg)) if self._of_run else cfg
        self._cfg = cfg.clone()
        with explained_build_errors(cfg):
            self.model: nn.Module = build_model(without_network_weights(cfg)).eval()
        """The model; an optimised copy may replace it."""
        StrictCheckpointer(self.model, complete=True).load(cfg.MODEL.WEIGHTS)
        if optimize is not None:
            self.model = optimize_for_inference(self.model, dtype=optimize)
        if self._of_run:
            self._names, self._layout = class_names(cfg), keypoint_layout(cfg)
            own = class_colors(Path(cfg.MODEL.WEIGHTS).parent)
            self._colors = category_colors(self._names, own)

    def __call__(self, image: str | Path | Image.Image | np.ndarray) -> Detections | Instances:
        """Detects objects in an image.

        Args:
            image: the path of a file; an image of Pillow; or an array, uint8 ``(H, W, C)``, of any
                size: BGR as OpenCV reads it for a model of colours (INPUT.FORMAT BGR or RGB), else
                in INPUT.FORMAT, as :func:`fpn_plugin.data.read_picture` reads it.

        Returns:
            :class:`Detections` of a detector that was made from a folder. Of one made from a
            config, ``Instances`` on the CPU with Detectron2's fields, boxes in pixels of ``image``.
            R-CNN models that pool from a pyramid, except cascades, add ``pyramid_level``: int64, k
            of Eq. (1) for the proposal that each detection comes from.

        Raises:
            UserError: the image cannot be read or has other channels than INPUT.FORMAT, or the
                model gives only proposals (RPN).
        """
        if not isinstance(image, np.ndarray):
            if not isinstance(image, str | Path | Image.Image):
                raise UserError(
                    f"the image is a {type(image).__name__}, expected a path, an image of Pillow, "
                    "or an array of numpy"
                )
            image = read_picture(self._cfg, image)
        elif self._of_run and image.dtype != np.uint8 and self._cfg.INPUT.FORMAT != "YUV-BT.601":
            raise UserError(f"the image is an array of {image.dtype}, expected uint8, 0 to 255")
        instances = self._instances(image)
        if not self._of_run:
            return instances
        picture = rgb_of(self._cfg, image)
        described = (self._names, self._layout, lambda: self._category_ids, self._colors)
        return Detections(picture, instances, *described)

    def _instances(self, image: np.ndarray) -> Instances:
        height, width = image.shape[:2]
        resized, _ = resized_picture(self._cfg, image)
        given = {"image": channels_first(self._cfg, resized), "height": height, "width": width}
        with torch.no_grad(), recorded_levels(self.model):
            [output] = self.model([given])
        if "instances" not in output:
            raise UserError(
                "the config's model gives proposals, not detections: evaluate it with "
                "fpn-plugin evaluate"
            )
        return output["instances"].to("cpu")

    @cached_property
    def _category_ids(self) -> list[int] | None:
        """The id of each class in the first JSON, or else registered dataset, that has all."""
        names = set(self._names)
        for known in _known_datasets(self._cfg).values() if names else ():
            if Path(known["json"]).is_file():
                content, *_ = read_json(known["json"])
                ids = {each["name"]: each["id"] for each in content["categories"]}
                if len(ids) == len(content["categories"]) and names <= ids.keys():
                    return [ids[name] for name in self._names]
        for name in (*self._cfg.DATASETS.TRAIN, *self._cfg.DATASETS.TEST):
            metadata = MetadataCatalog.get(name)
            numbers = metadata.get("thing_dataset_id_to_contiguous_id", {})
            if numbers and list(metadata.get("thing_classes", ())) == list(self._names):
                return sorted(numbers, key=numbers.__getitem__)
        return None


def _config_of_run(folder: Path) -> CfgNode:
    """The config of a run, with the weights that it left, on the CPU if there is no GPU."""
    if not folder.is_dir():
        raise UserError(f"no folder {str(folder)!r}: give the OUTPUT_DIR of a training")
    config, last = folder / "config.yaml", folder / "last_checkpoint"
    if not config.is_file():
        raise UserError(f"{folder} has no config.yaml: give the OUTPUT_DIR of a training")
    if "_target_:" in config.read_text():
        raise UserError(
            f"{folder} is the run of a lazy config, whose model Detectron2's instantiate makes: a "
            "Detector takes runs of YAML configs"
        )
    names = [*_WEIGHTS, *([last.read_text().strip()] if last.is_file() else [])]
    found = [folder / name for name in names if (folder / name).is_file()]
    if not found:
        raise UserError(f"{folder} has no weights yet: none of {', '.join(names)} is there")
    cfg = config_on_device(str(config), [])
    cfg.MODEL.WEIGHTS = str(found[0])
    return cfg


def _known_datasets(cfg: CfgNode) -> dict[str, dict[str, Any]]:
    """The config's datasets that the run of its weights has stored, training's first."""
    stored = run_datasets(Path(cfg.MODEL.WEIGHTS).parent)
    return {n: stored[n] for n in (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST) if n in stored}


def class_name(index: int, names: Sequence[str]) -> str:
    """The name of a class, or "class 3" if names are not known."""
    return names[index] if index < len(names) else f"class {index}"


def class_names(cfg: CfgNode) -> list[str]:
    """Names of the model's classes; empty if unknown.

    They come from its weights, else from datasets.json next to them, else from its datasets.
    """
    saved = classes_in(cfg.MODEL.WEIGHTS)
    if saved is not None:
        return saved
    for known in _known_datasets(cfg).values():
        return list(known["classes"])
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        names = class_order(name)
        if names is not None:
            return names
    return []


def keypoint_layout(cfg: CfgNode) -> KeypointLayout:
    """Names and skeleton of the model's keypoints, from its datasets; empty if none fits."""
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN) if cfg.MODEL.KEYPOINT_ON else ():
        describe_keypoints(name)
        metadata = MetadataCatalog.get(name)
        names = list(metadata.get("keypoint_names", ()))
        if len(names) == cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS:
            rules = metadata.get("keypoint_connection_rules", ())
            edges = tuple((names.index(one), names.index(other)) for one, other, _ in rules)
            return KeypointLayout(tuple(names), edges)
    return KeypointLayout()

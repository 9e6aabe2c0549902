"""Small datasets and configs that the tests of this room share."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from detectron2.config import CfgNode

from fpn_plugin.engine import load_config
from fpn_plugin.fitting import GroundTruth


@pytest.fixture
def coco_json(tmp_path) -> Callable[..., Path]:
    """Writes a COCO JSON of boxes [x, y, width, height] in one image of 200 x 100 px."""

    def write(boxes: Sequence[Sequence[float]], **extra: object) -> Path:
        annotations = [
            {"id": i + 1, "image_id": 7, "category_id": 1, "bbox": list(box), "iscrowd": 0}
            for i, box in enumerate(boxes)
        ]
        content = {
            "images": [{"id": 7, "file_name": "a.jpg", "width": 200, "height": 100}],
            "annotations": annotations,
            "categories": [{"id": 1, "name": "thing"}],
            **extra,
        }
        path = tmp_path / "boxes.json"
        path.write_text(json.dumps(content))
        return path

    return write


@pytest.fixture
def mini_config() -> Callable[..., CfgNode]:
    """The mini config with options."""

    def load(*opts: str) -> CfgNode:
        return load_config("mini/faster_rcnn_R_18_FPN.yaml", opts)

    return load


@pytest.fixture
def truth_of() -> Callable[..., GroundTruth]:
    """Boxes XYXY in one image, without a file."""

    def make(boxes: object, height: int = 256, width: int = 256) -> GroundTruth:
        boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
        image = np.zeros(len(boxes), np.int64)
        return GroundTruth(boxes, image, np.array([[height, width]]), {}, 0)

    return make

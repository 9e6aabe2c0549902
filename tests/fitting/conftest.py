"""Small datasets and configs that the tests of this room share."""

from collections.abc import Callable

import numpy as np
import pytest
from detectron2.config import CfgNode

from fpn_plugin.engine import load_config
from fpn_plugin.fitting import GroundTruth


@pytest.fixture
def mini_config() -> Callable[..., CfgNode]:
    """The mini config with options."""

    def load(*opts: str) -> CfgNode:
        return load_config("mini/faster_rcnn_R_18_FPN.yaml", opts)

    return load


@pytest.fixture
def truth_of() -> Callable[..., GroundTruth]:
    """Boxes XYXY in one image, without a file."""

    def make(
        boxes: object, height: int = 256, width: int = 256, classes: tuple[str, ...] = ("thing",)
    ) -> GroundTruth:
        boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
        image = np.zeros(len(boxes), np.int64)
        return GroundTruth(boxes, image, np.array([[height, width]]), {}, 0, classes)

    return make

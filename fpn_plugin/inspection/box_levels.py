"""The level of a box in pixels of the image, by a config's resizing and Eq. (1)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge

from fpn_plugin.modeling import assign_levels

__all__ = ["BoxLevels"]


class BoxLevels:
    """Names the level that a box head pools a box from.

    Args:
        cfg: its test-time resizing, MODEL.ROI_HEADS.IN_FEATURES and Eq. (1).
        dataset: the content of a COCO JSON; id, height and width of its images are read.
    """

    def __init__(self, cfg: CfgNode, dataset: Mapping[str, Any]) -> None:
        self.names: list[str] = []
        """Levels, finest first; empty if the config does not pool from a pyramid."""
        numbered = [re.fullmatch(r"p(\d+)", name) for name in cfg.MODEL.ROI_HEADS.IN_FEATURES]
        if cfg.MODEL.META_ARCHITECTURE != "RetinaNet" and all(numbered):
            self.names = sorted(cfg.MODEL.ROI_HEADS.IN_FEATURES, key=lambda name: int(name[1:]))
        self._fpn = cfg.MODEL.FPN
        short, most = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST
        self._scales: dict[int, tuple[float, float]] = {}
        for image in dataset["images"]:
            height, width = image["height"], image["width"]
            resized = (height, width)
            if short > 0:
                resized = ResizeShortestEdge.get_output_shape(height, width, short, most)
            self._scales[image["id"]] = (resized[1] / width, resized[0] / height)

    def __call__(self, box: tuple[float, float, float, float], image_id: int) -> str:
        """The level of a box XYWH in pixels of that image; "" without a pyramid."""
        if not self.names:
            return ""
        x, y, width, height = box
        across, down = self._scales[image_id]
        corners = [x * across, y * down, (x + width) * across, (y + height) * down]
        first, last = int(self.names[0][1:]), int(self.names[-1][1:])
        level = assign_levels(
            torch.tensor([corners]), first, last, self._fpn.CANONICAL_BOX_SIZE,
            self._fpn.CANONICAL_LEVEL,
        )  # fmt: skip
        return f"p{int(level)}"

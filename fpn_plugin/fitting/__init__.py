"""Pyramids fitted to datasets: levels, canonical size, anchors, room for proposals."""

from .anchors import best_anchors
from .fit import Fit, check_config, fit_pyramid
from .ground_truth import GroundTruth, read_ground_truth
from .measures import Measures, measure
from .pyramid import Pyramid
from .recommendation import Recommendation
from .resizing import InputBoxes, ResizeRule, boxes_at_input

__all__ = [
    "Fit",
    "GroundTruth",
    "InputBoxes",
    "Measures",
    "Pyramid",
    "Recommendation",
    "ResizeRule",
    "best_anchors",
    "boxes_at_input",
    "check_config",
    "fit_pyramid",
    "measure",
    "read_ground_truth",
]

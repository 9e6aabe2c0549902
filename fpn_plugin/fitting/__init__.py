"""What a dataset asks of a pyramid: levels, canonical size, anchors, room for proposals."""

from .fit import Fit, fit_pyramid
from .ground_truth import GroundTruth, read_ground_truth
from .matching import best_anchors
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
    "fit_pyramid",
    "measure",
    "read_ground_truth",
]

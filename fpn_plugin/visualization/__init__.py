"""Pictures of detections, trainings and models, for slides: labelled, and colour-blind safe."""

from .detections import DrawnBox, draw_detections
from .keypoints import KeypointLayout
from .losses import plot_losses
from .palette import level_color, level_title

__all__ = [
    "DrawnBox",
    "KeypointLayout",
    "draw_detections",
    "level_color",
    "level_title",
    "plot_losses",
]

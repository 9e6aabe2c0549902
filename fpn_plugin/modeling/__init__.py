"""What runs in a forward pass. Importing it registers the classes with Detectron2."""

from .bottom_up import build_fpn_backbone, build_image_pyramid_backbone, image_channels
from .image_pyramid import FeaturizedImagePyramid
from .levels import assign_levels
from .neck import FeaturePyramidNetwork
from .networks import (
    build_timm_backbone,
    build_torchvision_backbone,
    without_network_weights,
)
from .pooler import PyramidROIPooler
from .roi_heads import FPNCascadeROIHeads, FPNROIHeads
from .rpn import PerLevelRPNHead
from .segment_proposals import SegmentProposals

__all__ = [
    "FPNCascadeROIHeads", "FPNROIHeads", "FeaturePyramidNetwork",
    "FeaturizedImagePyramid", "PerLevelRPNHead", "PyramidROIPooler", "SegmentProposals",
    "assign_levels", "build_fpn_backbone", "build_image_pyramid_backbone", "build_timm_backbone",
    "build_torchvision_backbone", "image_channels", "without_network_weights",
]  # fmt: skip

"""Fast operators: RoIAlign over a pyramid and non-maximum suppression.

Those for GPUs are written in Triton, next to plain torch that computes the same on every device.
"""

from .nms import nms_fixpoint, nms_mask
from .proposals import select_proposals
from .roi_align import pays, pyramid_roi_align, pyramid_roi_align_by_level

__all__ = [
    "nms_fixpoint", "nms_mask", "pays", "pyramid_roi_align", "pyramid_roi_align_by_level",
    "select_proposals",
]  # fmt: skip

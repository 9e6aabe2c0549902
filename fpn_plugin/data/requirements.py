"""What a model asks of annotations beyond what COCO does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode

from .problems import shortened
from .shapes import is_polygon

__all__ = ["BOXES", "Needs", "needs_problem"]


@dataclass(frozen=True)
class Needs:
    """What a model asks of its data.

    Args:
        max_size: longest side that images are resized to, in pixels.
        masks: "polygon" or "bitmask", the format that a model with masks is trained in; "" for a
            model without.
        keypoints: of each object; 0 for a model without.
        training: whether the data is trained on; otherwise it is evaluated, where annotations
            may be missing altogether, but those of a model with masks must all have one.
        visible: keypoints that an image must show to be trained on, by a model with keypoints.
        image_format: INPUT.FORMAT, which images are read in.
    """

    max_size: int = 1333
    masks: str = ""
    keypoints: int = 0
    training: bool = True
    visible: int = 1
    image_format: str = "BGR"

    @staticmethod
    def of(cfg: CfgNode, *, training: bool) -> Needs:
        """What a config's model asks."""
        longest = cfg.INPUT.MAX_SIZE_TRAIN if training else cfg.INPUT.MAX_SIZE_TEST
        return Needs(
            max_size=longest or 2**31,  # 0: not limited
            masks=cfg.INPUT.MASK_FORMAT if cfg.MODEL.MASK_ON else "",
            keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0,
            visible=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE,
            training=training,
            image_format=cfg.INPUT.FORMAT,
        )


BOXES = Needs()  # what every detector asks


def needs_problem(record: dict[str, Any], needs: Needs) -> tuple[str, str]:
    """What an annotation lacks for a model.

    Args:
        record: the annotation.
        needs: what the model asks.

    Returns:
        The kind of the problem (see :data:`fpn_plugin.data.problems.KINDS`) and the
        message; two empty strings if there is none.
    """
    if needs.training and record.get("iscrowd") == 1:
        return "", ""  # not trained on
    mask, keypoints = record.get("segmentation"), record.get("keypoints")
    if needs.masks and not mask:
        message = (
            "has no segmentation, and the model has masks (MODEL.MASK_ON; lazy: its mask_head)"
        )
        return "mask_missing", message
    if needs.masks == "polygon" and needs.training and type(mask) is dict:
        message = "segmentation is an RLE, and the model trains on polygons: set INPUT.MASK_FORMAT"
        return "mask_missing", f"{message} (lazy: the mapper's instance_mask_format) to bitmask"
    evaluated = needs.masks and not needs.training and type(mask) is list
    if evaluated and not all(type(polygon) is list and is_polygon(polygon) for polygon in mask):
        message = f"segmentation is {shortened(mask)}, which COCO's evaluation cannot draw"
        return "mask_missing", f"{message}; expected polygons of three points or more"
    if needs.keypoints:
        given = len(keypoints) / 3 if type(keypoints) is list else 0
        if given != needs.keypoints:
            message = f"has {given:g} keypoints, and the model has {needs.keypoints}"
            message += " (MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS; lazy: num_keypoints)"
            return "keypoints_missing", message
        if not needs.training and type(record.get("num_keypoints")) is not int:
            return "keypoints_missing", "has no 'num_keypoints', which COCO's evaluation reads"
    return "", ""

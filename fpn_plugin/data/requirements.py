"""What a model needs of annotations in addition to COCO's rules."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from detectron2.config import CfgNode

from .problems import shortened
from .shapes import Found, Size, is_empty_mask, is_polygon

__all__ = ["BOXES", "Needs", "empty_mask_problem", "needs_problem"]


@dataclass(frozen=True)
class Needs:
    """What a model needs of its data.

    Args:
        max_size: longest side that images are resized to, in pixels.
        masks: INPUT.MASK_FORMAT of a model with masks, "polygon" or "bitmask"; "" for one without.
        keypoints: of each object; 0 for a model without.
        training: whether the data is trained on. If it is evaluated, there may be no annotations,
            but each must have a mask for a model with masks.
        visible: keypoints that an image must show to be trained on, for a model with keypoints.
        image_format: INPUT.FORMAT, in which images are read.
    """

    max_size: int = 1333
    masks: str = ""
    keypoints: int = 0
    training: bool = True
    visible: int = 1
    image_format: str = "BGR"

    @staticmethod
    def of(cfg: CfgNode, *, training: bool) -> Needs:
        """What a config's model needs."""
        longest = cfg.INPUT.MAX_SIZE_TRAIN if training else cfg.INPUT.MAX_SIZE_TEST
        return Needs(
            max_size=longest or 2**31,  # 0: not limited
            masks=cfg.INPUT.MASK_FORMAT if cfg.MODEL.MASK_ON else "",
            keypoints=cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS if cfg.MODEL.KEYPOINT_ON else 0,
            visible=cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE,
            training=training,
            image_format=cfg.INPUT.FORMAT,
        )


BOXES = Needs()  # what every detector needs


def needs_problem(record: dict[str, Any], needs: Needs) -> Found:
    """What an annotation lacks for a model."""
    if needs.training and record.get("iscrowd") == 1:
        return "", ""  # not trained on
    mask, keypoints = record.get("segmentation"), record.get("keypoints")
    if needs.masks and not mask:
        message = "has no segmentation, and the model has masks (MODEL.MASK_ON; lazy: mask_head)"
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


def empty_mask_problem(record: dict[str, Any], size: Size | None, needs: Needs) -> Found:
    """Whether the mask of an annotation has no pixel and is trained on as a bitmap."""
    mask = record.get("segmentation")
    trained_on = needs.masks == "bitmask" and needs.training and record.get("iscrowd") != 1
    if trained_on and is_empty_mask(mask, size):
        return "mask_empty", f"segmentation is {shortened(mask)}, which covers no pixel"
    return "", ""

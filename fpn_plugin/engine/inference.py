"""Inference with a trained detector, and the pyramid level each detection is pooled from."""

from __future__ import annotations

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Instances
from torch import nn

from fpn_plugin.data import channels_first, class_order, describe_keypoints, resized_picture
from fpn_plugin.deploy import optimize_for_inference
from fpn_plugin.errors import UserError
from fpn_plugin.inspection.forward_trace import recorded_levels
from fpn_plugin.modeling import without_network_weights
from fpn_plugin.utils.weight_files import classes_in
from fpn_plugin.visualization import KeypointLayout

from .build_errors import explained_build_errors
from .checkpoint import StrictCheckpointer

__all__ = ["Detector", "class_names", "keypoint_layout"]


class Detector:
    """A trained detector on one image at a time, in place of Detectron2's DefaultPredictor.

    It takes the same image and resizes it in the same way. It differs in this:

    * It returns the ``Instances``, on the CPU, not a dict that holds them. It leaves out a panoptic
      model's segmentation, and refuses a model that gives only proposals.
    * Detections of R-CNN models have ``pyramid_level``.
    * It refuses weights that lack a parameter of the model.
    * INPUT.FORMAT may also be L or RGBA.

    Args:
        cfg: the config; MODEL.WEIGHTS must give every parameter of its model.
        optimize: run :func:`fpn_plugin.optimize_for_inference`'s copy, of this dtype.

    Raises:
        UserError: the weights do not exist or do not fit the model.
    """

    def __init__(self, cfg: CfgNode, optimize: torch.dtype | None = None) -> None:
        self._cfg = cfg.clone()
        with explained_build_errors(cfg):
            self.model: nn.Module = build_model(without_network_weights(cfg)).eval()
        """The model; an optimised copy may replace it."""
        StrictCheckpointer(self.model, complete=True).load(cfg.MODEL.WEIGHTS)
        if optimize is not None:
            self.model = optimize_for_inference(self.model, dtype=optimize)

    def __call__(self, image: np.ndarray) -> Instances:
        """Detects objects in an image.

        Args:
            image: uint8 ``(H, W, C)``, of any size: BGR for a model of colours (INPUT.FORMAT BGR or
                RGB), else in INPUT.FORMAT, as :func:`fpn_plugin.data.read_picture` reads it.

        Returns:
            ``Instances`` on the CPU with Detectron2's fields, boxes in pixels of ``image``. R-CNN
            models that pool from a pyramid, except cascades, add ``pyramid_level``: int64, k of
            Eq. (1) for the proposal that each detection comes from.

        Raises:
            UserError: the image has other channels than INPUT.FORMAT, or the model gives only
                proposals (RPN).
        """
        height, width = image.shape[:2]
        resized, _ = resized_picture(self._cfg, image)
        given = {"image": channels_first(self._cfg, resized), "height": height, "width": width}
        with torch.no_grad(), recorded_levels(self.model):
            [output] = self.model([given])
        if "instances" not in output:
            raise UserError(
                "the config's model gives proposals, not detections: evaluate it with "
                "fpn-plugin evaluate"
            )
        return output["instances"].to("cpu")


def class_names(cfg: CfgNode) -> list[str]:
    """Names of the model's classes, from its weights or else its datasets; empty if unknown."""
    saved = classes_in(cfg.MODEL.WEIGHTS)
    if saved is not None:
        return saved
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN):
        names = class_order(name)
        if names is not None:
            return names
    return []


def keypoint_layout(cfg: CfgNode) -> KeypointLayout:
    """Names and skeleton of the model's keypoints, from its datasets; empty if none fits."""
    for name in (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN) if cfg.MODEL.KEYPOINT_ON else ():
        describe_keypoints(name)
        metadata = MetadataCatalog.get(name)
        names = list(metadata.get("keypoint_names", ()))
        if len(names) == cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS:
            rules = metadata.get("keypoint_connection_rules", ())
            edges = tuple((names.index(one), names.index(other)) for one, other, _ in rules)
            return KeypointLayout(tuple(names), edges)
    return KeypointLayout()

"""Datasets: the mini dataset, made on the user's machine, and a user's own in COCO format."""

from .augmentations import check_augmentations, check_resizing
from .checking import check_coco, check_dataset
from .classes import class_order, follow_classes
from .coco import (
    check_classes,
    check_config_datasets,
    check_datasets,
    check_proposal_files,
    check_records,
    number_of_classes,
    register_datasets,
)
from .keypoints import check_keypoints, describe_keypoints, swapped_keypoints
from .mapper import ReadableImageMapper, read_image_or_say
from .mini import ensure_mini, ensure_mini_datasets, register_mini
from .mini_weights import MINI_WEIGHTS, ensure_mini_weights, register_mini_weights
from .needs import Needs
from .stream import TrainStream, train_stream

__all__ = [
    "MINI_WEIGHTS",
    "Needs",
    "ReadableImageMapper",
    "TrainStream",
    "check_augmentations",
    "check_classes",
    "check_coco",
    "check_config_datasets",
    "check_dataset",
    "check_datasets",
    "check_keypoints",
    "check_proposal_files",
    "check_records",
    "check_resizing",
    "class_order",
    "describe_keypoints",
    "ensure_mini",
    "ensure_mini_datasets",
    "ensure_mini_weights",
    "follow_classes",
    "number_of_classes",
    "read_image_or_say",
    "register_datasets",
    "register_mini",
    "register_mini_weights",
    "swapped_keypoints",
    "train_stream",
]

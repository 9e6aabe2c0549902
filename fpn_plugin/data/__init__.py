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
    current_json,
    number_of_classes,
    register_datasets,
    registered_specs,
)
from .keypoints import check_keypoints, describe_keypoints, swapped_keypoints
from .mapper import ReadableImageMapper, read_image_or_say
from .mini import ensure_mini, ensure_mini_datasets, register_mini
from .mini_weights import MINI_WEIGHTS, ensure_mini_weights, register_mini_weights
from .needs import Needs
from .pictures import (
    channels_first,
    check_channels,
    read_picture,
    resized_picture,
    rgb_of,
)
from .stream import TrainStream, train_stream

__all__ = [
    "MINI_WEIGHTS",
    "Needs",
    "ReadableImageMapper",
    "TrainStream",
    "channels_first",
    "check_augmentations",
    "check_channels",
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
    "current_json",
    "describe_keypoints",
    "ensure_mini",
    "ensure_mini_datasets",
    "ensure_mini_weights",
    "follow_classes",
    "number_of_classes",
    "read_image_or_say",
    "read_picture",
    "register_datasets",
    "register_mini",
    "register_mini_weights",
    "registered_specs",
    "resized_picture",
    "rgb_of",
    "swapped_keypoints",
    "train_stream",
]

"""Datasets: the mini dataset, made on the user's machine, and a user's own in COCO format."""

from .augmentations import check_augmentations, check_resizing
from .classes import class_order, follow_classes
from .coco import (
    check_classes,
    check_datasets,
    check_proposal_files,
    check_records,
    current_json,
    number_of_classes,
    register_datasets,
    registered_specs,
)
from .dataset_check import check_coco, check_dataset
from .keypoints import check_keypoints, describe_keypoints, swapped_keypoints
from .mapper import ReadableImageMapper, read_image_or_say
from .pictures import channels_first, check_channels, read_picture, resized_picture, rgb_of
from .requirements import Needs
from .stream import TrainStream, train_stream

__all__ = [
    "Needs", "ReadableImageMapper", "TrainStream", "channels_first", "check_augmentations",
    "check_channels", "check_classes", "check_coco", "check_dataset", "check_datasets",
    "check_keypoints", "check_proposal_files", "check_records", "check_resizing", "class_order",
    "current_json", "describe_keypoints", "follow_classes", "number_of_classes",
    "read_image_or_say", "read_picture", "register_datasets", "registered_specs", "resized_picture",
    "rgb_of", "swapped_keypoints", "train_stream",
]  # fmt: skip

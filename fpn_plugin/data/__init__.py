"""Datasets: the mini dataset, made on the user's machine, and a user's own in COCO format."""

from .checking import check_coco, check_dataset
from .coco import (
    check_config_datasets,
    check_datasets,
    check_proposal_files,
    check_records,
    register_datasets,
)
from .mapper import ReadableImageMapper, read_image_or_say
from .mini import ensure_mini, ensure_mini_datasets, register_mini
from .needs import Needs
from .stream import TrainStream, train_stream

__all__ = [
    "Needs",
    "ReadableImageMapper",
    "TrainStream",
    "check_coco",
    "check_config_datasets",
    "check_dataset",
    "check_datasets",
    "check_proposal_files",
    "check_records",
    "ensure_mini",
    "ensure_mini_datasets",
    "read_image_or_say",
    "register_datasets",
    "register_mini",
    "train_stream",
]

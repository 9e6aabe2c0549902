"""The mapper of training and evaluation; every error names the image that it is about."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import SizeMismatchError, annotations_to_instances, read_image
from detectron2.structures import BoxMode

from fpn_plugin.errors import UserError

from .image_files import UNREADABLE, image_problem, why_unreadable
from .keypoints import swapped_keypoints
from .shapes import Size, box_problem, is_empty_mask

__all__ = ["ReadableImageMapper", "read_image_or_say"]

_CHECK = "fpn-plugin check finds such images beforehand"


class ReadableImageMapper(DatasetMapper):
    """DatasetMapper that names a record it cannot map, and scales whole-numbered boxes exactly.

    It refuses an image that cannot be read, for which Pillow would start another program (EPS),
    that Detectron2 would read wrongly (more than 8 bits a pixel), or that has another size than
    its record. It also refuses annotations that do not fit together.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        """See :class:`detectron2.data.DatasetMapper`."""
        # Detectron2 asks the training's datasets for the names of keypoints, even to evaluate.
        boxes = copy.deepcopy(cfg)
        if isinstance(boxes, CfgNode):
            boxes.defrost()
        boxes.MODEL.KEYPOINT_ON = False
        parts = super().from_config(boxes, is_train)
        parts["use_keypoint"] = cfg.MODEL.KEYPOINT_ON
        if cfg.MODEL.KEYPOINT_ON and is_train:
            parts["keypoint_hflip_indices"] = swapped_keypoints(cfg.DATASETS.TRAIN)
        return parts

    def __call__(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """Maps a record; see :class:`detectron2.data.DatasetMapper`.

        Raises:
            UserError: its image cannot be read or has another size than the dataset says, or its
                annotations cannot be used.
        """
        path = dataset_dict["file_name"]
        _refuse_by_header(path)
        if "sem_seg_file_name" in dataset_dict:
            _refuse_by_header(dataset_dict["sem_seg_file_name"])
        try:
            record = self._prepared(dataset_dict) if self.is_train else dataset_dict
            mapped = super().__call__(record)
        except UserError:
            raise
        except SizeMismatchError as error:
            raise UserError(
                f"image {path!r} has another size than its dataset says: "
                f"{' '.join(str(error).split())} ({_CHECK})"
            ) from error
        except OSError as error:
            raise _unreadable(path, error) from error
        except (*UNREADABLE, TypeError, KeyError, IndexError, AssertionError) as error:
            image_id = dataset_dict.get("image_id")
            raise UserError(
                f"cannot use image {path!r} (image_id {image_id!r}) with its annotations: "
                f"{why_unreadable(error)} ({_CHECK})"
            ) from error
        except ImportError as error:
            raise UserError(
                f"cropping images with polygon masks (INPUT.CROP) needs {error.name}: pip install "
                f"{error.name}"
            ) from error
        if mapped["image"].dtype == torch.float64:  # INPUT.FORMAT is YUV-BT.601
            mapped["image"] = mapped["image"].float()
        return mapped

    def _transform_annotations(
        self, dataset_dict: dict[str, Any], transforms: Any, image_shape: tuple[int, int]
    ) -> None:
        if any(record.get("iscrowd", 0) == 0 for record in dataset_dict["annotations"]):
            super()._transform_annotations(dataset_dict, transforms, image_shape)
            return
        # Without objects there are no masks, from which Detectron2 computes boxes after a crop.
        del dataset_dict["annotations"]
        dataset_dict["instances"] = annotations_to_instances([], image_shape)

    def _prepared(self, dataset_dict: dict[str, Any]) -> dict[str, Any]:
        """The record with the annotations that are trained on, boxes and polygons as floats."""
        if "annotations" not in dataset_dict:
            return dataset_dict
        bitmasks = self.use_instance_mask and self.instance_mask_format == "bitmask"
        size = dataset_dict.get("width"), dataset_dict.get("height")
        annotations = [
            _in_floats(annotation)
            for annotation in dataset_dict["annotations"]
            if None in size or not _is_nothing(annotation, size, bitmasks)
        ]
        return {**dataset_dict, "annotations": annotations}


def _is_nothing(annotation: dict[str, Any], size: Size, bitmasks: bool) -> bool:
    """Whether training leaves an annotation out because it has no extent in its image.

    The rules are those of ``fpn-plugin check``. Detectron2 would look at the resized box or mask,
    for which rounding or the scale that is drawn would decide.
    """
    box = annotation.get("bbox")
    in_coco = type(box) is list and annotation.get("bbox_mode") == BoxMode.XYWH_ABS
    if in_coco and box_problem(box, size)[0] in ("box_empty", "box_outside"):
        return True
    return bitmasks and is_empty_mask(annotation.get("segmentation"), size)


def _in_floats(given: dict[str, Any]) -> dict[str, Any]:
    """An annotation whose box and polygons are floats.

    Detectron2 resizes integers in integer arithmetic, which cuts off up to a pixel.
    """
    annotation = dict(given)
    if isinstance(annotation.get("bbox"), list):
        annotation["bbox"] = [float(value) for value in annotation["bbox"]]
    if isinstance(annotation.get("segmentation"), list):
        annotation["segmentation"] = [
            np.asarray(polygon, np.float64) for polygon in annotation["segmentation"]
        ]
    return annotation


def read_image_or_say(path: str | Path, image_format: str = "BGR") -> np.ndarray:
    """Reads an image as uint8 ``(H, W, C)``, turned as its EXIF says.

    Args:
        path: of the file.
        image_format: see :func:`detectron2.data.detection_utils.read_image`.

    Raises:
        UserError: it cannot be read.
    """
    _refuse_by_header(path)
    try:
        return read_image(str(path), format=image_format)
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def _refuse_by_header(path: str | Path) -> None:
    """Refuses an image that Detectron2 would read wrongly, or with another program."""
    kind, message = image_problem(path, None, decode=False)
    if kind == "image_depth":
        raise UserError(f"image {str(path)!r} {message}")
    if kind == "image_missing":
        raise UserError(f"no image {str(path)!r}")
    if kind == "image_unreadable":
        raise UserError(f"cannot read image {str(path)!r}, which {message} ({_CHECK})")


def _unreadable(path: str | Path, error: Exception) -> UserError:
    return UserError(f"cannot read image {str(path)!r}: {why_unreadable(error)} ({_CHECK})")

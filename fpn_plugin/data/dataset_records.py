"""The records of datasets, as Detectron2 reads them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import get_detection_dataset_dicts

from .proposal_files import with_proposals

__all__ = ["config_arguments", "dataset_records"]


def dataset_records(
    names: str | Sequence[str], *, proposal_files: Sequence[str] | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Detectron2's get_detection_dataset_dicts, which runs no code of files of proposals.

    Args:
        names: of registered datasets.
        proposal_files: one for each name; None for models with an RPN.
        options: filter_empty, min_keypoints and check_consistency of Detectron2's function.

    Raises:
        UserError: a file is no file of proposals, or lacks an image of its dataset.
    """
    if proposal_files is None:
        return get_detection_dataset_dicts(names, **options)
    names = [names] if isinstance(names, str) else names
    return [
        record
        for name, file in zip(names, proposal_files, strict=True)
        for record in with_proposals(get_detection_dataset_dicts(name, **options), file)
    ]


def config_arguments(
    cfg: CfgNode, *, training: bool, names: Sequence[str] | None = None
) -> dict[str, Any]:
    """Arguments of :func:`dataset_records` for a config's datasets.

    Args:
        cfg: the config.
        training: whether datasets of DATASETS.TRAIN are meant, or of DATASETS.TEST.
        names: some of them; all by default.
    """
    split = "TRAIN" if training else "TEST"
    known = list(cfg.DATASETS[split])
    files = list(cfg.DATASETS[f"PROPOSAL_FILES_{split}"]) if cfg.MODEL.LOAD_PROPOSALS else None
    if files is not None and names is not None:
        files = [files[known.index(name)] for name in names]
    least_keypoints = cfg.MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE
    return {
        "names": known if names is None else list(names),
        "filter_empty": training and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS,
        "min_keypoints": least_keypoints if training and cfg.MODEL.KEYPOINT_ON else 0,
        "proposal_files": files,
    }

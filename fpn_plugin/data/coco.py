"""A user's own COCO-format data, checked and registered without writing code."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from fpn_plugin.errors import UserError, near_names
from fpn_plugin.proposal_files import read_proposals

from .augmentations import check_augmentations
from .checking import check_coco
from .keypoints import check_keypoints
from .mini import MINI_NAMES
from .needs import Needs

__all__ = [
    "check_classes",
    "check_config_datasets",
    "check_datasets",
    "check_proposal_files",
    "check_records",
    "number_of_classes",
    "register_datasets",
]


def register_datasets(specs: Iterable[str], *, checked: bool = False) -> None:
    """Registers datasets from ``NAME=JSON:IMAGES``, as ``--dataset`` gives them.

    Args:
        specs: for example ``"cells=data/cells.json:data/images"``. A name that is registered
            already with the same files is left as it is.
        checked: whether the records are checked elsewhere, by :func:`check_records`.

    Raises:
        UserError: a spec of another form, a name that is taken, a JSON or folder that is not
            there, a JSON that is not COCO.
    """
    for spec in specs:
        name, equals, files = spec.partition("=")
        json_file, colon, images = files.rpartition(":")
        if not (name and equals and json_file and colon and images):
            raise UserError(f"--dataset {spec!r}: give NAME=JSON:IMAGES")
        if name in DatasetCatalog.list():
            known = MetadataCatalog.get(name)
            if (known.get("json_file"), known.get("image_root")) == (json_file, images):
                continue
            raise UserError(f"--dataset {spec!r}: there is a dataset {name!r} already")
        if not Path(images).is_dir():
            raise UserError(f"--dataset {spec!r}: no folder {images!r}")
        if checked:
            register_coco_instances(name, {}, json_file, images)
            continue
        class_names = check_coco(json_file, needs=Needs(training=False))
        register_coco_instances(name, {}, json_file, images)
        MetadataCatalog.get(name).thing_classes = class_names


def check_datasets(names: Iterable[str], key: str) -> None:
    """Refuses datasets that are not registered or whose files are not there.

    Args:
        names: of datasets.
        key: the config key that names them, for the message.

    Raises:
        UserError: says which, and how to make it be there.
    """
    for name in names:
        if name not in DatasetCatalog.list():
            raise UserError(
                f"{key} names dataset {name!r}, which is not registered: "
                f"{near_names(name, DatasetCatalog.list())} Your own COCO-format data: "
                "--dataset NAME=JSON:IMAGES"
            )
        json_file = MetadataCatalog.get(name).get("json_file")
        made_on_demand = name in MINI_NAMES
        if json_file and not made_on_demand and not Path(json_file).is_file():
            raise UserError(
                f"{key} names dataset {name!r}, but {json_file} is not there: put it there, or "
                "set DETECTRON2_DATASETS to the folder that holds it"
            )


def check_config_datasets(cfg: CfgNode, training: bool) -> None:
    """Refuses datasets that a config could not be trained or evaluated on.

    Args:
        cfg: the config.
        training: whether DATASETS.TRAIN is used as well.

    Raises:
        UserError: a dataset is not there, is not evaluated as COCO, or has another number of
            classes than the model; INPUT has a value that no image could be prepared by; its
            keypoints do not fit, see :func:`check_keypoints`; or
            proposals that the config reads are not there.
    """
    check_augmentations(cfg, training=training)
    if training:
        check_datasets(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")
    check_datasets(cfg.DATASETS.TEST, "DATASETS.TEST")
    if cfg.MODEL.LOAD_PROPOSALS:
        for split in ("TRAIN", "TEST") if training else ("TEST",):
            files, key = cfg.DATASETS[f"PROPOSAL_FILES_{split}"], f"DATASETS.PROPOSAL_FILES_{split}"
            check_proposal_files(cfg.DATASETS[split], files, key)
    for name in cfg.DATASETS.TEST:
        kind = MetadataCatalog.get(name).get("evaluator_type", "coco")
        if kind not in ("coco", "coco_panoptic_seg"):
            raise UserError(
                f"DATASETS.TEST names {name!r}, which is evaluated as {kind!r}; this tool "
                "evaluates COCO-format detection and panoptic datasets"
            )
        if kind == "coco_panoptic_seg" and importlib.util.find_spec("panopticapi") is None:
            raise UserError(
                f"DATASETS.TEST names {name!r}, whose evaluation needs panopticapi: pip install "
                "'git+https://github.com/cocodataset/panopticapi.git'"
            )
    if training:
        check_records(cfg.DATASETS.TRAIN, Needs.of(cfg, training=True))
    check_records(cfg.DATASETS.TEST, Needs.of(cfg, training=False))
    if cfg.MODEL.KEYPOINT_ON:
        flip = cfg.INPUT.RANDOM_FLIP
        check_keypoints(
            cfg.DATASETS.TRAIN if training else (),
            cfg.DATASETS.TEST,
            cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS,
            flips=() if flip == "none" else (flip,),
            sigmas=cfg.TEST.KEYPOINT_OKS_SIGMAS,
        )
    # Those that a training evaluates on are matched with its own by name.
    names = cfg.DATASETS.TRAIN if training else cfg.DATASETS.TEST
    check_classes(names, *number_of_classes(cfg))


def number_of_classes(cfg: CfgNode) -> tuple[str, int | None]:
    """The config key of a model's number of classes, and its value.

    Args:
        cfg: the config; its META_ARCHITECTURE decides.

    Returns:
        Both, or ``("", None)`` for a model without classes, as one that gives proposals alone.
    """
    return {
        "GeneralizedRCNN": ("MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES),
        "PanopticFPN": ("MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES),
        "RetinaNet": ("MODEL.RETINANET.NUM_CLASSES", cfg.MODEL.RETINANET.NUM_CLASSES),
    }.get(cfg.MODEL.META_ARCHITECTURE, ("", None))


def check_classes(names: Iterable[str], key: str, classes: int | None) -> None:
    """Refuses datasets with another number of categories than the model has classes.

    Args:
        names: of datasets that :func:`check_records` has seen.
        key: the config key of the number of classes, for the message.
        classes: of the model; None for one without.

    Raises:
        UserError: says which, and what to set the key to.
    """
    for name in names:
        known = MetadataCatalog.get(name).get("thing_classes")
        if classes is not None and known is not None and len(known) != classes:
            raise UserError(
                f"{key} is {classes}, but dataset {name!r} has {len(known)} categories: set it to "
                f"{len(known)}"
            )


def check_records(names: Iterable[str], needs: Needs) -> None:
    """Refuses datasets with a record that could not be trained on or evaluated.

    Looks at every record of those in COCO format, and whether its image is there; images are not
    opened (tools/check_dataset.py does that).

    Args:
        names: of registered datasets.
        needs: what the model asks of them.

    Raises:
        UserError: names the file and the record.
    """
    for name in names:
        metadata = MetadataCatalog.get(name)
        json_file, images = metadata.get("json_file"), metadata.get("image_root")
        in_coco = metadata.get("evaluator_type", "coco") in ("coco", "coco_panoptic_seg")
        if json_file and images is not None and in_coco and name not in MINI_NAMES:
            classes = check_coco(json_file, images, needs=needs)
            if metadata.get("thing_classes") is None:
                metadata.thing_classes = classes


def check_proposal_files(names: Sequence[str], files: Sequence[str], key: str) -> None:
    """Refuses training on proposals without a file of them for each dataset.

    Files that are here are read, as those of DATASETS.TEST are needed only once training is over.

    Args:
        names: of the datasets.
        files: of their proposals.
        key: the config key that names the files, for the message.

    Raises:
        UserError: says which is not there or is no file of proposals, and what makes it.
    """
    if len(files) != len(names):
        raise UserError(
            f"the model reads proposals, so {key} must name a file for each of the datasets "
            f"{list(names)}; it has {len(files)}"
        )
    for name, file in zip(names, files, strict=True):
        if "://" not in file and not Path(file).is_file():
            raise UserError(
                f"{key} names {file!r}, which is not there. Made from a trained RPN by: "
                f"tools/dump_proposals.py --config-file RPN_RUN/config.yaml --splits {name} "
                f"--output {Path(file).parent} MODEL.WEIGHTS RPN_RUN/model_final.pth  ; "
                "tools/reproduce.py does it by itself"
            )
        if "://" not in file:
            with open(file, "rb") as opened:
                read_proposals(opened)

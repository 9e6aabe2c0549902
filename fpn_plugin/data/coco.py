"""A user's own COCO-format data, checked and registered without writing code."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances

from fpn_plugin.errors import UserError, near_names

from .mini import MINI_NAMES

__all__ = [
    "check_coco",
    "check_config_datasets",
    "check_datasets",
    "check_proposal_files",
    "register_datasets",
]


def register_datasets(specs: Iterable[str]) -> None:
    """Registers datasets from ``NAME=JSON:IMAGES``, as ``--dataset`` gives them.

    Args:
        specs: for example ``"cells=data/cells.json:data/images"``. A name that is registered
            already with the same files is left as it is.

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
        class_names = check_coco(json_file)
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
            classes than the model; or proposals that the config reads are not there.
    """
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
    key, classes = {
        "GeneralizedRCNN": ("MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES),
        "PanopticFPN": ("MODEL.ROI_HEADS.NUM_CLASSES", cfg.MODEL.ROI_HEADS.NUM_CLASSES),
        "RetinaNet": ("MODEL.RETINANET.NUM_CLASSES", cfg.MODEL.RETINANET.NUM_CLASSES),
    }.get(cfg.MODEL.META_ARCHITECTURE, ("", None))
    for name in (*(cfg.DATASETS.TRAIN if training else ()), *cfg.DATASETS.TEST):
        names = MetadataCatalog.get(name).get("thing_classes")
        if key and names is not None and len(names) != classes:
            raise UserError(
                f"{key} is {classes}, but dataset {name!r} has {len(names)} categories: set it to "
                f"{len(names)}"
            )


def check_proposal_files(names: Sequence[str], files: Sequence[str], key: str) -> None:
    """Refuses training on proposals without a file of them for each dataset.

    Args:
        names: of the datasets.
        files: of their proposals.
        key: the config key that names the files, for the message.

    Raises:
        UserError: says which is not there, and what makes it.
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


def check_coco(json_file: str) -> list[str]:
    """Refuses a JSON that Detectron2 could not load as COCO instances.

    Args:
        json_file: path of the annotation file.

    Returns:
        Names of the categories in the order of their ids, as Detectron2 numbers them.

    Raises:
        UserError: names the file and the record.
    """
    try:
        content = json.loads(Path(json_file).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {json_file}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{json_file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(
            f"{json_file} is not COCO: it holds a {type(content).__name__}, not an object with "
            "images, annotations and categories"
        )
    for part in ("images", "annotations", "categories"):
        if not isinstance(content.get(part), list):
            raise UserError(
                f"{json_file} is not COCO: it has no list {part!r}; it has {', '.join(content)}"
            )
        if not content[part]:
            raise UserError(f"{json_file} has no {part}")
    category_keys = {"id": int, "name": str}
    categories = _ids(json_file, "categories", content["categories"], category_keys)
    image_keys = {"file_name": str, "width": int, "height": int}
    images = _ids(json_file, "images", content["images"], image_keys)
    annotation_keys = {"id": int, "area": (int, float), "iscrowd": int}
    _ids(json_file, "annotations", content["annotations"], annotation_keys)
    for annotation in content["annotations"]:
        _check_annotation(json_file, annotation, images, categories)
    return [category["name"] for category in sorted(content["categories"], key=lambda c: c["id"])]


def _ids(json_file: str, part: str, records: list[Any], keys: dict[str, Any]) -> set[Any]:
    """The ids of records, known to be there once each, beside keys of the types given."""
    ids = set()
    for number, record in enumerate(records):
        where = f"{json_file}: {part}[{number}]"
        if not isinstance(record, dict) or not isinstance(record.get("id"), int | str):
            raise UserError(f"{where} has no id")
        if record["id"] in ids:
            raise UserError(f"{where}: id {record['id']!r} is there twice")
        ids.add(record["id"])
        for key, kind in keys.items():
            if not isinstance(record.get(key), kind):
                expected = "a number" if isinstance(kind, tuple) else kind.__name__
                raise UserError(
                    f"{where} (id {record['id']!r}): {key!r} is {record.get(key)!r}, expected "
                    f"{expected}"
                )
    return ids


def _check_annotation(
    json_file: str, annotation: dict[str, Any], images: set[Any], categories: set[Any]
) -> None:
    where = f"{json_file}: annotation {annotation['id']!r}"
    if annotation["id"] < 1:
        raise UserError(f"{where}: COCO's evaluation takes ids from 1 on; 0 would never match")
    if annotation.get("ignore", 0) != 0:
        raise UserError(f"{where}: 'ignore' is not supported; use iscrowd")
    for key, known in (("image_id", images), ("category_id", categories)):
        given = annotation.get(key)
        if not isinstance(given, int | str) or given not in known:
            raise UserError(f"{where}: no {key.removesuffix('_id')} has id {given!r}")
    box = annotation.get("bbox")
    numbers = isinstance(box, list) and all(isinstance(v, int | float) for v in box)
    # NaN and infinity are no JSON, but Python reads them.
    if not numbers or len(box) != 4 or not all(abs(v) < float("inf") for v in box):
        raise UserError(f"{where}: bbox is {box!r}, expected [x, y, width, height] in pixels")
    if box[2] < 0 or box[3] < 0:
        raise UserError(
            f"{where}: bbox is {box!r}, whose width or height is negative; expected [x, y, width, "
            "height], not two corners"
        )

"""Registers and checks a user's own data: COCO JSONs, or folders of labels converted to them."""

from __future__ import annotations

import difflib
import json
import logging
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances

from fpn_plugin.errors import UserError
from fpn_plugin.mini.dataset import MINI_NAMES

from .dataset_check import CheckedCoco, read_coco
from .folder_json import folder_json
from .label_folders import folder_and_split
from .problems import CONVERT
from .proposal_files import read_proposals
from .reading import digest_of
from .requirements import Needs

__all__ = [
    "check_classes", "check_datasets", "check_proposal_files", "check_records", "current_json",
    "given_json", "is_reread", "near_datasets", "number_classes", "number_of_classes",
    "register_datasets", "register_of_run", "registered_specs",
]  # fmt: skip

logger = logging.getLogger(__name__)
_FORM = (
    "expected NAME=JSON:IMAGES, or NAME=FOLDER of VOC, YOLO or LabelMe labels, or "
    "NAME=FOLDER:SPLIT; such a folder or file must be there"
)
_ANY_USE = Needs(training=False)
# Metadata that come from a JSON; those of keypoints only if described_by_json is there.
_CLASSES = ("thing_classes", "thing_dataset_id_to_contiguous_id", "classes_of_model")
_KEYPOINTS = (
    "keypoint_names", "keypoint_connection_rules", "keypoint_flip_map", "described_by_json",
)  # fmt: skip


def register_datasets(specs: Iterable[str], *, checked: bool = False) -> None:
    """Registers datasets from ``NAME=JSON:IMAGES``, as ``--dataset`` gives them.

    ``NAME=FOLDER`` or ``NAME=FOLDER:SPLIT`` registers the COCO JSON that a folder of labels is
    converted to, see :mod:`fpn_plugin.data.folder_json`.

    A JSON that lacks values that can be computed is repaired in a copy, which is registered in its
    place; see :mod:`fpn_plugin.data.repairs`.

    Args:
        specs: for example ``"cells=data/cells.json:data/images"``. A name may be registered already
            with the same files; they are read anew if they have changed.
        checked: whether :func:`check_records` checks the records later.

    Raises:
        UserError: a spec has another form, a name is taken, a JSON or folder is not there, or a
            JSON is not COCO.
    """
    for spec in specs:
        name, files = _parts(spec)
        labels = folder_and_split(files)
        json_file, _, images = files.rpartition(":")
        if labels is not None:
            json_file, images = folder_json(*labels), labels[0]
        elif not (json_file and images):
            raise UserError(f"--dataset {spec!r}: {_FORM}")
        if not Path(json_file).is_file():
            raise UserError(f"--dataset {spec!r}: no file {json_file!r}")
        if not Path(images).is_dir():
            raise UserError(f"--dataset {spec!r}: no folder {images!r}")
        new = name not in DatasetCatalog.list()
        if not new:
            known = MetadataCatalog.get(name)
            files = (known.get("json_file"), known.get("given_json_file"))
            if json_file in files and known.get("image_root") == images:
                json_file = given_json(name)
            elif known.get("of_run"):
                _forget(name)
                new = True
            else:
                raise UserError(f"--dataset {spec!r}: there is a dataset {name!r} already")
        coco = None if checked else read_coco(json_file, images, needs=_ANY_USE, files=False)
        if new:
            _register(name, json_file, images, label_folder=labels)
        if coco is not None:
            _update(name, coco)


def register_of_run(name: str, json_file: str, images: str, **metadata: Any) -> bool:
    """Registers a dataset that a run has stored. Its files are not read and may be missing.

    It replaces a dataset of another run. One that is registered otherwise stays.

    Args:
        name: of the dataset.
        json_file: absolute path.
        images: absolute path of the folder.
        metadata: more of it.

    Returns:
        Whether the name stands for the run's dataset.
    """
    if name in DatasetCatalog.list():
        known = MetadataCatalog.get(name)
        if not known.get("of_run"):
            return False
        if (given_json(name), known.image_root) == (json_file, images):
            return True
        _forget(name)
    _register(name, json_file, images, of_run=True, **metadata)
    return True


def _register(name: str, json_file: str, images: str, **metadata: Any) -> None:
    values = {"json_file": json_file, "image_root": images, "evaluator_type": "coco", **metadata}
    _set_metadata(name, **{**_of_no_json(name), **values})
    DatasetCatalog.register(name, partial(_load, name))


def _forget(name: str) -> None:
    DatasetCatalog.remove(name)
    MetadataCatalog.remove(name)


def registered_specs(specs: Iterable[str]) -> list[str]:
    """The specs with which a started process registers the JSONs that were repaired here.

    Args:
        specs: that :func:`register_datasets` was given, and :func:`check_records` has checked.
    """
    names = [_parts(spec)[0] for spec in specs]
    known = [MetadataCatalog.get(name) for name in names]
    return [f"{m.name}={m.json_file}:{m.image_root}" for m in known]


def _parts(spec: str) -> tuple[str, str]:
    name, _, files = spec.partition("=")
    if not (name and files):
        raise UserError(f"--dataset {spec!r}: {_FORM}")
    return name, files


def given_json(name: str) -> str:
    """The JSON that a dataset in COCO format was registered with, repaired or not.

    That of a folder of labels is written anew if they have changed.
    """
    known = MetadataCatalog.get(name)
    if known.get("label_folder"):
        return folder_json(*known.label_folder)
    return known.get("given_json_file") or known.json_file


def _set_metadata(name: str, **values: Any) -> None:
    """Changes metadata, which Detectron2 does not allow; None removes a value."""
    known = MetadataCatalog.pop(name).as_dict() if name in MetadataCatalog.list() else {}
    kept = {key: value for key, value in {**known, **values}.items() if value is not None}
    MetadataCatalog.get(name).set(**kept)


def _update(name: str, coco: CheckedCoco) -> None:
    """Gives a registered dataset what was read of its JSON."""
    known, json_file = MetadataCatalog.get(name), given_json(name)
    digest, classes = known.get("json_digest"), known.get("thing_classes")
    if digest == coco.digest:
        return
    if digest or classes not in (None, coco.classes):
        logger.warning("dataset %r: %s has changed and is read anew", name, json_file)
    if coco.repairs and not is_reread(name):
        raise UserError(
            f"{json_file}: {coco.repairs[0]}. Dataset {name!r} is read by a function of its own, "
            f"so that this cannot be repaired: {CONVERT}"
        )
    values = {"json_digest": coco.digest, "given_json_file": json_file}
    values["json_file"] = _written(coco, json_file) if coco.repairs else json_file
    model_classes = known.get("classes_of_model")
    _set_metadata(name, **{**_of_no_json(name), **values, "thing_classes": coco.classes})
    if model_classes is not None and sorted(model_classes) == sorted(coco.classes):
        number_classes(name, model_classes)


def number_classes(name: str, classes: Sequence[str]) -> None:
    """Numbers the categories of a dataset that :func:`is_reread` in this order, not that of ids."""
    numbers = {"thing_dataset_id_to_contiguous_id": None}  # of an earlier order
    _set_metadata(name, thing_classes=list(classes), classes_of_model=list(classes), **numbers)


def _of_no_json(name: str) -> dict[str, None]:
    """Metadata that come from a JSON, as :func:`_set_metadata` removes them."""
    known = MetadataCatalog.get(name)
    return dict.fromkeys((*_CLASSES, *(_KEYPOINTS if known.get("described_by_json") else ())))


def is_reread(name: str) -> bool:
    """Whether a dataset is read by :func:`_load`; replaces Detectron2's own function by it."""
    function = DatasetCatalog[name]
    if getattr(function, "func", None) is _load:
        return True
    if function.__module__ != register_coco_instances.__module__:
        return False
    DatasetCatalog.remove(name)
    DatasetCatalog.register(name, partial(_load, name))
    return True


def _load(name: str) -> list[dict[str, Any]]:
    """Detectron2's records of a dataset, from its JSON as it is now."""
    json_file, known = current_json(name), MetadataCatalog.get(name)
    classes = known.get("classes_of_model")
    if classes is None:
        return load_coco_json(json_file, known.image_root, name)
    # Loaded under another name, whose metadata get the order of the ids.
    in_id_order = f"{name}, in the order of its ids"
    try:
        records = load_coco_json(json_file, known.image_root, in_id_order)
        numbers = MetadataCatalog.get(in_id_order).thing_dataset_id_to_contiguous_id
        order = [classes.index(each) for each in MetadataCatalog.get(in_id_order).thing_classes]
    finally:
        MetadataCatalog.pop(in_id_order, None)
    for record in records:
        for annotation in record["annotations"]:
            annotation["category_id"] = order[annotation["category_id"]]
    known.thing_dataset_id_to_contiguous_id = {id_: order[n] for id_, n in numbers.items()}
    return records


def current_json(name: str) -> str:
    """The JSON of a registered dataset in COCO format, read anew if it has changed on disk.

    Raises:
        UserError: it has changed and cannot be used.
    """
    known = MetadataCatalog.get(name)
    given, digest = given_json(name), known.get("json_digest")
    if digest and digest_of(given) != digest:
        _update(name, read_coco(given, known.image_root, needs=_ANY_USE, files=False))
    return MetadataCatalog.get(name).json_file


@cache
def _folder() -> tempfile.TemporaryDirectory:
    """For repaired JSONs, as long as this process runs."""
    return tempfile.TemporaryDirectory(prefix="fpn-plugin-")


def _written(coco: CheckedCoco, json_file: str) -> str:
    path = Path(_folder().name, f"{Path(json_file).stem}-{coco.digest[:16]}.json")
    path.write_text(json.dumps(coco.content), encoding="utf-8")
    return str(path)


def check_datasets(names: Iterable[str], key: str, *, registers: bool = True) -> None:
    """Refuses datasets that are not registered or whose files are not there.

    Args:
        names: of datasets.
        key: the config key that names them, for the message.
        registers: whether the command takes --dataset.

    Raises:
        UserError: names the dataset, and what to do.
    """
    for name in names:
        if name not in DatasetCatalog.list():
            own = (
                f"Register your own data: --dataset {name}=JSON:IMAGES, or {name}=FOLDER of VOC, "
                "YOLO or LabelMe labels"
            )
            remedies = " ".join(filter(None, (near_datasets(name), own if registers else "")))
            raise UserError(
                f"{key} names dataset {name!r}, which is not registered{remedies and '. '}"
                f"{remedies}"
            )
        known = MetadataCatalog.get(name)
        json_file, images = known.get("json_file"), known.get("image_root")
        if known.get("of_run"):
            json_file = given_json(name)
            gone = images if Path(json_file).is_file() else json_file
            if not Path(gone).exists():
                raise UserError(
                    f"{key} names dataset {name!r} of the run, but {gone} is not there: if it has "
                    f"moved, give --dataset {name}=JSON:IMAGES"
                )
        elif json_file and name not in MINI_NAMES and not Path(json_file).is_file():
            raise UserError(
                f"{key} names dataset {name!r}, but {json_file} is not there: put it there, or "
                "set DETECTRON2_DATASETS to the folder that holds it"
            )


def near_datasets(name: str) -> str:
    """The question "did you mean A or B?" about registered datasets; "" if no name is near.

    Names of Detectron2 and of the mini dataset must be nearer than those of --dataset and of runs.
    They are many, and users rarely mean them.
    """
    known = DatasetCatalog.list()
    own = [each for each in known if getattr(DatasetCatalog[each], "func", None) is _load]
    own = [each for each in own if each not in MINI_NAMES]
    near = difflib.get_close_matches(name, own) or difflib.get_close_matches(name, known, 1, 0.85)
    return f"did you mean {' or '.join(near)}?" if near else ""


def number_of_classes(cfg: CfgNode) -> tuple[str, int | None]:
    """The config key of a model's number of classes, and its value.

    A model without classes, which gives only proposals, has ``("", None)``.
    """
    part = {"GeneralizedRCNN": "ROI_HEADS", "PanopticFPN": "ROI_HEADS", "RetinaNet": "RETINANET"}
    name = part.get(cfg.MODEL.META_ARCHITECTURE)
    return (f"MODEL.{name}.NUM_CLASSES", cfg.MODEL[name].NUM_CLASSES) if name else ("", None)


def check_classes(names: Iterable[str], key: str, classes: int | None) -> None:
    """Refuses datasets with another number of categories than the model has classes.

    Args:
        names: of datasets that :func:`check_records` has checked.
        key: the config key of the number of classes, for the message.
        classes: of the model; None for one without.

    Raises:
        UserError: names the dataset, and the key's value for it.
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

    Checks every record of datasets in COCO format, and whether its image is there. Images are not
    opened; ``fpn-plugin check`` does that. Repairs as :func:`register_datasets` does.

    Args:
        names: of registered datasets.
        needs: what the model needs of them.

    Raises:
        UserError: names the file and the record.
    """
    for name in names:
        metadata = MetadataCatalog.get(name)
        json_file, images = metadata.get("json_file"), metadata.get("image_root")
        in_coco = metadata.get("evaluator_type", "coco") in ("coco", "coco_panoptic_seg")
        if json_file and images is not None and in_coco and name not in MINI_NAMES:
            _update(name, read_coco(given_json(name), images, needs=needs))


def check_proposal_files(names: Sequence[str], files: Sequence[str], key: str) -> None:
    """Refuses training on proposals without a file of them for each dataset.

    Local files are read: those of DATASETS.TEST are needed only when training is over.

    Args:
        names: of the datasets.
        files: of their proposals.
        key: the config key that names the files, for the message.

    Raises:
        UserError: names what is not there or is no file of proposals, and what makes it.
    """
    if len(files) != len(names):
        raise UserError(
            f"the model reads proposals, so {key} must name a file for each of the datasets "
            f"{list(names)}; it has {len(files)}"
        )
    for name, file in zip(names, files, strict=True):
        if "://" in file:
            continue
        if not Path(file).is_file():
            raise UserError(
                f"{key} names {file!r}, which is not there. Make it from a trained RPN with: "
                f"fpn-plugin dump-proposals --config-file RPN_RUN/config.yaml --splits {name} "
                f"--output {Path(file).parent} MODEL.WEIGHTS RPN_RUN/model_final.pth  ; "
                "fpn-plugin reproduce does it by itself"
            )
        with open(file, "rb") as opened:
            read_proposals(opened)

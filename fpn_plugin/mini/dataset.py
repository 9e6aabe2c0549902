"""The mini dataset: 1,500 training and 200 validation images in COCO format, made on first use.

A feature pyramid can be trained and evaluated on it on a laptop, without a download. Its images are
described in :mod:`fpn_plugin.mini.scene`. Results on it say nothing about COCO. Next to
``mini_train`` and ``mini_val`` there are kinds with other sizes and shapes: ``mini_small_train``,
``mini_large_train``, ``mini_thin_train`` and their ``_val``.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from iopath.common.file_io import file_lock
from PIL import Image
from pycocotools import mask as coco_mask
from tqdm import tqdm

from fpn_plugin.errors import UserError

from . import scene
from .scene import IMAGE_SIZE, KINDS, Scene, draw_scene

__all__ = [
    "MINI_NAMES", "SPLITS", "ensure_mini", "ensure_mini_datasets", "mini_root", "register_mini",
]  # fmt: skip

SEED = 0
SPLITS = {"train": 1500, "val": 200}
# Kind and split by registered name.
MINI_NAMES = {
    "_".join(filter(None, ("mini", kind, split))): (kind, split)
    for kind in KINDS
    for split in SPLITS
}
_JPEG_QUALITY = 92


def _fingerprint() -> str:
    """Eight hex digits that change with the generator's code."""
    code = Path(__file__).read_bytes() + Path(scene.__file__).read_bytes()
    return hashlib.sha256(code).hexdigest()[:8]


def mini_root(kind: str = "") -> Path:
    """The folder of a dataset, ``mini-<fingerprint>`` in $DETECTRON2_DATASETS or ``datasets``.

    Another version of the generator has another folder.

    Args:
        kind: of :data:`fpn_plugin.mini.scene.KINDS`.
    """
    datasets = Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()
    return datasets / f"{'_'.join(filter(None, ('mini', kind)))}-{_fingerprint()}"


def ensure_mini_datasets(names: Iterable[str]) -> None:
    """Makes the mini datasets among some registered ones, unless they are there.

    Args:
        names: of any datasets.

    Raises:
        UserError: see :func:`ensure_mini`.
    """
    for kind in dict.fromkeys(MINI_NAMES[name][0] for name in names if name in MINI_NAMES):
        ensure_mini(kind=kind)


def ensure_mini(
    splits: dict[str, int] | None = None, root: Path | None = None, kind: str = ""
) -> Path:
    """Makes the dataset if it is not there; takes half a minute, with a progress bar.

    Several processes may call it at once: one makes the dataset, the others wait. The folder gets
    its name when it is complete, so that an interrupted run leaves nothing that is used later.

    Args:
        splits: number of images by split; :data:`SPLITS` by default.
        root: the folder to make; :func:`mini_root` by default.
        kind: of :data:`fpn_plugin.mini.scene.KINDS`.

    Returns:
        The folder: ``<split>/*.jpg`` and ``<split>.json`` (COCO instances) for each split.

    Raises:
        UserError: the folder cannot be written, or scikit-learn, whose digits and photographs the
            images are made of, is not installed.
    """
    splits = SPLITS if splits is None else splits
    root = mini_root(kind) if root is None else root
    if root.is_dir():
        return root
    try:
        import sklearn  # noqa: F401
    except ImportError:
        raise UserError(
            "the mini dataset is made from scikit-learn's bundled images, and scikit-learn is "
            "not installed: run  pip install scikit-learn"
        ) from None
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(str(root)):
            if not root.is_dir():  # another process may have made it while this one waited
                _make(splits, root, kind)
    except OSError as error:
        raise UserError(
            f"cannot write the mini dataset to {root}: {error.strerror or error}; set "
            "DETECTRON2_DATASETS to a folder that can be written"
        ) from error
    return root


def _make(splits: dict[str, int], root: Path, kind: str) -> None:
    partial = root.with_name(root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of an interrupted run; this one has the lock
    with tqdm(total=sum(splits.values()), desc="making the mini dataset", unit="image") as bar:
        for split, count in splits.items():
            _make_split(partial, split, count, kind, bar)
    os.replace(partial, root)


def _make_split(folder: Path, split: str, count: int, kind: str, bar: tqdm) -> None:
    (folder / split).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        drawn = draw_scene(SEED, split, index, kind)
        name = f"{index:06d}.jpg"
        Image.fromarray(drawn.image).save(folder / split / name, quality=_JPEG_QUALITY)
        images.append(
            {"id": index + 1, "file_name": name, "width": IMAGE_SIZE, "height": IMAGE_SIZE}
        )
        annotations += _annotations(drawn, index + 1, first_id=len(annotations) + 1)
        bar.update()
    content = {
        "info": {"description": f"fpn_plugin mini dataset, {split}", "version": _fingerprint()},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": KINDS[kind].categories,
    }
    (folder / f"{split}.json").write_text(json.dumps(content))


def _annotations(drawn: Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    """COCO annotations of a scene.

    ``area``, by which COCO calls objects small, medium or large, is the box's, which decides the
    pyramid level. By the area of their thin strokes all digits would be small.
    """
    found = []
    for number, thing in enumerate(drawn.objects):
        rle = coco_mask.encode(np.asfortranarray(thing.mask, np.uint8))
        x, y, width, height = thing.box
        found.append(
            {
                "id": first_id + number,
                "image_id": image_id,
                "category_id": thing.category_id,
                "bbox": [x, y, width, height],
                "area": width * height,
                "iscrowd": 0,
                "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
            }
        )
    return found


def _load(name: str, root: Path) -> list[dict[str, Any]]:
    kind, split = MINI_NAMES[name]
    ensure_mini(root=root, kind=kind)
    return load_coco_json(str(root / f"{split}.json"), str(root / split), name)


def register_mini() -> None:
    """Registers :data:`MINI_NAMES` with Detectron2, once; loading a dataset makes its files."""
    for name, (kind, split) in MINI_NAMES.items():
        if name in DatasetCatalog.list():
            continue
        root = mini_root(kind)
        categories = KINDS[kind].categories
        DatasetCatalog.register(name, lambda name=name, root=root: _load(name, root))
        MetadataCatalog.get(name).set(
            json_file=str(root / f"{split}.json"),
            image_root=str(root / split),
            evaluator_type="coco",
            thing_classes=[category["name"] for category in categories],
            thing_dataset_id_to_contiguous_id={
                category["id"]: index for index, category in enumerate(categories)
            },
        )

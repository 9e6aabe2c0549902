"""The mini dataset: 1,500 training and 200 validation images in COCO format, made on first use.

It lets anyone see a feature pyramid train and be evaluated on a laptop, with nothing to download.
What the images show and why is told in :mod:`fpn_plugin.data.mini_scene`. Figures reached on it
say nothing about COCO.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
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

from . import mini_scene
from .mini_scene import CATEGORIES, IMAGE_SIZE, Scene, draw_scene

__all__ = ["MINI_NAMES", "SPLITS", "ensure_mini", "mini_root", "register_mini"]

SEED = 0
SPLITS = {"train": 1500, "val": 200}
MINI_NAMES = tuple(f"mini_{split}" for split in SPLITS)
_JPEG_QUALITY = 92


def _datasets_root() -> Path:
    """Where Detectron2 looks for datasets: $DETECTRON2_DATASETS, else ``datasets``."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def _fingerprint() -> str:
    """Eight hex digits that change when the generator's code does."""
    digest = hashlib.sha256()
    for source in (Path(__file__), Path(mini_scene.__file__)):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:8]


def mini_root() -> Path:
    """The folder of the dataset as the present generator makes it: ``.../mini-<fingerprint>``.

    A changed generator has another folder, so files of an earlier one are never taken for its own.
    """
    return _datasets_root() / f"mini-{_fingerprint()}"


def ensure_mini(splits: dict[str, int] | None = None, root: Path | None = None) -> Path:
    """Makes the dataset where it is not there yet; about half a minute, with a progress bar.

    Safe to call from several processes at once: one makes it, the others wait for it. It is made
    in a folder aside that gets its name when it is complete, so an interrupted run leaves nothing
    that a later one would trust.

    Args:
        splits: number of images by split; :data:`SPLITS` by default.
        root: the folder to make; :func:`mini_root` by default.

    Returns:
        The folder: ``<split>/*.jpg`` and ``<split>.json`` (COCO instances) for each split.

    Raises:
        UserError: where the folder cannot be written, or scikit-learn, whose bundled digits and
            photographs the images are made of, is not installed.
    """
    splits = SPLITS if splits is None else splits
    root = mini_root() if root is None else root
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
                _make(splits, root)
    except OSError as error:
        raise UserError(
            f"cannot write the mini dataset to {root}: {error.strerror or error}; set "
            "DETECTRON2_DATASETS to a folder that can be written"
        ) from error
    return root


def _make(splits: dict[str, int], root: Path) -> None:
    partial = root.with_name(root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was cut off; the lock is ours
    with tqdm(total=sum(splits.values()), desc="making the mini dataset", unit="image") as bar:
        for split, count in splits.items():
            _make_split(partial, split, count, bar)
    os.replace(partial, root)


def _make_split(folder: Path, split: str, count: int, bar: tqdm) -> None:
    (folder / split).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        scene = draw_scene(SEED, split, index)
        name = f"{index:06d}.jpg"
        Image.fromarray(scene.image).save(folder / split / name, quality=_JPEG_QUALITY)
        images.append(
            {"id": index + 1, "file_name": name, "width": IMAGE_SIZE, "height": IMAGE_SIZE}
        )
        annotations += _annotations(scene, index + 1, first_id=len(annotations) + 1)
        bar.update()
    content = {
        "info": {"description": f"fpn_plugin mini dataset, {split}", "version": _fingerprint()},
        "licenses": [],
        "images": images,
        "annotations": annotations,
        "categories": list(CATEGORIES),
    }
    (folder / f"{split}.json").write_text(json.dumps(content))


def _annotations(scene: Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    """COCO annotations of a scene. ``area``, which sorts objects into small, medium and large, is
    the box's: it is what decides the pyramid level, and thin strokes would make digits small.
    """
    found = []
    for number, thing in enumerate(scene.objects):
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


def _load(split: str, root: Path) -> list[dict[str, Any]]:
    ensure_mini(root=root)
    logging.getLogger(__name__).info("mini dataset: %s", root)
    return load_coco_json(str(root / f"{split}.json"), str(root / split), f"mini_{split}")


def register_mini() -> None:
    """Registers ``mini_train`` and ``mini_val`` with Detectron2; nothing is made until asked for.

    Safe to call twice.
    """
    root = mini_root()
    for split in SPLITS:
        name = f"mini_{split}"
        if name in DatasetCatalog.list():
            continue
        DatasetCatalog.register(name, lambda split=split: _load(split, root))
        MetadataCatalog.get(name).set(
            json_file=str(root / f"{split}.json"),
            image_root=str(root / split),
            evaluator_type="coco",
            thing_classes=[category["name"] for category in CATEGORIES],
            thing_dataset_id_to_contiguous_id={
                category["id"]: index for index, category in enumerate(CATEGORIES)
            },
        )

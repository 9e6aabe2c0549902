"""The datasets of a run, stored in its folder, so that later commands need no --dataset."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import ImageColor

from fpn_plugin.data import class_order, register_datasets
from fpn_plugin.data.coco import given_json, register_of_run
from fpn_plugin.errors import UserError, one_line
from fpn_plugin.utils.atomic import written_whole
from fpn_plugin.visualization.palette import CATEGORY_COLORS

__all__ = [
    "DATASETS_FILE", "class_colors", "describe_datasets", "register_with_runs", "run_datasets",
    "run_folders", "save_run_datasets",
]  # fmt: skip

DATASETS_FILE = "datasets.json"
"""The file in a run's OUTPUT_DIR."""


def describe_datasets(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """What a run stores of its datasets; those that are read from no JSON are left out.

    Args:
        names: of datasets, numbered as the model numbers its classes.

    Returns:
        For each name a dict: ``json`` and ``images``, absolute paths; ``classes``, in the order of
        the class numbers; ``colors``, one "#RRGGBB" for each class.
    """
    described = {}
    for name in names:
        known = MetadataCatalog.get(name) if name in DatasetCatalog.list() else {}
        if known.get("json_file") is None or known.get("image_root") is None:
            continue
        classes, own = class_order(name) or [], known.get("thing_colors", ())
        colors = ["#{:02X}{:02X}{:02X}".format(*color) for color in own] or CATEGORY_COLORS
        described[name] = {
            "json": os.path.abspath(given_json(name)),
            "images": os.path.abspath(known.image_root),
            "classes": classes,
            "colors": list(itertools.islice(itertools.cycle(colors), len(classes))),
        }
    return described


def save_run_datasets(folder: str, datasets: Mapping[str, dict[str, Any]]) -> None:
    """Writes the datasets of :func:`describe_datasets` to a run's folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    with written_whole(os.path.join(folder, DATASETS_FILE), "w") as file:
        json.dump(datasets, file, indent=1)


def run_datasets(folder: str | Path) -> dict[str, dict[str, Any]]:
    """The datasets that a run has stored, by name; see :func:`describe_datasets`.

    Args:
        folder: the run's OUTPUT_DIR.

    Returns:
        An empty dict if the folder has no such file.

    Raises:
        UserError: the file holds something else.
    """
    path = Path(folder, DATASETS_FILE)
    if not path.is_file():
        return {}
    try:
        datasets = json.loads(path.read_text(encoding="utf-8"))
        for name, dataset in datasets.items():
            classes, colors = dataset["classes"], dataset["colors"]
            texts = [dataset["json"], dataset["images"], *classes, *colors]
            if len(colors) != len(classes) or not all(type(text) is str for text in texts):
                raise ValueError(f"{name!r} has values of another kind")
            list(map(ImageColor.getrgb, colors))
    except (AttributeError, KeyError, OSError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} does not describe the datasets of a run ({type(error).__name__}: "
            f"{one_line(error)}): expected for each name json, images, classes, and a color for "
            "each class. Delete the file, and give --dataset NAME=JSON:IMAGES"
        ) from error
    return datasets


def class_colors(*folders: str | Path) -> dict[str, str]:
    """The colours "#RRGGBB" that runs have stored of classes, by name; the first run's hold.

    Args:
        folders: of runs; those without stored datasets have none.

    Raises:
        UserError: see :func:`run_datasets`.
    """
    datasets = [each for folder in folders for each in run_datasets(folder).values()]
    colors: dict[str, str] = {}
    for each in reversed(datasets):
        colors.update(zip(each["classes"], each["colors"], strict=True))
    return colors


def run_folders(config_file: str, weights: str) -> list[Path]:
    """The folders of runs that a command names by their config or their weights.

    Args:
        config_file: if it is the config.yaml that a run has written, its folder is the first.
        weights: MODEL.WEIGHTS; "" for none.
    """
    files = [Path(config_file)] if Path(config_file).name == "config.yaml" else []
    return [file.parent for file in (*files, *([Path(weights)] if weights else []))]


def register_with_runs(
    specs: Iterable[str], *folders: str | Path, checked: bool = False
) -> list[str]:
    """Registers datasets from --dataset, and those of runs whose names are not given there.

    If several runs have the same name, the first is taken. A file of a run's dataset that has moved
    is reported when it is needed, by :func:`fpn_plugin.data.check_datasets`.

    Args:
        specs: see :func:`fpn_plugin.data.register_datasets`.
        folders: of runs.
        checked: see :func:`fpn_plugin.data.register_datasets`.

    Returns:
        The specs, and as specs the other datasets of the runs whose files are there.

    Raises:
        UserError: see :func:`fpn_plugin.data.register_datasets` and :func:`run_datasets`.
    """
    specs = list(specs)
    register_datasets(specs, checked=checked)
    given = {spec.partition("=")[0] for spec in specs}
    datasets: dict[str, dict[str, Any]] = {}
    for folder in folders:
        datasets = {**run_datasets(folder), **datasets}
    for name, dataset in datasets.items():
        if name in given:
            continue
        json_file, images = dataset["json"], dataset["images"]
        metadata = {"thing_colors": list(map(ImageColor.getrgb, dataset["colors"]))}
        there = os.path.isfile(json_file)
        if not there:  # else they are read from it
            metadata["thing_classes"] = dataset["classes"]
        registered = register_of_run(name, json_file, images, **metadata)
        if registered and there and os.path.isdir(images):
            specs.append(f"{name}={json_file}:{images}")
    return specs

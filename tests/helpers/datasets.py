"""COCO-format datasets: written to a folder, and registered only for a while."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image


@contextmanager
def forgotten() -> Iterator[None]:
    """Removes from Detectron2's catalogs what is registered within it."""
    before = [(catalog, set(catalog.list())) for catalog in (DatasetCatalog, MetadataCatalog)]
    try:
        yield
    finally:
        for catalog, names in before:
            for name in set(catalog.list()) - names:
                catalog.remove(name)


def write_dataset(folder: Path, name: str, content: dict) -> str:
    """Writes a JSON, and images unless they are there; returns what --dataset takes."""
    images, path = folder / "images", folder / f"{name}.json"
    images.mkdir(exist_ok=True)
    for record in content["images"]:
        if not (images / record["file_name"]).is_file():
            picture = Image.new("RGB", (record["width"], record["height"]), (90, 60, 30))
            picture.save(images / record["file_name"])
    path.write_text(json.dumps(content))
    return f"{name}={path}:{images}"

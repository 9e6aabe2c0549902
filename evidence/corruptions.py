"""Small COCO-format datasets, and corruptions of them."""

from __future__ import annotations

import copy
import json
import math
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

__all__ = ["CORRUPTIONS", "CorruptDataset", "make_dataset"]

_ORIENTATION = 0x0112
_EXIF_TURNS = (5, 6, 7, 8)
# Values in the place of right ones.
_JUNK = [
    None, True, False, -1, 0, 1, 7, 0.5, -0.0, 1e9, 2**70, -(2**63), math.nan, math.inf, -math.inf,
    "", "x", "1", "ü b\n", "\ud800", [], [None], [[]], [1, 2], [1, 2, 3, 4], [0, 0, 1e-5, 5],
    [1, 2, "3", 4], [[1, 2, 3, 4]], [[1, 1, 9, 1, 9, 9]], {}, {"size": [4, 4], "counts": "0"},
    {"size": [1, 1], "counts": [1]}, [10**400, 0, 1, 1],
]  # fmt: skip


@dataclass
class CorruptDataset:
    """A dataset on the disk.

    Args:
        folder: has ``data.json`` and ``images/``.
        content: of the JSON.
        colours: the one colour of each image file, RGB; None if it is unknown.
    """

    folder: Path
    content: dict[str, Any]
    colours: dict[str, tuple[int, int, int] | None] = field(default_factory=dict)

    @property
    def json_file(self) -> str:
        """Path of the JSON."""
        return str(self.folder / "data.json")

    @property
    def images(self) -> str:
        """Path of the image folder."""
        return str(self.folder / "images")

    def write(self) -> None:
        """Writes the JSON."""
        Path(self.json_file).write_text(json.dumps(self.content), encoding="utf-8")

    def path(self, record: dict[str, Any]) -> Path:
        """Path of an image; of no file if its name is corrupt."""
        name = record.get("file_name")
        usable = isinstance(name, str) and name.isascii() and name.endswith(".png")
        return Path(self.images, name if usable else "none.png")


def make_dataset(folder: Path, rng: np.random.Generator) -> CorruptDataset:
    """A whole dataset of three images, one colour each, and some annotations of two categories."""
    (folder / "images").mkdir(parents=True)
    made = CorruptDataset(folder, {"images": [], "annotations": [], "categories": []})
    made.content["categories"] = [{"id": 9, "name": "cell"}, {"id": 4, "name": "ring"}]
    for number in (5, 2, 8):
        width, height = (int(v) for v in rng.integers(20, 60, 2))
        name, colour = f"{number}.png", tuple(int(v) for v in rng.integers(0, 256, 3))
        Image.new("RGB", (width, height), colour).save(folder / "images" / name)
        made.colours[name] = colour
        record = {"id": number, "file_name": name, "width": width, "height": height}
        made.content["images"].append(record)
        for _ in range(int(rng.integers(1, 4))):
            x, y = (float(rng.uniform(0, side - 8)) for side in (width, height))
            right, bottom = float(rng.uniform(x + 4, width)), float(rng.uniform(y + 4, height))
            made.content["annotations"].append(
                {
                    "id": len(made.content["annotations"]) + 1,
                    "image_id": number,
                    "category_id": int(rng.choice([9, 4])),
                    "bbox": [x, y, right - x, bottom - y],
                    "area": (right - x) * (bottom - y),
                    "iscrowd": 0,
                    "segmentation": [[x, y, right, y, right, bottom]],
                }
            )
    return made


Corruption = Callable[[CorruptDataset, np.random.Generator], None]
CORRUPTIONS: dict[str, Corruption] = {}


def _corruption(function: Corruption) -> Corruption:
    CORRUPTIONS[function.__name__.strip("_")] = function
    return function


def _one(records: Any, rng: np.random.Generator) -> dict[str, Any]:
    """A record, or an empty one if an earlier corruption left none."""
    whole = [r for r in records if isinstance(r, dict)] if isinstance(records, list) else []
    return whole[int(rng.integers(len(whole)))] if whole else {}


def _opened(path: Path) -> Image.Image | None:
    """An image, or None if an earlier corruption left none."""
    try:
        with Image.open(path) as image:
            image.load()
            return image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


def _part(made: CorruptDataset, rng: np.random.Generator) -> list[Any]:
    records = made.content.get(str(rng.choice(["images", "annotations", "categories"])))
    return records if isinstance(records, list) else []


def _image(made: CorruptDataset, rng: np.random.Generator) -> dict[str, Any]:
    return _one(made.content.get("images"), rng)


def _annotation(made: CorruptDataset, rng: np.random.Generator) -> dict[str, Any]:
    return _one(made.content.get("annotations"), rng)


@_corruption
def _value(made: CorruptDataset, rng: np.random.Generator) -> None:
    record = _one(_part(made, rng), rng)
    if record:
        key = str(rng.choice(sorted(record)))
        record[key] = copy.deepcopy(_JUNK[int(rng.integers(len(_JUNK)))])


@_corruption
def _missing_key(made: CorruptDataset, rng: np.random.Generator) -> None:
    record = _one(_part(made, rng), rng)
    if record:
        del record[str(rng.choice(sorted(record)))]


@_corruption
def _more_keys(made: CorruptDataset, rng: np.random.Generator) -> None:
    key = str(rng.choice(["keypoints", "num_keypoints", "ignore", "attributes"]))
    _annotation(made, rng)[key] = copy.deepcopy(_JUNK[int(rng.integers(len(_JUNK)))])


@_corruption
def _record_twice(made: CorruptDataset, rng: np.random.Generator) -> None:
    records = _part(made, rng)
    records.append(copy.deepcopy(_one(records, rng)))


@_corruption
def _record_is_junk(made: CorruptDataset, rng: np.random.Generator) -> None:
    _part(made, rng).append(copy.deepcopy(_JUNK[int(rng.integers(len(_JUNK)))]))


@_corruption
def _part_is_junk(made: CorruptDataset, rng: np.random.Generator) -> None:
    part = str(rng.choice(["images", "annotations", "categories"]))
    made.content[part] = copy.deepcopy(_JUNK[int(rng.integers(len(_JUNK)))])


@_corruption
def _id_of_nothing(made: CorruptDataset, rng: np.random.Generator) -> None:
    _annotation(made, rng)[str(rng.choice(["image_id", "category_id"]))] = int(rng.integers(10**9))


@_corruption
def _box(made: CorruptDataset, rng: np.random.Generator) -> None:
    kinds = [0.0, 1e-9, -3.0, 1.0, 30.0, 59.0, 1e3, 1e9, -1e9, math.nan, math.inf, 1e308]
    _annotation(made, rng)["bbox"] = [float(v) for v in rng.choice(kinds, 4)]


@_corruption
def _box_moved(made: CorruptDataset, rng: np.random.Generator) -> None:
    x, y, width, height = rng.uniform([-60, -60, 0, 0], 60, (4,)).tolist()
    _annotation(made, rng)["bbox"] = [x, y, width, height]


@_corruption
def _crowd(made: CorruptDataset, rng: np.random.Generator) -> None:
    record = _annotation(made, rng)
    record.update(iscrowd=1, segmentation={"size": [20, 20], "counts": [400]})


@_corruption
def _no_annotations(made: CorruptDataset, rng: np.random.Generator) -> None:
    made.content["annotations"] = []


@_corruption
def _no_images(made: CorruptDataset, rng: np.random.Generator) -> None:
    made.content["images"] = []


@_corruption
def _size_in_json(made: CorruptDataset, rng: np.random.Generator) -> None:
    record = _image(made, rng)
    record["width"], record["height"] = record.get("height"), record.get("width")


@_corruption
def _name(made: CorruptDataset, rng: np.random.Generator) -> None:
    names = ["ü ñ 木.png", "with  spaces .png", "a\nb.png", "sub/deep/c.png", "😀.png", "%s{}.png"]
    record, name = _image(made, rng), str(rng.choice(names))
    path = made.path(record)
    if path.is_file():
        Path(made.images, name).parent.mkdir(parents=True, exist_ok=True)
        path.rename(Path(made.images, name))
        made.colours[name] = made.colours.pop(record["file_name"], None)
        record["file_name"] = name


@_corruption
def _traversal(made: CorruptDataset, rng: np.random.Generator) -> None:
    names = ["../images/5.png", "/etc/passwd", "..\\5.png", "a/../../5.png", "..", "C:\\5.png"]
    _image(made, rng)["file_name"] = str(rng.choice(names))


@_corruption
def _no_file(made: CorruptDataset, rng: np.random.Generator) -> None:
    path = made.path(_image(made, rng))
    if not path.is_dir():
        path.unlink(missing_ok=True)
        if rng.random() < 0.5:
            path.mkdir()


@_corruption
def _cut_off(made: CorruptDataset, rng: np.random.Generator) -> None:
    record = _image(made, rng)
    path = made.path(record)
    image = _opened(path)
    if image is not None:
        noise = rng.integers(0, 256, (*image.size[::-1], 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, format=str(rng.choice(["JPEG", "PNG", "BMP", "TIFF"])))
        content = path.read_bytes()
        path.write_bytes(content[: int(rng.integers(len(content)))])
        made.colours[record["file_name"]] = None


@_corruption
def _damaged(made: CorruptDataset, rng: np.random.Generator) -> None:
    record = _image(made, rng)
    path = made.path(record)
    if path.is_file():
        content = bytearray(path.read_bytes())
        for at in rng.integers(0, max(len(content), 1), 5).tolist():
            content[at : at + 1] = bytes([int(rng.integers(256))])
        path.write_bytes(bytes(content))
        made.colours[record["file_name"]] = None


@_corruption
def _bomb(made: CorruptDataset, rng: np.random.Generator) -> None:
    path = made.path(_image(made, rng))
    if path.is_file():  # a header of 10 gigapixels, and nothing behind it
        header = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
        size, crc = struct.pack(">I", 13), struct.pack(">I", zlib.crc32(header))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + size + header + crc)


@_corruption
def _mode(made: CorruptDataset, rng: np.random.Generator) -> None:
    record = _image(made, rng)
    path = made.path(record)
    image = _opened(path)
    if image is None or record.get("file_name") not in made.colours:
        return
    mode = str(rng.choice(["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"]))
    shade = int(rng.choice([0, 255])) if mode == "1" else int(rng.integers(256))
    kind, colour = "PNG", (shade, shade, shade)
    if mode == "RGBA":
        colour = tuple(int(v) for v in rng.integers(0, 256, 3))
        image = Image.new("RGBA", image.size, (*colour, int(rng.integers(256))))
    elif mode == "CMYK":
        kind = str(rng.choice(["JPEG", "TIFF"]))
        ink, black = int(rng.integers(256)), int(rng.integers(256))
        image = Image.new("CMYK", image.size, (ink, 0, 0, black))
        key = 255 - black
        colour = (round((255 - ink) * key / 255), key, key)
    elif mode in ("YCbCr", "LAB"):
        kind, colour = "TIFF", None
        image = Image.new(mode, image.size)
    elif mode in ("I;16", "I", "F"):
        kind = "TIFF"
        image = Image.fromarray(
            np.full(
                image.size[::-1],
                shade * 200,
                {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode],
            )
        )
    else:
        image = Image.new("L", image.size, shade).convert(mode)
    try:
        image.save(path, format=kind)
    except OSError:  # two corruptions that exclude each other
        return
    made.colours[record["file_name"]] = colour


@_corruption
def _turned_by_exif(made: CorruptDataset, rng: np.random.Generator) -> None:
    record = _image(made, rng)
    path = made.path(record)
    image = _opened(path)
    if image is None or image.mode != "RGB":
        return
    exif, orientation = image.getexif(), int(rng.integers(0, 10))
    exif[_ORIENTATION] = orientation
    image.save(path, format=str(rng.choice(["PNG", "JPEG"])), exif=exif)
    if orientation in _EXIF_TURNS and rng.random() < 0.7:
        record["width"], record["height"] = image.size[1], image.size[0]
        _annotations_of(made, record)


@_corruption
def _odd_size(made: CorruptDataset, rng: np.random.Generator) -> None:
    record = _image(made, rng)
    path = made.path(record)
    colour = made.colours.get(record.get("file_name")) if path.is_file() else None
    if colour is not None:
        sizes = [(1, 1), (1, 5000), (5000, 1), (1, 100), (120, 1), (2, 1), (1, 129), (300, 2)]
        record["width"], record["height"] = sizes[int(rng.integers(len(sizes)))]
        Image.new("RGB", (record["width"], record["height"]), colour).save(path, format="PNG")
        _annotations_of(made, record)


def _annotations_of(made: CorruptDataset, image: dict[str, Any]) -> None:
    """Makes an image's annotations cover all of it."""
    width, height = image["width"], image["height"]
    annotations = made.content.get("annotations")
    for annotation in annotations if isinstance(annotations, list) else ():
        if isinstance(annotation, dict) and annotation.get("image_id") == image.get("id"):
            annotation["bbox"] = [0, 0, width, height]
            annotation["segmentation"] = [[0, 0, width, 0, width, height]]


@_corruption
def _many_categories(made: CorruptDataset, rng: np.random.Generator) -> None:
    if isinstance(made.content.get("categories"), list):
        more = [{"id": 10_000 + i, "name": f"c{i}"} for i in range(2000)]
        made.content["categories"] += more

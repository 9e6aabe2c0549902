"""Labels in the formats of VOC, YOLO and LabelMe.

Coordinates become COCO's: pixels from 0 at the image's corner. VOC counts pixels from 1, and the
last one belongs to the box, as in its devkit: corners are ``[xmin - 1, ymin - 1, xmax, ymax]``.
YOLO's are fractions of the image's size. LabelMe's are COCO's.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from posixpath import basename, dirname, join, splitext
from typing import Any, NoReturn
from xml.etree.ElementTree import Element, TreeBuilder
from xml.parsers import expat

import yaml

from fpn_plugin.errors import UserError, one_line

from .label_folders import LabelError, LabelFolder, LabelledImage, LabelledObject, stem, suffix
from .problems import shortened
from .shapes import NUMBER, Size

__all__ = ["read_labels"]

_CIRCLE = 64  # corners of the polygon of a circle
_POINTS = {"rectangle": (2, 4), "circle": (2, 2), "polygon": (3, math.inf)}  # of LabelMe's shapes


def read_labels(data: LabelFolder) -> tuple[str, list[str], list[LabelledImage]]:
    """The format of a folder's labels, the names of its classes, and the images of its split.

    What cannot be read is added to the folder's problems. Images without labels have no objects.

    Raises:
        UserError: there are no labels, or those of several formats or splits.
    """
    names_file, config = _yolo_config(data)
    stems = {stem(name) for name in data.images}
    found = {
        "VOC": next(iter(data.ending(".xml")), ""),
        "LabelMe": next((name for name in data.ending(".json") if stem(name) in stems), ""),
    }
    # Others than YOLO's have a classes.txt too.
    if suffix(names_file) != ".txt" or not any(found.values()):
        found["YOLO"] = names_file
    formats = {name: file for name, file in found.items() if file}
    if not formats:
        raise UserError(
            f"{data.path} has no labels: expected VOC's (*.xml), YOLO's (*.txt, and data.yaml or "
            "classes.txt with the names of classes) or LabelMe's (*.json of the images' names). A "
            "COCO JSON is given as NAME=JSON:IMAGES, and a split of YOLO's as NAME=FOLDER:SPLIT"
        )
    if len(formats) > 1:
        shown = ", ".join(f"{name}'s ({file})" for name, file in formats.items())
        raise UserError(f"{data.path} has several formats, {shown}: keep the labels of one")
    (label_format,) = formats
    if label_format == "YOLO":
        names, labelled, images = _yolo(data, config)
    else:
        names, labelled = {"VOC": _voc, "LabelMe": _labelme}[label_format](data)
        # Not those of VOC's segmentation.
        folders = {dirname(each.file_name) for each in labelled}
        chosen = filter(data.in_split, data.images) if not _voc_sets(data) else ()
        images = [name for name in chosen if dirname(name) in folders]
    known = {each.file_name for each in labelled}
    for name in (name for name in images if name not in known):
        data.report("image_unlabelled", name, "has no label file that can be read")
        with data.reported(name):
            labelled.append(LabelledImage(name, data.size_of(name), []))
    return label_format, names, labelled


def _number(text: str | None) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise LabelError(f"{shortened(text)} is no number")
    return value


def _extent(points: Sequence[Sequence[float]]) -> tuple[float, float, float, float]:
    xs, ys = zip(*points, strict=True)
    return min(xs), min(ys), max(xs), max(ys)


def _flat(points: Sequence[Sequence[float]]) -> list[float]:
    return [value for point in points for value in point]


# ---- VOC


def _voc_sets(data: LabelFolder) -> dict[str, list[str]]:
    """Files that list the labels of splits, by split; there may be several years."""
    sets: dict[str, list[str]] = {}
    for name in data.ending(".txt"):
        if dirname(name).endswith("ImageSets/Main"):
            sets.setdefault(stem(name), []).append(name)
    return sets


def _voc(data: LabelFolder) -> tuple[list[str], list[LabelledImage]]:
    sets = _voc_sets(data)
    # Others, such as aeroplane_train, are of one class.
    data.check_split([name for name in sets if "_" not in name or name == data.split])
    if data.split in sets:
        chosen = {label for each in sets[data.split] for label in _listed_labels(data, each)}
    else:
        chosen = {*filter(data.in_split, data.ending(".xml"))}
    names, least, labelled = set(), math.inf, []
    for label in data.progress(data.ending(".xml")):
        with data.reported(label):
            root = _xml(Path(data.path, label))
            if root.tag != "annotation":
                raise LabelError(f"is no VOC label: it holds <{root.tag}>", "label_left_out")
            objects = []
            for element in root.findall("object"):
                where = f"{label}, line {element.get('line')}"
                with data.reported(where):
                    objects.append(_voc_object(element, where))
                for part in element.findall("part"):
                    where = f"{label}, line {part.get('line')}"
                    data.report("label_left_out", where, "is a part of an object")
            names |= {each.name for each in objects}
            least = min([least, *(side for each in objects for side in each.corners[:2])])
            if label in chosen:
                named = root.findtext("filename") or f"{stem(label)}.jpg"
                image = data.image_of(label, named)
                width, height = (
                    _number(root.findtext(f"size/{k}", "0")) for k in ("width", "height")
                )
                # Some tools write a size of 0.
                known = width > 0 and height > 0
                size = (round(width), round(height)) if known else data.size_of(image)
                labelled.append(LabelledImage(image, size, objects))
    first = int(least >= 1)
    if not first:
        message = f"a corner is {least:g}, and VOC's are 1 or more: all corners are read as from 0"
        data.report("labels_from_zero", data.path, message)
    for each in (each for image in labelled for each in image.objects):
        x0, y0, x1, y1 = each.corners
        each.corners = x0 - first, y0 - first, x1, y1
        each.polygons = [[value - first for value in outline] for outline in each.polygons]
    return sorted(names), labelled


def _listed_labels(data: LabelFolder, set_file: str) -> Iterator[str]:
    """The label files that a file of ImageSets/Main lists."""
    root = set_file.removesuffix(f"ImageSets/Main/{basename(set_file)}")
    for row, line in enumerate(data.text(set_file).splitlines(), 1):
        for word in line.split()[:1]:  # in files of one class, whether it is there follows
            label = f"{root}Annotations/{word}.xml"
            if label in data.files:
                yield label
            else:
                data.report("label_file", f"{set_file}, line {row}", f"there is no {label}")


def _xml(path: Path) -> Element:
    """An XML file, whose elements get their lines. A document type, and so entities, is refused."""

    def refuse(*declared: object) -> NoReturn:
        raise LabelError("declares a document type, which VOC's labels have not")

    def start(tag: str, attributes: dict[str, str]) -> None:
        builder.start(tag, {"line": str(parser.CurrentLineNumber)})

    builder, parser = TreeBuilder(), expat.ParserCreate()
    parser.StartElementHandler, parser.EndElementHandler = start, builder.end
    parser.CharacterDataHandler, parser.StartDoctypeDeclHandler = builder.data, refuse
    try:
        parser.Parse(path.read_bytes(), True)
    except (OSError, expat.ExpatError) as error:
        raise LabelError(f"cannot be read: {one_line(error)}") from error
    return builder.close()


def _voc_object(element: Element, where: str) -> LabelledObject:
    name, box = (element.findtext("name") or "").strip(), element.find("bndbox")
    if not name or box is None:
        there = ", ".join(child.tag for child in element)
        raise LabelError(f"an object has no {'bndbox' if name else 'name'}; it has {there}")
    corners = [_number(box.findtext(side)) for side in ("xmin", "ymin", "xmax", "ymax")]
    polygons = []
    for outline in element.findall("polygon"):  # as Roboflow writes them
        points = []
        for number in count(1):
            if outline.find(f"x{number}") is None:
                break
            points.append([_number(outline.findtext(f"{axis}{number}")) for axis in "xy"])
        if len(points) < 3:
            raise LabelError(f"a polygon has {len(points)} points, expected x1, y1 to x3, y3")
        polygons.append(_flat(points))
    # VOC's evaluation ignores difficult objects, as COCO's does crowds.
    crowd = int((element.findtext("difficult") or "0").strip() == "1")
    return LabelledObject(where, name, (*corners,), polygons, crowd)


# ---- YOLO


def _yolo_config(data: LabelFolder) -> tuple[str, dict[str, Any]]:
    """The file that names the classes, data.yaml or classes.txt, and its content; or "" and {}."""
    configs = {}
    for name in data.ending(".yaml", ".yml"):
        if "/" not in name:
            try:
                content = yaml.safe_load(data.text(name))
            except (yaml.YAMLError, ValueError, RecursionError) as error:
                raise UserError(f"{data.path}/{name} is no YAML: {one_line(error)}") from error
            if isinstance(content, dict) and "names" in content:
                configs[name] = content
    if not configs:
        for name in data.files:
            if basename(name) == "classes.txt":
                lines = map(str.strip, data.text(name).splitlines())
                return name, {"names": _class_names([*filter(None, lines)], name)}
        return "", {}
    name = "data.yaml" if "data.yaml" in configs else next(iter(configs))
    if len(configs) > 1 and name != "data.yaml":
        raise UserError(f"{data.path} has several YOLO configs: {', '.join(configs)}; keep one")
    content, where = configs[name], f"{data.path}/{name}"
    if "kpt_shape" in content:
        raise UserError(f"{where}: YOLO's keypoints (kpt_shape) are not read: give a COCO JSON")
    content["names"] = names = _class_names(content["names"], where)
    if content.get("nc", len(names)) != len(names):
        raise UserError(f"{where}: nc is {content['nc']}, but there are {len(names)} names")
    return name, content


def _class_names(names: Any, where: str) -> list[str]:
    if isinstance(names, dict) and names.keys() == {*range(len(names))}:
        names = [names[number] for number in range(len(names))]
    if not isinstance(names, list) or not names or len({*map(str, names)}) < len(names):
        expected = "a list, or a name for each of 0, 1, 2, ..., and no name twice"
        raise UserError(
            f"{where}: the names of classes are {shortened(names)}, expected {expected}"
        )
    return [*map(str, names)]


def _yolo(
    data: LabelFolder, config: dict[str, Any]
) -> tuple[list[str], list[LabelledImage], list[str]]:
    splits = [split for split in ("train", "val", "test") if config.get(split)]
    data.check_split(splits)
    split = data.split or "".join(splits)
    images = _yolo_images(data, split, config) if splits else filter(data.in_split, data.images)
    labels = {image: _label_of(image) for image in images}
    there = [image for image in labels if labels[image] in data.files]
    if not there:
        tried = next((f": that of {image} would be {labels[image]}" for image in labels), "")
        raise UserError(f"{data.path}{split and f':{split}'}: no image has a label file{tried}")
    labelled, users = [], {}
    for image in data.progress(there):
        label = labels[image]
        if (other := users.setdefault(label, image)) != image:
            data.report("label_file", label, f"is the label file of {other} and of {image}")
        with data.reported(label):
            size, objects = data.size_of(image), []
            for number, row in enumerate(data.text(label).splitlines(), 1):
                where = f"{label}, line {number}"
                with data.reported(where):
                    if row.strip():
                        objects.append(_yolo_object(row.split(), config["names"], size, where))
            labelled.append(LabelledImage(image, size, objects))
    folders, of_images = {dirname(label) for label in users}, {*map(_label_of, data.images)}
    for name in data.ending(".txt"):
        other = name in of_images or basename(name).startswith(("classes", "README"))
        if dirname(name) in folders and not other:
            data.report("image_missing", name, "is the label file of no image")
    return config["names"], labelled, [image for image in labels if labels[image] not in users]


def _yolo_images(data: LabelFolder, split: str, config: dict[str, Any]) -> list[str]:
    """The images of a split: those of folders, or of text files that list them.

    Folders above are looked for in the folder, and left out otherwise: the paths are of another
    machine, or Roboflow's ``../train/images``.
    """
    found, given = [], config[split]
    for each in map(str, given if isinstance(given, list) else [given]):
        parts, least = (
            [part for part in path.split("/") if part not in ("", ".", "..")]
            for path in (os.path.join(str(config.get("path") or ""), each), each)
        )
        fewest = min(2, len(least)) if os.path.isabs(each) else len(least)
        for start in range(len(parts) - fewest + 1):
            name = "/".join(parts[start:])
            inside = [image for image in data.images if image.startswith(name and f"{name}/")]
            if inside or name in data.files:
                found += inside or _listed_images(data, name)
                break
        else:
            raise UserError(
                f"{data.path}: {split} is {each!r} in its YAML, and the folder has neither such a "
                "folder of images nor such a list of images"
            )
    return list(dict.fromkeys(found))


def _listed_images(data: LabelFolder, name: str) -> Iterator[str]:
    """The images that a text file lists by paths, which may begin with folders above."""
    for row, line in enumerate(data.text(name).splitlines(), 1):
        parts = [part for part in line.strip().split("/") if part not in ("", ".", "..")]
        ends = (join(*parts[start:]) for start in range(len(parts)))
        found = (path for end in ends for path in (join(dirname(name), end), end))
        image = next((path for path in found if path in data.images), None)
        if image is not None:
            yield image
        elif line.strip():
            data.report("image_missing", f"{name}, line {row}", f"there is no image {line!r}")


def _label_of(image: str) -> str:
    """The label file of an image: in ``.../labels/...`` for ``.../images/...``, else next to it."""
    before, there, after = f"/{splitext(image)[0]}.txt".rpartition("/images/")
    return f"{before}{there and '/labels/'}{after}"[1:]


def _yolo_object(
    words: Sequence[str], names: Sequence[str], size: Size, where: str
) -> LabelledObject:
    number, *values = map(_number, words)
    if number not in range(len(names)):
        message = f"class {words[0]} has no name: there are 0 to {len(names) - 1}"
        raise LabelError(message, "category_unknown")
    name, (width, height) = names[int(number)], size
    if len(values) == 4:
        x, y, w, h = (value * side for value, side in zip(values, (*size, *size), strict=True))
        return LabelledObject(where, name, (x - w / 2, y - h / 2, x + w / 2, y + h / 2))
    if len(values) < 6 or len(values) % 2:
        raise LabelError(
            f"has {len(words)} numbers, expected 5 (class, centre x, centre y, width, height), or "
            "a class and 3 or more points x y"
        )
    points = [(x * width, y * height) for x, y in zip(values[::2], values[1::2], strict=True)]
    return LabelledObject(where, name, _extent(points), [_flat(points)])


# ---- LabelMe


def _labelme(data: LabelFolder) -> tuple[list[str], list[LabelledImage]]:
    data.check_split()
    names, labelled = set(), []
    for label in data.progress(data.ending(".json")):
        with data.reported(label):
            try:
                content = json.loads(data.text(label))
            except (ValueError, RecursionError) as error:
                raise LabelError(f"is no JSON: {one_line(error)}") from error
            if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
                raise LabelError("is not LabelMe's: it has no list 'shapes'", "label_left_out")
            objects: dict[tuple[str, str], LabelledObject] = {}
            for number, shape in enumerate(content["shapes"]):
                where = f"{label}, shapes[{number}]"
                with data.reported(where):
                    found = _labelme_object(shape, where)
                    group = shape.get("group_id")
                    key = (found.name, where if group is None else repr(group))
                    objects[key] = _joined(objects[key], found) if key in objects else found
            names |= {found.name for found in objects.values()}
            if data.in_split(label):
                named = content.get("imagePath")
                image = data.image_of(label, named if type(named) is str else f"{stem(label)}.jpg")
                size = content.get("imageWidth"), content.get("imageHeight")
                known = all(type(side) is int and side > 0 for side in size)
                size = size if known else data.size_of(image)
                labelled.append(LabelledImage(image, size, list(objects.values())))
    return sorted(names), labelled


def _joined(first: LabelledObject, second: LabelledObject) -> LabelledObject:
    """Two shapes of one class and group, which are parts of one object."""
    corners = _extent([each.corners[at : at + 2] for each in (first, second) for at in (0, 2)])
    both = first.polygons and second.polygons
    polygons = first.polygons + second.polygons if both else []
    return LabelledObject(first.where, first.name, corners, polygons)


def _labelme_object(shape: Any, where: str) -> LabelledObject:
    shape = shape if isinstance(shape, dict) else {}
    name, points = shape.get("label"), shape.get("points")
    kind = shape.get("shape_type") or "polygon"  # as of old versions
    if type(name) is not str or not name:
        raise LabelError(f"its label is {shortened(name)}, expected the name of a class")
    if kind in ("point", "points", "line", "linestrip"):
        raise LabelError(f"is a {kind} of {name!r}, which has no area", "label_left_out")
    if kind not in _POINTS:
        expected = "rectangle, polygon or circle"
        raise LabelError(f"its shape_type is {shortened(kind)}, expected {expected}")
    least, most = _POINTS[kind]
    if not isinstance(points, list) or not least <= len(points) <= most or not all(
        isinstance(point, list) and len(point) == 2 and {*map(type, point)} <= {*NUMBER}
        and all(map(math.isfinite, point)) for point in points
    ):  # fmt: skip
        raise LabelError(f"its points are {shortened(points)}, expected x and y of a {kind}")
    if kind == "circle":
        (x, y), edge = points
        radius = math.dist((x, y), edge)
        turns = [2 * math.pi * number / _CIRCLE for number in range(_CIRCLE)]
        points = [(x + radius * math.cos(turn), y + radius * math.sin(turn)) for turn in turns]
    polygons = [] if kind == "rectangle" else [_flat(points)]
    return LabelledObject(where, name, _extent(points), polygons)

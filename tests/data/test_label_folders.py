"""Folders of VOC, YOLO and LabelMe labels, read as the COCO JSONs that they are converted to."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from fpn_plugin import UserError
from fpn_plugin.cli.check import check_main
from fpn_plugin.data import check_coco, check_dataset, register_datasets, registered_specs
from fpn_plugin.data.folder_json import folder_json, label_problems
from fpn_plugin.fitting import read_ground_truth
from tests.helpers.label_folders import labelme, voc, write_labels, yolo

CELLS = Path(__file__).parents[2].parent / "shared" / "data" / "cells"
WIDTH, HEIGHT = 40, 30


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write(folder: Path, files: dict[str, str]) -> Path:
    """Writes files, of which images have no text."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".png", ".jpg"):
            Image.new("RGB", (WIDTH, HEIGHT), (90, 60, 30)).save(path)
        else:
            path.write_text(text)
    return folder


def converted(folder: Path, split: str = "") -> dict:
    return json.loads(Path(folder_json(str(folder), split)).read_text())


def objects(content: dict) -> list[tuple]:
    """File, class and box of each annotation, in their order."""
    files = {each["id"]: each["file_name"] for each in content["images"]}
    names = {each["id"]: each["name"] for each in content["categories"]}
    return [
        (files[each["image_id"]], names[each["category_id"]], *each["bbox"])
        for each in content["annotations"]
    ]


def voc_of(*boxes: tuple, size: str = "<size><width>40</width><height>30</height></size>") -> str:
    """A VOC file; each box has a line, from the second on: a class, corners, more elements."""
    rows = [f"<annotation><filename>a.png</filename>{size}"]
    for name, corners, *more in boxes:
        sides = zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True)
        box = "".join(f"<{side}>{value}</{side}>" for side, value in sides)
        rows.append(f"<object><name>{name}</name><bndbox>{box}</bndbox>{''.join(more)}</object>")
    return "\n".join([*rows, "</annotation>"])


def labelme_of(*shapes: dict, **more: object) -> str:
    content = {"shapes": shapes, "imagePath": "a.png", "imageWidth": 40, "imageHeight": 30}
    return json.dumps(content | more)


def shape(kind: str | None, *points: list, label: str = "cell", group: int | None = None) -> dict:
    return {"label": label, "shape_type": kind, "points": points, "group_id": group}


YAML = "train: images\nnames: [cell, dust]\n"
# The first two pixels of a row, the second row.
BOX = {
    "voc": {"a.png": "", "a.xml": voc_of(("cell", (1, 2, 2, 2)))},
    "yolo": {"images/a.png": "", "data.yaml": YAML, "labels/a.txt": "0 0.025 0.05 0.05 0.0333333"},
    "labelme": {"a.png": "", "a.json": labelme_of(shape("rectangle", [2, 2], [0, 1]))},
}


@pytest.mark.parametrize("label_format", BOX)
def test_a_box_covers_the_same_pixels_in_each_format(label_format, tmp_path):
    content = converted(write(tmp_path, BOX[label_format]))
    ((_, name, *box),) = objects(content)
    assert name == "cell"
    np.testing.assert_allclose(box, [0, 1, 2, 1], atol=1e-5)
    (annotation,) = content["annotations"]
    assert (annotation["area"], annotation["iscrowd"]) == (pytest.approx(2, abs=1e-4), 0)
    assert content["images"][0] | {"file_name": ""} == {
        "id": 1, "file_name": "", "width": 40, "height": 30,
    }  # fmt: skip


def test_difficult_objects_and_polygons_of_voc(tmp_path):
    polygon = "<polygon><x1>1</x1><y1>1</y1><x2>5</x2><y2>1</y2><x3>5</x3><y3>4</y3></polygon>"
    label = voc_of(
        ("dust", (1, 1, 4, 3), "<difficult>1</difficult>"), ("cell", (1, 1, 4, 3), polygon)
    )
    dust, cell = converted(write(tmp_path, {"a.png": "", "a.xml": label}))["annotations"]
    assert (dust["category_id"], dust["iscrowd"], dust["segmentation"]) == (2, 1, [])
    assert (cell["category_id"], cell["iscrowd"]) == (1, 0)
    assert (cell["segmentation"], cell["area"]) == ([[0, 0, 4, 0, 4, 3]], 6)


def test_corners_of_voc_that_count_from_zero_are_all_read_so(tmp_path):
    label = voc_of(("cell", (0, 5, 10, 15)), ("cell", (3, 4, 5, 6)))
    content = converted(write(tmp_path, {"a.png": "", "a.xml": label}))
    assert [box[2:] for box in objects(content)] == [(0, 5, 10, 10), (3, 4, 2, 2)]
    (problem,) = label_problems(content)
    assert (problem.kind, problem.refused) == ("labels_from_zero", False)


def test_polygons_of_yolo(tmp_path):
    files = BOX["yolo"] | {"labels/a.txt": "1 0.25 0.2 0.5 0.2 0.5 0.4\n\n0.0 .5 .5 1 1\n"}
    content = converted(write(tmp_path, files))
    first, second = content["annotations"]
    np.testing.assert_allclose(first["segmentation"], [[10, 6, 20, 6, 20, 12]])
    np.testing.assert_allclose(first["bbox"], [10, 6, 10, 6])
    assert (first["area"], first["category_id"]) == (pytest.approx(30), 2)
    assert (second["bbox"], second["category_id"]) == ([0, 0, 40, 30], 1)
    assert [each["label_row"] for each in content["annotations"]] == [
        "labels/a.txt, line 1", "labels/a.txt, line 3",
    ]  # fmt: skip


def test_shapes_of_labelme(tmp_path):
    label = labelme_of(
        shape(None, [1, 1], [5, 1], [5, 4]),
        shape("circle", [20, 15], [23, 19]),
        shape("polygon", [0, 0], [2, 0], [2, 2], group=7),
        shape("polygon", [8, 8], [9, 8], [9, 9], group=7),
        shape("polygon", [8, 8], [9, 8], [9, 9], group=7, label="dust"),
        shape("rectangle", [30, 20], [32, 22], group=8),
        shape("polygon", [31, 20], [35, 20], [35, 24], group=8),
    )
    found = converted(write(tmp_path, {"a.png": "", "a.json": label}))["annotations"]
    triangle, circle, parts, dust, mixed = found
    assert triangle["segmentation"] == [[1, 1, 5, 1, 5, 4]]
    assert (triangle["bbox"], triangle["area"]) == ([1, 1, 4, 3], 6)
    np.testing.assert_allclose(circle["bbox"], [15, 10, 10, 10])
    assert circle["area"] == pytest.approx(math.pi * 25, rel=2e-3)
    assert parts["segmentation"] == [[0, 0, 2, 0, 2, 2], [8, 8, 9, 8, 9, 9]]
    assert (parts["bbox"], parts["area"]) == ([0, 0, 9, 9], 2.5)
    assert (dust["bbox"], dust["category_id"]) == ([8, 8, 1, 1], 2)
    # A rectangle is no outline, so that half of the object has none.
    assert (mixed["bbox"], mixed["segmentation"]) == ([30, 20, 5, 4], [])


@pytest.mark.skipif(not CELLS.is_dir(), reason="real data in ../shared/data are not there")
@pytest.mark.parametrize(
    ("write_one", "folders", "rounding"),
    [
        (voc, ("Annotations", "JPEGImages"), 0),
        (yolo, ("{}/labels", "{}/images"), 1e-3),  # six decimals of 640 pixels
        (labelme, ("{}", "{}"), 0),
    ],
)
def test_the_cells_come_back(write_one, folders, rounding, tmp_path):
    splits = {name: json.loads((CELLS / f"{name}.json").read_text()) for name in ("val", "test")}
    for split, coco in splits.items():
        labels, images = (tmp_path / folder.format(split) for folder in folders)
        write_labels(write_one, coco, labels)
        images.mkdir(parents=True, exist_ok=True)
        for record in coco["images"]:
            (images / record["file_name"]).symlink_to(CELLS / "images" / record["file_name"])
        stems = [Path(record["file_name"]).stem for record in coco["images"]]
        if write_one is voc:
            write(tmp_path, {f"ImageSets/Main/{split}.txt": "\n".join(stems)})
    if write_one is yolo:
        names = {number: each["name"] for number, each in enumerate(coco["categories"])}
        paths = {split: f"../{split}/images" for split in splits}  # as Roboflow writes them
        write(tmp_path, {"data.yaml": json.dumps({**paths, "names": list(names.values())})})
    for split, coco in splits.items():
        content = converted(tmp_path, split)
        by_image = {each["file_name"]: [] for each in coco["images"]}
        for name, *rest in objects(coco):
            by_image[name].append(rest)
        expected = [[Path(name).name, *rest] for name in by_image for rest in by_image[name]]
        found = [[Path(name).name, *rest] for name, *rest in objects(content)]
        key = lambda each: each[0]  # noqa: E731
        expected, found = sorted(expected, key=key), sorted(found, key=key)
        assert [each[:2] for each in found] == [each[:2] for each in expected]
        np.testing.assert_allclose(
            [each[2:] for each in found], [each[2:] for each in expected], rtol=0, atol=rounding
        )
        assert len(content["images"]) == len(coco["images"])
        assert not [*label_problems(content)]
        theirs = check_dataset(str(CELLS / f"{split}.json"), str(CELLS / "images"), look="none")
        ours = check_dataset(folder_json(str(tmp_path), split), str(tmp_path), look="headers")
        assert ours.counts == theirs.counts


ROW = "0 0.5 0.5 0.5 0.5"
NAMES = "names: {0: cell, 1: dust}\n"
LAYOUTS = {
    "images and labels": {
        "data.yaml": f"path: ../data/cells\ntrain: images/train\nval: images/val\n{NAMES}",
        "images/train/a.png": "", "labels/train/a.txt": ROW,
        "images/val/b.png": "", "labels/val/b.txt": "",
    },
    "a folder a split": {
        "data.yaml": f"train: ../train/images\nval: ../valid/images\n{NAMES}nc: 2\n",
        "train/images/a.png": "", "train/labels/a.txt": ROW,
        "valid/images/b.png": "", "valid/labels/b.txt": "",
    },
    "absolute paths of another machine": {
        "cells.yaml": f"train: /content/cells/train/images\nval: [/x/val/images]\n{NAMES}",
        "train/images/a.png": "", "train/labels/a.txt": ROW,
        "val/images/b.png": "", "val/labels/b.txt": "",
    },
    "lists of images": {
        "data.yaml": f"path: sub\ntrain: train.txt\nval: val.txt\n{NAMES}",
        "sub/train.txt": "./images/a.png\n", "sub/val.txt": "/home/x/sub/images/b.png\n",
        "sub/images/a.png": "", "sub/labels/a.txt": ROW,
        "sub/images/b.png": "", "sub/labels/b.txt": "",
        "images/a.png": "", "labels/a.txt": "1 0.1 0.1 0.1 0.1",
    },
    "no YAML": {
        "classes.txt": "cell\ndust\n", "README.txt": "not a label",
        "train/a.png": "", "train/a.txt": ROW, "val/b.png": "", "val/b.txt": "",
    },
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_yolo(layout, tmp_path):
    write(tmp_path, LAYOUTS[layout])
    with pytest.raises(UserError, match="has the splits train, val: name one, as in"):
        folder_json(str(tmp_path))
    content = converted(tmp_path, "train")
    ((name, *rest),) = objects(content)
    assert (Path(name).name, *rest) == ("a.png", "cell", 10, 7.5, 20, 15)
    assert [each["name"] for each in content["categories"]] == ["cell", "dust"]
    empty = converted(tmp_path, "val")
    assert ([Path(each["file_name"]).name for each in empty["images"]], objects(empty)) == (
        ["b.png"], [],
    )  # fmt: skip
    assert not [*label_problems(content), *label_problems(empty)]


def test_splits_of_voc_have_the_classes_of_all(tmp_path):
    files = {
        "ImageSets/Main/train.txt": "a\n", "ImageSets/Main/val.txt": "b\n",
        "ImageSets/Main/cell_train.txt": "a -1\n",
        "Annotations/a.xml": voc_of(("dust", (1, 1, 4, 3))), "JPEGImages/a.png": "",
        "Annotations/b.xml": voc_of(("cell", (1, 1, 4, 3))).replace("a.png", "b.png"),
        "JPEGImages/b.png": "", "SegmentationClass/a.png": "", "JPEGImages/c.png": "",
    }  # fmt: skip
    write(tmp_path, files)
    content = converted(tmp_path, "train")
    assert objects(content) == [("JPEGImages/a.png", "dust", 0, 0, 4, 3)]
    assert [each["name"] for each in content["categories"]] == ["cell", "dust"]
    assert [each["file_name"] for each in content["images"]] == ["JPEGImages/a.png"]
    with pytest.raises(UserError, match=r"has the splits train, val: name one"):
        folder_json(str(tmp_path))
    with pytest.raises(UserError, match=r"no split 'trian': did you mean train"):
        folder_json(str(tmp_path), "trian")


PROBLEMS = {
    "voc": [
        ({"a.xml": "<annotation>"}, "label_file", "a.xml: cannot be read: no element found"),
        ({"a.xml": "<!DOCTYPE a [<!ENTITY b 'c'>]><annotation/>"}, "label_file", "a.xml: declares"),
        ({"a.xml": voc_of(("cell", ("x", 1, 2, 2)))}, "label_file", "a.xml, line 2: 'x' is no num"),
        ({"a.xml": voc_of(("cell", (1, 1, "nan", 2)))}, "label_file", "line 2: 'nan' is no number"),
        ({"a.xml": voc_of(("", (1, 1, 2, 2)))}, "label_file", "line 2: an object has no name"),
        (
            {"a.xml": "<annotation>\n\n<object><name>x</name><robndbox/></object></annotation>"},
            "label_file", "a.xml, line 3: an object has no bndbox; it has name, robndbox",
        ),
        (
            {"a.xml": voc_of(("cell", (1, 1, 2, 2), "<polygon><x1>1</x1><y1>1</y1></polygon>"))},
            "label_file", "a.xml, line 2: a polygon has 1 points",
        ),
        (
            {"a.xml": voc_of(("cell", (1, 1, 9, 9), "\n<part><bndbox/></part>"))},
            "label_left_out", "a.xml, line 3: is a part of an object",
        ),
        ({"b.xml": "<html/>"}, "label_left_out", "b.xml: is no VOC label: it holds <html>"),
        ({"b.xml": voc_of().replace("a.png", "b.png")}, "image_missing", "b.xml: there is no imag"),
        ({"b.png": ""}, "image_unlabelled", "b.png: has no label file"),
    ],
    "yolo": [
        ({"labels/a.txt": "\n2 .5 .5 .1 .1"}, "category_unknown", "line 2: class 2 has no name: "),
        ({"labels/a.txt": "-1 .5 .5 .1 .1"}, "category_unknown", "line 1: class -1 has no name"),
        ({"labels/a.txt": "0.5 .5 .5 .1 .1"}, "category_unknown", "line 1: class 0.5 has no name"),
        ({"labels/a.txt": "0 .5 .5 .1 .1 .9"}, "label_file", "line 1: has 6 numbers, expected 5"),
        ({"labels/a.txt": "0 .5 .5"}, "label_file", "line 1: has 3 numbers, expected 5"),
        ({"labels/a.txt": "cell .5 .5 .1 .1"}, "label_file", "line 1: 'cell' is no number"),
        ({"labels/a.txt": "0 .5 inf .1 .1"}, "label_file", "line 1: 'inf' is no number"),
        ({"labels/b.txt": ROW}, "image_missing", "labels/b.txt: is the label file of no image"),
        ({"images/b.png": ""}, "image_unlabelled", "images/b.png: has no label file"),
        ({"images/a.jpg": ""}, "label_file", "labels/a.txt: is the label file of images/a.jpg and"),
    ],
    "labelme": [
        ({"a.json": "{"}, "label_file", "a.json: is no JSON"),
        ({"b.json": "[]"}, "label_left_out", "b.json: is not LabelMe's"),
        (
            {"a.json": labelme_of(shape("mask", [1, 1], [2, 2]))},
            "label_file", r"a.json, shapes[0]: its shape_type is 'mask', expected rectangle,",
        ),
        (
            {"a.json": labelme_of(shape("rectangle", [1, 1], [2, 2]), shape("point", [1, 1]))},
            "label_left_out", "a.json, shapes[1]: is a point of 'cell', which has no area",
        ),
        ({"a.json": labelme_of({"label": 3})}, "label_file", "a.json, shapes[0]: its label is 3"),
        ({"a.json": labelme_of(7)}, "label_file", "a.json, shapes[0]: its label is None"),
        (
            {"a.json": labelme_of(shape("polygon", [1, 1], [2, 2]))},
            "label_file", "shapes[0]: its points are [[1, 1], [2, 2]], expected x and y of a polyg",
        ),
        (
            {"a.json": labelme_of(shape("circle", [1, 1], ["2", 2]))},
            "label_file", "shapes[0]: its points are [[1, 1], ['2', 2]]",
        ),
        (
            {"b.json": labelme_of(imagePath="../../b.png")},
            "image_missing", "b.json: there is no image '../../b.png' for it",
        ),
        ({"b.png": ""}, "image_unlabelled", "b.png: has no label file"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("label_format", "files", "kind", "line"),
    [(name, *case) for name, cases in PROBLEMS.items() for case in cases],
)
def test_what_cannot_be_read_is_named(label_format, files, kind, line, tmp_path, capsys):
    write(tmp_path, BOX[label_format] | files)
    found = [each for each in label_problems(converted(tmp_path)) if each.kind == kind]
    assert [line in str(each) for each in found] == [True]
    json_file = folder_json(str(tmp_path))
    report = check_dataset(json_file, str(tmp_path))
    assert line in report.text(3)
    if found[0].refused:
        with pytest.raises(UserError) as raised:
            check_coco(json_file, str(tmp_path))
        assert f"fpn-plugin check {tmp_path} lists all" in str(raised.value)
        with pytest.raises(SystemExit) as status:
            check_main([str(tmp_path)])
        assert status.value.code == 1
        assert line in capsys.readouterr().out


def test_images_that_cannot_be_read_are_named(tmp_path):
    write(tmp_path, BOX["yolo"] | {"labels/b.txt": ROW})
    (tmp_path / "images" / "b.png").write_bytes(b"no image")
    (problem,) = label_problems(converted(tmp_path))
    assert (problem.kind, problem.refused) == ("image_unreadable", True)
    assert "images/b.png cannot be read" in str(problem)


def test_the_rules_for_coco_name_the_row(tmp_path):
    write(tmp_path, BOX["yolo"] | {"labels/a.txt": f"{ROW}\n0 0.5 0.5 -0.1 0.2\n0 320 240 10 10"})
    text = check_dataset(folder_json(str(tmp_path)), str(tmp_path)).text(3)
    assert "annotation 2 ('labels/a.txt, line 2'): bbox is" in text
    assert "annotation 3 ('labels/a.txt, line 3'): bbox is" in text
    assert "box_negative (1)" in text
    assert "box_far_out (1)" in text


def test_images_without_objects_are_kept(tmp_path):
    write(tmp_path, BOX["voc"] | {"b.png": "", "c.png": "", "c.xml": voc_of().replace("a.", "c.")})
    content = converted(tmp_path)
    assert [each["file_name"] for each in content["images"]] == ["a.png", "c.png", "b.png"]
    assert len(content["annotations"]) == 1
    register_datasets([f"cells={tmp_path}"])
    assert [len(each["annotations"]) for each in DatasetCatalog.get("cells")] == [1, 0, 0]


def test_a_size_that_voc_leaves_out_is_read_from_the_image(tmp_path):
    size = "<size><width>0</width><height>0</height></size>"
    for given in (size, ""):
        write(tmp_path, BOX["voc"] | {"a.xml": voc_of(("cell", (1, 1, 2, 2)), size=given)})
        (image,) = converted(tmp_path)["images"]
        assert (image["width"], image["height"]) == (WIDTH, HEIGHT)
    wrong = size.replace("0", "50")
    write(tmp_path, BOX["voc"] | {"a.xml": voc_of(("cell", (1, 1, 2, 2)), size=wrong)})
    report = check_dataset(folder_json(str(tmp_path)), str(tmp_path))
    assert report.counts == {"image_other_size": 1}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.png": ""}, "has no labels: expected VOC's"),
        (BOX["voc"] | {"a.json": "{}"}, r"several formats, VOC's \(a.xml\), LabelMe's \(a.json\)"),
        (BOX["voc"] | {"data.yaml": YAML}, r"several formats, VOC's .* YOLO's \(data.yaml\)"),
        ({"data.yaml": "names: ["}, "data.yaml is no YAML"),
        ({"data.yaml": "names: !!python/name:os.system"}, "data.yaml is no YAML"),
        ({"data.yaml": "names: {0: a, 2: b}"}, "names of classes are .* expected a list"),
        ({"data.yaml": "names: [a, a]"}, "no name twice"),
        ({"data.yaml": "names: [a]\nnc: 2"}, "nc is 2, but there are 1 names"),
        ({"data.yaml": "names: [a]\nkpt_shape: [3, 2]"}, "YOLO's keypoints .* are not read"),
        ({"a.yaml": "names: [a]", "b.yaml": "names: [b]"}, "several YOLO configs: a.yaml, b.yaml"),
        ({"data.yaml": "train: x/y\nnames: [a]"}, "train is 'x/y' in its YAML"),
        (BOX["yolo"] | {"labels/a.txt": None}, "no image has a label file: that of images/a.png w"),
    ],
)
def test_folders_that_are_not_read_are_refused(files, message, tmp_path):
    write(tmp_path, {name: text for name, text in files.items() if text is not None})
    with pytest.raises(UserError, match=message):
        folder_json(str(tmp_path))


def test_a_changed_label_is_read_anew(tmp_path, caplog):
    write(tmp_path, BOX["labelme"])
    spec = f"cells={tmp_path}"
    register_datasets([spec])
    json_file = tmp_path / "fpn_plugin.json"
    assert (
        f"LabelMe labels of 1 images, with 1 objects, are converted to {json_file}" in caplog.text
    )
    written = json_file.stat().st_mtime_ns
    register_datasets([spec])
    assert json_file.stat().st_mtime_ns == written
    shapes = [shape("rectangle", [0, 0], [3, 3], label=name) for name in ("dust", "cell")]
    write(tmp_path, {"a.json": labelme_of(*shapes)})
    (record,) = DatasetCatalog.get("cells")
    assert [each["bbox"] for each in record["annotations"]] == [[0, 0, 3, 3]] * 2
    assert MetadataCatalog.get("cells").thing_classes == ["cell", "dust"]
    assert registered_specs([spec]) == [f"cells={json_file}:{tmp_path}"]
    write(tmp_path, {"b.png": ""})
    assert len(DatasetCatalog.get("cells")) == 2
    assert len(read_ground_truth(["cells"]).boxes) == 2


def test_a_folder_that_cannot_be_written_has_its_json_in_the_cache(tmp_path):
    folder = write(tmp_path / "data", BOX["voc"])
    (folder / "fpn_plugin.json").mkdir()  # nothing can be written there
    json_file = folder_json(str(folder))
    assert json_file.startswith(str(tmp_path / "cache" / "fpn_plugin"))
    assert check_coco(json_file, str(folder)) == ["cell"]
    assert sorted(os.listdir(folder)) == ["a.png", "a.xml", "fpn_plugin.json"]
    assert folder_json(str(folder)) == json_file


def test_folders_that_link_to_each_other_are_read_once(tmp_path):
    write(tmp_path / "data", BOX["voc"])
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data")
    assert len(converted(tmp_path / "data")["images"]) == 1


def test_check_reads_a_folder_and_writes_its_json(tmp_path, capsys):
    write(tmp_path / "data", LAYOUTS["images and labels"])
    check_main([f"{tmp_path / 'data'}:train", "--convert", str(tmp_path / "train.json")])
    output = capsys.readouterr().out
    assert "1 images, 1 boxes and 2 classes were read; 1 boxes are trained on" in output
    assert objects(json.loads((tmp_path / "train.json").read_text())) == [
        ("images/train/a.png", "cell", 10, 7.5, 20, 15)
    ]

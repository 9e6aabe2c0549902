"""JSONs as annotation tools write them wrong: named, and written right by --convert."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fpn_plugin import UserError
from fpn_plugin.cli.check import check_main
from fpn_plugin.data import check_coco, check_dataset
from fpn_plugin.data.box_layouts import COCO_LAYOUT, box_layout
from fpn_plugin.data.dataset_check import read_coco
from fpn_plugin.data.exports import name_in_folder
from fpn_plugin.fitting import read_ground_truth
from tests.helpers.datasets import write_dataset

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="real data in ../shared/data are not there")


def boxes_of(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Boxes XYWH in pixels all over images, and the images' sizes."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(100, 700, (count, 2)).astype(float)
    extents = rng.uniform(0.15, 0.5, (count, 2)) * sizes
    return np.hstack([rng.uniform(0, 1, (count, 2)) * (sizes - extents), extents]), sizes


def corners(boxes: np.ndarray) -> np.ndarray:
    return np.hstack([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]])


def centres(boxes: np.ndarray) -> np.ndarray:
    return np.hstack([boxes[:, :2] + boxes[:, 2:] / 2, boxes[:, 2:]])


@settings(max_examples=60, deadline=None)
@given(count=st.integers(40, 120), seed=st.integers(0, 10**6))
def test_boxes_written_otherwise_are_recognised_and_turned(count, seed):
    boxes, sizes = boxes_of(count, seed)
    scale = np.tile(sizes, 2)
    assert box_layout(boxes, sizes) == COCO_LAYOUT
    for kind, written in (
        ("boxes_corners", corners(boxes)),
        ("boxes_centres", centres(boxes)),
        ("boxes_normalised", boxes / scale),
        ("boxes_normalised", corners(boxes) / scale),
        ("boxes_normalised", centres(boxes) / scale),
    ):
        layout = box_layout(written, sizes)
        assert layout.kind == kind
        np.testing.assert_allclose(layout.turned(written, sizes), boxes, atol=1e-6)


@settings(deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0, 0.6))
def test_boxes_that_only_reach_out_are_not_taken_for_others(seed, share):
    """Objects at the borders whose boxes go on beyond it, as annotators draw them."""
    boxes, sizes = boxes_of(40, seed)
    shift = np.random.default_rng(seed).uniform(-0.3, 0.3, boxes.shape) * np.tile(sizes, 2)
    out = np.random.default_rng(seed).random(40) < share
    boxes[out, :2] += shift[out, :2]
    assert box_layout(boxes, sizes) == COCO_LAYOUT


def test_few_boxes_say_nothing_of_corners():
    sizes = np.array([[60.0, 60]])
    assert box_layout(np.array([[5.0, 5, 60, 60]]), sizes) == COCO_LAYOUT
    assert box_layout(np.zeros((0, 4)), np.zeros((0, 2))) == COCO_LAYOUT
    assert box_layout(np.zeros((3, 4)), sizes.repeat(3, 0)) == COCO_LAYOUT
    assert box_layout(np.array([[0.1, 0.2, 0.3, 0.4]]), sizes).kind == "boxes_normalised"


@pytest.fixture
def made(tmp_path):
    """Writes a dataset of one class and 40 boxes in an image each; returns JSON and folder."""

    def write(layout=lambda boxes, sizes: boxes, change=lambda content: None) -> tuple[str, str]:
        boxes, sizes = boxes_of(40)
        sizes = sizes.astype(int)
        written = layout(boxes, sizes)
        content = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "cell"}]}
        for i in range(40):
            size = tuple(sizes[i].tolist())
            content["images"].append(
                {"id": i, "file_name": f"{i} a.png", "width": size[0], "height": size[1]}
            )
            width, height = written[i, 2:].tolist()
            content["annotations"].append(
                {"id": i, "image_id": i, "category_id": 1, "bbox": written[i].tolist(),
                 "area": width * height, "iscrowd": 0}
            )  # fmt: skip
        path, images = write_dataset(tmp_path, "export", content).partition("=")[2].split(":")
        change(content)
        Path(path).write_text(json.dumps(content))
        return path, images

    return write


@pytest.fixture
def converted(tmp_path):
    """Converts a JSON; returns the new one and its content."""

    def convert(path: str, images: str, look: str = "none") -> tuple[str, dict]:
        new = tmp_path / "new.json"
        check_main([path, images, "--images", look, "--convert", str(new)])
        return str(new), json.loads(new.read_text())

    return convert


LAYOUTS = {
    "corners": (lambda b, s: corners(b), r"has boxes that look like corners \[x0, y0, x1, y1\]"),
    "fractions": (lambda b, s: b / np.tile(s, 2), "as fractions of the image's width and height"),
    "YOLO": (
        lambda b, s: centres(b) / np.tile(s, 2), r"\[centre x, .*, height\], as fractions",
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_check_training_and_fit_refuse_them_and_conversion_mends_them(made, converted, layout):
    turn, told = LAYOUTS[layout]
    path, images = made(turn)
    right, _ = boxes_of(40)
    for use in (
        lambda: check_coco(path, images),
        lambda: check_coco(path),
        lambda: read_ground_truth([path]),
    ):
        with pytest.raises(UserError, match=f"{told}.*--convert NEW.json") as raised:
            use()
        assert "\n" not in str(raised.value)
    report = check_dataset(path, images, look="none")
    assert report.kinds(refused=True) == [
        "boxes_corners" if layout == "corners" else "boxes_normalised"
    ]
    new, content = converted(path, images)
    records = content["annotations"]
    np.testing.assert_allclose([record["bbox"] for record in records], right, atol=1e-6)
    areas = [record["area"] for record in records]  # the old ones were of the boxes as they were
    np.testing.assert_allclose(areas, right[:, 2] * right[:, 3])
    assert [record["id"] for record in records] == list(range(1, 41))
    assert len(read_ground_truth([new]).boxes) == 40


def test_masks_of_fractions_are_turned_with_their_boxes(made, converted):
    def mark(content):
        for record in content["annotations"]:
            x, y, width, height = record["bbox"]
            record["segmentation"] = [[x, y, x + width, y, x + width, y + height]]
            record["keypoints"] = [x, y, 2]

    _, content = converted(*made(lambda b, s: b / np.tile(s, 2), mark))
    for record in content["annotations"]:
        x, y, width, height = record["bbox"]
        [polygon] = record["segmentation"]
        np.testing.assert_allclose(polygon, [x, y, x + width, y, x + width, y + height])
        np.testing.assert_allclose(record["keypoints"], [x, y, 2])
        np.testing.assert_allclose(record["area"], width * height / 2)


def test_centres_in_pixels_are_warned_of(made):
    path, images = made(lambda b, s: centres(b))
    report = check_dataset(path, images, look="none")
    assert report.counts["boxes_centres"] == 1 and not report.kinds(refused=True)
    assert "look like [centre x, centre y" in report.text(3)


def test_roboflows_root_category_is_named_and_left_out(made, converted, capsys):
    def above(content):
        content["categories"] = [
            {"id": 0, "name": "cells", "supercategory": "none"},
            {"id": 1, "name": "RBC", "supercategory": "cells"},
        ]

    path, images = made(change=above)
    report = check_dataset(path, images, look="none")
    assert report.counts["category_root"] == 1 and not report.kinds(refused=True)
    assert "category 0: 'cells': no annotation has it, and it counts as a class" in report.text(3)
    new, _ = converted(path, images)
    assert "converted: category 'cells' is left out" in capsys.readouterr().out
    assert check_coco(path) == ["cells", "RBC"] and check_coco(new) == ["RBC"]


@pytest.mark.parametrize(
    "categories",
    [
        [{"id": 1, "name": "a", "supercategory": "none"}],
        [{"id": 1, "name": "a", "supercategory": "none"}, {"id": 2, "name": "b"}],  # has boxes
        [{"id": i, "name": f"{i}", "supercategory": "none"} for i in range(3)],
    ],
)
def test_other_categories_are_no_root(made, categories):
    path, images = made(change=lambda content: content.update(categories=categories))
    assert check_dataset(path, images, look="none").counts.get("category_root") is None


@pytest.mark.parametrize(
    "name",
    ["0%20a.png", "/home/else/0 a.png", "images/0 a.png", "C:\\data\\0 a.png", "..\\0 a.png"],
)
def test_file_names_of_another_place_are_found_only_by_conversion(made, converted, name):
    path, images = made(change=lambda content: content["images"][0].update(file_name=name))
    with pytest.raises(UserError, match=r"--convert NEW.json"):
        check_coco(path, images)
    report = check_dataset(path, images, look="headers")
    assert report.kinds(refused=True) in (["file_name"], ["image_missing"])
    assert converted(path, images, "headers")[1]["images"][0]["file_name"] == "0 a.png"


def test_folders_within_the_folder_are_kept(made, tmp_path):
    _, images = made()
    (Path(images) / "deep").mkdir()
    (Path(images) / "deep" / "b c.png").write_bytes(b"")
    for name in (f"{images}/deep/b%20c.png", "images\\deep\\b c.png", "../deep/b c.png"):
        assert name_in_folder(images, name) == "deep/b c.png"
    (tmp_path / "secret.png").write_bytes(b"")
    assert name_in_folder(images, "../secret.png") is None


def test_an_object_that_is_there_twice_is_refused_and_left_out_by_conversion(made, converted):
    path, images = made(change=lambda c: c["annotations"].append(dict(c["annotations"][3])))
    with pytest.raises(UserError, match=r"annotations\[40\]: id 4 is there twice"):
        check_coco(path)
    assert len(converted(path, images)[1]["annotations"]) == 40


def test_conversion_does_not_write_over_its_source_nor_by_halves(made, tmp_path):
    path, images = made()
    with pytest.raises(UserError, match="name another file"):
        check_main([path, images, "--convert", path])
    with pytest.raises(UserError, match="cannot write .*nowhere"):
        check_main([path, images, "--convert", str(tmp_path / "nowhere" / "a.json")])
    with pytest.raises(UserError, match="--no-crowds is for --convert"):
        check_main([path, images, "--no-crowds"])


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_json_in_another_encoding_is_read(made, encoding):
    path, images = made()
    text = Path(path).read_text().replace("cell", "Zelle ü")
    Path(path).write_bytes(text.encode(encoding))
    assert check_coco(path, images) == ["Zelle ü"]
    report = check_dataset(path, images, look="none")
    assert "is written in utf-" in report.text(3) and not report.kinds(refused=True)
    assert len(read_ground_truth([path]).boxes) == 40


def test_sizes_that_are_missing_are_those_of_the_images_as_they_are_shown(made):
    def without(content):
        for record in content["images"]:
            del record["width"], record["height"]

    path, images = made(change=without)
    first = Path(images, "0 a.png")
    with Image.open(first) as image:
        exif = image.getexif()
        exif[0x0112] = 6  # turned by 90 degrees
        image.load()
        image.save(first, exif=exif)
        turned = image.size[::-1]
    read = read_coco(path, images).content["images"]
    assert (read[0]["width"], read[0]["height"]) == turned
    sizes = boxes_of(40)[1].astype(int)
    assert [(r["width"], r["height"]) for r in read[1:]] == [tuple(s) for s in sizes[1:].tolist()]
    with pytest.raises(UserError, match="'width' is None"):
        check_coco(path)  # no folder to look into


@real
@pytest.mark.parametrize(
    ("name", "kinds"),
    [("noarea", {"filled_in": 2}), ("normalised", {"boxes_normalised": 1}),
     ("xyxy", {"boxes_corners": 1})],
)  # fmt: skip
def test_mistakes_of_real_exporters_are_named(name, kinds, converted, tmp_path):
    path = str(SHARED / "mistakes" / f"{name}.json")
    report = check_dataset(path, "", look="none")
    assert report.counts == kinds
    right = json.loads((SHARED / "mistakes" / "noarea.json").read_text())
    boxes = [[record["bbox"] for record in content["annotations"]]
             for content in (converted(path, str(tmp_path))[1], right)]  # fmt: skip
    np.testing.assert_allclose(*boxes, atol=1e-9)


@real
def test_real_data_are_counted(capsys):
    check_main(
        [str(SHARED / "cells" / "train.json"), str(SHARED / "cells" / "images"),
         "--images", "headers"]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert "205 images, 2805 boxes and 3 classes were read; 2804 boxes are trained on" in out
    assert "0 refused, 1 warnings" in out

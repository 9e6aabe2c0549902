"""A user's own COCO-format data: registered, or refused in one line that names the record."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpn_plugin import UserError, model_zoo
from fpn_plugin.data import (
    ReadableImageMapper,
    check_coco,
    check_datasets,
    read_image_or_say,
    register_datasets,
)
from fpn_plugin.data.dataset_check import read_coco


def coco() -> dict:
    return {
        "images": [{"id": 7, "file_name": "a.png", "width": 40, "height": 30}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 3, "bbox": [1, 2, 10, 12], "area": 120,
             "iscrowd": 0},
        ],
        "categories": [{"id": 3, "name": "cell"}],
    }  # fmt: skip


@pytest.fixture
def own_data(tmp_path) -> tuple[Path, Path]:
    """A JSON and an image folder."""
    images = tmp_path / "images with spaces"
    images.mkdir()
    Image.fromarray(np.full((30, 40, 3), 90, np.uint8)).save(images / "a.png")
    json_file = tmp_path / "own.json"
    json_file.write_text(json.dumps(coco()))
    return json_file, images


def test_own_data_is_registered_and_loads(own_data):
    json_file, images = own_data
    spec = f"cells={json_file}:{images}"
    register_datasets([spec])
    register_datasets([spec])  # once more in every process
    (record,) = DatasetCatalog.get("cells")
    assert record["annotations"][0]["category_id"] == 0
    assert MetadataCatalog.get("cells").thing_classes == ["cell"]
    check_datasets(["cells"], "DATASETS.TRAIN")
    with pytest.raises(UserError, match="there is a dataset 'cells' already"):
        register_datasets([f"cells={json_file}:{images.parent}"])


@pytest.mark.parametrize("spec", ["cells", "cells=a.json", "=a.json:b", "cells=:b", "cells=a:"])
def test_a_spec_of_another_form_is_told_the_form(spec):
    with pytest.raises(UserError, match="NAME=JSON:IMAGES"):
        register_datasets([spec])


def test_files_that_are_not_there_are_named(own_data, tmp_path):
    json_file, images = own_data
    with pytest.raises(UserError, match="no folder"):
        register_datasets([f"cells={json_file}:{tmp_path / 'nowhere'}"])
    with pytest.raises(UserError, match=r"no file '.*nowhere.json'"):
        register_datasets([f"cells={tmp_path / 'nowhere.json'}:{images}"])


def test_datasets_that_are_not_there_are_named():
    with pytest.raises(UserError, match="did you mean mini_train"):
        check_datasets(["mini_trian"], "DATASETS.TRAIN")
    with pytest.raises(UserError, match=r"instances_val2017.json is not there.*DETECTRON2_DATASE"):
        check_datasets(["coco_2017_val"], "DATASETS.TEST")
    check_datasets(["mini_train", "mini_val"], "DATASETS.TRAIN")


def test_only_a_truly_near_dataset_is_suggested(own_data):
    """lvis_v1_val and mini_val end as names of a user's do."""
    how = r"not registered\. Register your own data: --dataset {}=JSON:IMAGES, or "
    for name in ("cells_val", "cells_v1_val", "my_val", "tiny_train", "own"):
        with pytest.raises(UserError, match=how.format(name)):
            check_datasets([name], "DATASETS.TEST")
    with pytest.raises(UserError, match=r"did you mean coco_2017_val\? Register"):
        check_datasets(["coco_2017_vla"], "DATASETS.TEST")
    with pytest.raises(UserError, match="not registered$"):
        check_datasets(["cells_val"], "DATASETS.TEST", registers=False)
    json_file, images = own_data
    register_datasets([f"cells_train={json_file}:{images}"])
    with pytest.raises(UserError, match=r"did you mean cells_train\? Register"):
        check_datasets(["cells_val"], "DATASETS.TEST")


BROKEN = {
    "no list 'annotations'": lambda c: c.pop("annotations"),
    "no list 'images'": lambda c: c.update(images={}),
    "has no categories": lambda c: c.update(categories=[]),
    r"images\[0\]: has no id": lambda c: c["images"][0].pop("id"),
    r"images\[1\]: id 7 is there twice": lambda c: c["images"].append(c["images"][0]),
    r"annotations\[1\]: id 1 is there": lambda c: c["annotations"].append(c["annotations"][0]),
    r"images\[0\] \(id 7\): 'file_name' is None": lambda c: c["images"][0].pop("file_name"),
    "'width' is 'x', expected int": lambda c: c["images"][0].update(width="x"),
    "annotation 1: no image has id 8": lambda c: c["annotations"][0].update(image_id=8),
    "annotation 1: no category has id 4": lambda c: c["annotations"][0].update(category_id=4),
    r"no category has id \[3\]": lambda c: c["annotations"][0].update(category_id=[3]),
    r"bbox is \[1, 2, 10\]": lambda c: c["annotations"][0].update(bbox=[1, 2, 10]),
    "negative; expected .x, y, w": lambda c: c["annotations"][0].update(bbox=[9, 9, -3, 4]),
    "bbox is None": lambda c: c["annotations"][0].pop("bbox"),
    "bbox is .*nan": lambda c: c["annotations"][0].update(bbox=[1, 2, math.nan, 4]),
    "bbox is .*inf": lambda c: c["annotations"][0].update(bbox=[1, 2, math.inf, 4]),
    "annotations.0.: has no id": lambda c: c.update(annotations=["x"]),
    "has no annotations": lambda c: c.update(annotations=[]),
    "'area' is 'x', expected a number": lambda c: c["annotations"][0].update(area="x"),
    "'iscrowd' is 'x', expected int": lambda c: c["annotations"][0].update(iscrowd="x"),
    "'ignore' is not supported": lambda c: c["annotations"][0].update(ignore=1),
}


@pytest.mark.parametrize("message", BROKEN)
def test_broken_records_are_named(message, tmp_path):
    path, content = tmp_path / "own.json", coco()
    BROKEN[message](content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as raised:
        check_coco(str(path))
    assert "\n" not in str(raised.value)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "not JSON"), ("[1]", "holds a list"), ("", "not JSON"), ("{}", "no list 'images'")],
)
def test_a_json_that_is_not_coco_is_named(text, message, tmp_path):
    path = tmp_path / "own.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        check_coco(str(path))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@settings(deadline=None)
@given(
    part=st.sampled_from(["images", "annotations", "categories"]),
    key=st.sampled_from(
        [
            "id",
            "file_name",
            "width",
            "image_id",
            "category_id",
            "bbox",
            "name",
            "area",
            "iscrowd",
            "ignore",
        ]
    ),
    value=ANYTHING,
)  # fmt: skip
def test_any_value_anywhere_is_taken_or_named(tmp_path_factory, part, key, value):
    content = coco()
    content[part][0][key] = value
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(content))
    try:
        names = check_coco(str(path))
    except UserError as error:
        assert str(path) in str(error)
        return
    # What is accepted can be loaded and evaluated, as it was mended.
    content = read_coco(str(path)).content
    path.write_text(json.dumps(content))
    assert names == [content["categories"][0]["name"]]
    assert len(load_coco_json(str(path), "images")) == 1
    truth = COCO(str(path))
    (annotation,) = truth.anns.values()
    evaluation = COCOeval(truth, truth.loadRes([{**annotation, "score": 0.9}]), "bbox")
    evaluation.evaluate()
    evaluation.accumulate()


def test_images_that_cannot_be_read_are_named(own_data):
    _, images = own_data
    record = {"file_name": str(images / "a.png"), "width": 40, "height": 30}
    mapped = ReadableImageMapper(model_zoo.get_config("mini/faster_rcnn_R_18_FPN.yaml"), False)
    assert mapped(record)["image"].shape == (3, 256, 341)
    (images / "cut.png").write_bytes((images / "a.png").read_bytes()[:60])
    (images / "text.jpg").write_text("no image")
    for name, message in (
        ("cut.png", "cannot read image .*cut.png"),
        ("text.jpg", "cannot read image .*text.jpg"),
        ("none.jpg", "no image .*none.jpg"),
    ):
        with pytest.raises(UserError, match=message):
            mapped({**record, "file_name": str(images / name)})
        with pytest.raises(UserError, match=message):
            read_image_or_say(images / name)
    with pytest.raises(UserError, match=r"a.png' has another size than its dataset says"):
        mapped({**record, "width": 41})

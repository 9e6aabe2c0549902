"""Reading boxes: what is kept, what is left out by name, what is refused."""

import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode

from fpn_plugin import UserError
from fpn_plugin.fitting import GroundTruth, read_ground_truth


def test_boxes_are_kept_in_corners_and_clipped_to_their_image(coco_json):
    truth = read_ground_truth([str(coco_json([[10, 20, 30, 40], [-5, 90, 20, 20]]))])
    assert truth.boxes.tolist() == [[10, 20, 40, 60], [0, 90, 15, 100]]
    assert truth.image.tolist() == [0, 0]
    assert truth.shapes.tolist() == [[100, 200]]
    assert truth.clipped == 1
    assert set(truth.left_out.values()) == {0}


def test_what_is_left_out_is_counted_by_name(tmp_path):
    boxes = [
        {"bbox": [1, 1, 5, 5]},
        {"bbox": [1, 1, 5, 5], "iscrowd": 1},
        {"bbox": [1, 1, 0, 5], "iscrowd": 1},  # two reasons: it counts once
        {"bbox": [1, 1, 5, 5], "ignore": 1},
    ]
    nan, inf = float("nan"), float("inf")
    broken = [[1, 1, 0, 5], [1, 1, 5, -5], [nan, 1, 5, 5], [1, 1, inf, 5], [200, 1, 5, 5]]
    boxes += [{"bbox": box} for box in (*broken, [1, -5, 5, 5])]
    path = tmp_path / "boxes.json"
    # Images after boxes: the order of keys is free.
    content = {
        "annotations": [{"image_id": "a", **box} for box in boxes],
        "images": [
            {"id": "b", "file_name": "b", "height": 50, "width": 60},
            {"id": "a", "file_name": "a", "height": 100, "width": 200},
        ],
    }
    path.write_text(json.dumps(content))
    truth = read_ground_truth([str(path)])
    assert truth.boxes.tolist() == [[1, 1, 6, 6]]
    assert truth.image.tolist() == [1]
    assert truth.left_out == {
        "crowd": 2, "ignored": 1, "box_not_finite": 2, "box_negative": 1, "box_empty": 1,
        "box_outside": 2,
        "segmentation_unusable": 0, "mask_empty": 0, "keypoints_invisible": 0,
    }  # fmt: skip


def test_classes_are_named_if_all_datasets_have_the_same(coco_json, tmp_path):
    def json_of(name, **categories):
        path = coco_json([[1, 1, 5, 5]], **categories)
        return str(path.rename(tmp_path / name))

    one, other = json_of("one.json"), json_of("other.json")
    assert read_ground_truth([one, other]).classes == ("thing",)
    two = json_of("two.json", categories=[{"id": 1}, {"id": 2, "name": "b"}])
    assert read_ground_truth([two]).classes == ("", "b")
    assert read_ground_truth([one, two]).classes is None
    content = json.loads((tmp_path / "one.json").read_text())
    del content["categories"]
    (tmp_path / "none.json").write_text(json.dumps(content))
    assert read_ground_truth([str(tmp_path / "none.json")]).classes is None


def test_a_sample_keeps_images_whole():
    image = np.repeat([0, 2, 3, 5], [3, 1, 2, 4])
    boxes = np.arange(40.0).reshape(10, 4)
    shapes = np.arange(12).reshape(6, 2)
    truth = GroundTruth(boxes, image, shapes, {"crowd": 1}, 0)
    assert truth.sample(4) is truth
    few = truth.sample(2)
    assert len(few.shapes) == 2 and few.left_out == {"crowd": 1}
    for index, shape in enumerate(few.shapes.tolist()):
        original = shapes.tolist().index(shape)
        assert few.boxes[few.image == index].tolist() == boxes[image == original].tolist()


def test_a_dataset_registered_by_a_function_is_read(request):
    annotations = [
        {"bbox": np.array([10, 20, 40, 60]), "bbox_mode": BoxMode.XYXY_ABS},
        {"bbox": [1, 2, 3, 4], "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": 1},
    ]
    records = [{"height": 50, "width": 80, "annotations": []}]
    records.append({"height": 100, "width": 200, "annotations": annotations})
    DatasetCatalog.register("fit_from_function", lambda: records)
    request.addfinalizer(lambda: DatasetCatalog.remove("fit_from_function"))
    request.addfinalizer(lambda: MetadataCatalog.remove("fit_from_function"))
    truth = read_ground_truth(["fit_from_function"])
    assert truth.boxes.tolist() == [[10, 20, 40, 60]]
    assert truth.image.tolist() == [1]
    assert truth.left_out["crowd"] == 1


DEEP = "[" * 100_000 + "]" * 100_000
IMAGE = {"id": 1, "file_name": "a", "height": 3, "width": 2}


def images_of(*records: dict) -> str:
    return json.dumps({"images": records, "annotations": []})


def annotations_of(record: str) -> str:
    return f'{{"images": [], "annotations": [{record}]}}'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is not JSON: Expecting value: line 1 column 1"),
        ("[]", "is not COCO: it has no list 'images'; it is no object"),
        ('{"images": 3, "annotations": []}', "has no list 'images'; it has"),
        ('{"images": []}', r"has no list 'annotations'; it has \['images'\]"),
        (images_of({"id": 1}), r"images\[0\] \(id 1\): 'file_name' is None"),
        (images_of({**IMAGE, "height": 0}), "'height' is 0, expected pixels from 1 to 2097151"),
        (images_of({**IMAGE, "height": 2**21}), "'height' is 2097152, expected pixels from 1"),
        (images_of(IMAGE, IMAGE), r"images\[1\]: id 1 is there twice"),
        (annotations_of(DEEP), "is not JSON: maximum recursion depth"),
        (f'{{"info": {DEEP}, "images": []}}', "is not JSON: maximum recursion depth"),
        (annotations_of(f'{{"bbox": [1{"0" * 400}, 2, 3, 4]}}'), r"annotations\[0\] lacks"),
        (annotations_of('{"image_id": [5], "bbox": [1, 2, 3, 4]}'), r"\[0\] lacks an image_id"),
        (annotations_of('{"image_id": 5, "bbox": [1, 2, 3, 4]}'), "no image has id 5"),
        (annotations_of('{"image_id": 5, "bbox": [1, 2, 3]}'), "lacks an image"),
        (annotations_of('{"image_id": 5}'), r"annotations\[0\] lacks an image"),
        (annotations_of("[1]"), r"annotations\[0\] lacks an image_id"),
        (annotations_of('{"bbox": ["1", 2, 3, 4]}'), r"is \[x, y, width"),
    ],
)
def test_a_broken_file_is_reported_by_record(tmp_path, content, message):
    path = tmp_path / "broken.json"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as raised:
        read_ground_truth([str(path)])
    assert str(raised.value).startswith(str(path))
    assert "\n" not in str(raised.value)


def test_a_file_without_a_box_to_fit_to_says_why(coco_json):
    path = coco_json([[0, 0, 0, 5], [300, 0, 5, 5]])
    with pytest.raises(UserError, match="no box to fit to: 1 box_empty, 1 box_outside"):
        read_ground_truth([str(path)])
    with pytest.raises(UserError, match="no box to fit to$"):
        read_ground_truth([str(coco_json([]))])


def test_a_missing_file_and_an_unknown_name_are_reported():
    with pytest.raises(UserError, match=r"'nothing/here.json', and there is no such file"):
        read_ground_truth(["nothing/here.json"])
    with pytest.raises(UserError, match="'mini_trian', which is not registered. did you mean mini"):
        read_ground_truth(["mini_trian"])


def test_datasets_are_taken_together_and_a_byte_order_mark_is_no_part_of_them(coco_json):
    path = coco_json([[10, 10, 20, 30]])
    path.write_text(path.read_text(), encoding="utf-8-sig")
    truth = read_ground_truth([str(path), str(path)])
    assert truth.boxes.tolist() == [[10, 10, 30, 40]] * 2
    assert truth.image.tolist() == [0, 1]
    assert len(truth.shapes) == 2

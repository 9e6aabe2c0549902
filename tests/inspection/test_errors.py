"""Misses and false alarms, against a case made by hand."""

from detectron2.structures import Boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from fpn_plugin import model_zoo
from fpn_plugin.inspection.box_levels import BoxLevels
from fpn_plugin.inspection.errors import confusion, find_errors
from fpn_plugin.modeling import assign_levels

CAT, DOG = 7, 3


def annotation(number, box, category=CAT, image=1, **more):
    area = box[2] * box[3]
    return {"id": number, "image_id": image, "category_id": category, "bbox": box, "area": area,
            **more}  # fmt: skip


def result(box, score, category=CAT, image=1):
    return {"image_id": image, "category_id": category, "bbox": box, "score": score}


def dataset(*annotations):
    return {
        "images": [
            {"id": 1, "file_name": "1.png", "height": 400, "width": 400},
            {"id": 2, "file_name": "2.png", "height": 400, "width": 400},
        ],
        "categories": [{"id": CAT, "name": "cat"}, {"id": DOG, "name": "dog"}],
        "annotations": list(annotations),
    }


def level(box, image_id):
    return "p2" if box[2] < 50 else "p3"


def test_every_kind_of_mistake_once():
    objects = dataset(
        annotation(0, [0, 0, 40, 40]),  # found; COCOeval would take number 0 for none
        annotation(1, [100, 0, 40, 40]),  # found below the threshold
        annotation(2, [200, 0, 40, 40]),  # taken for a dog
        annotation(3, [300, 0, 40, 40]),  # found next to it
        annotation(4, [0, 100, 20, 20]),  # not seen
        annotation(5, [0, 200, 100, 100], iscrowd=1),  # neither object nor false alarm
        annotation(6, [10, 10, 120, 120], category=DOG, image=2),  # found
    )
    found = [
        result([0, 0, 40, 40], 0.9),
        result([1, 0, 40, 40], 0.8),  # duplicate
        result([100, 0, 40, 40], 0.3),
        result([200, 0, 40, 40], 0.7, category=DOG),
        result([320, 0, 40, 40], 0.6),  # IoU 800 / 2400
        result([300, 300, 10, 10], 0.95),  # background
        result([10, 210, 30, 30], 0.99),  # on the crowd
        result([10, 10, 120, 120], 0.5, category=DOG, image=2),
        result([12, 10, 120, 120], 0.4, category=DOG, image=2),  # does not count
    ]
    errors = find_errors(objects, found, level, threshold=0.5)
    assert [(m.box[:2], m.kind) for m in errors.misses] == [
        ((100, 0), "score too low"),
        ((200, 0), "wrong class"),
        ((300, 0), "poorly placed"),
        ((0, 100), "not seen"),
    ]
    assert [(m.score, m.kind, m.category) for m in errors.false_alarms] == [
        (0.95, "background", "cat"),
        (0.8, "duplicate", "cat"),
        (0.7, "wrong class", "dog"),
        (0.6, "poorly placed", "cat"),
    ]
    assert [(m.size, m.level) for m in errors.misses] == [("medium", "p2")] * 3 + [("small", "p2")]
    assert errors.objects == {("medium", "p2"): 4, ("small", "p2"): 1, ("large", "p3"): 1}
    assert errors.detections == {("medium", "p2"): 4, ("small", "p2"): 1, ("large", "p3"): 1}
    # cat, dog, missed; the last row has no object
    assert confusion(objects, found, 0.5).tolist() == [[1, 1, 3], [0, 1, 0], [3, 0, 0]]
    # The best first: the sure dog takes the cat that is found too.
    sure = [*found, result([0, 0, 40, 40], 0.95, category=DOG)]
    assert confusion(objects, sure, 0.5).tolist() == [[0, 2, 3], [0, 1, 0], [4, 0, 0]]
    assert confusion(objects, found, 0.96).tolist() == [[0, 0, 5], [0, 0, 1], [0, 0, 0]]


def test_no_detections_and_no_objects():
    alone = find_errors(dataset(annotation(1, [0, 0, 10, 200])), [], level)
    assert [(m.kind, m.level, m.size) for m in alone.misses] == [("not seen", "p2", "medium")]
    assert not alone.false_alarms
    nothing = find_errors(dataset(), [result([0, 0, 60, 10], 0.9)], level)
    assert [(m.kind, m.level) for m in nothing.false_alarms] == [("background", "p3")]
    assert not nothing.misses
    assert nothing.objects == {}


@given(st.integers(2, 900), st.integers(2, 900), st.integers(3, 5))
@settings(max_examples=30, deadline=None)
def test_levels_of_boxes_are_those_of_the_resized_image(width, height, k0):
    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    cfg.MODEL.FPN.CANONICAL_LEVEL = k0
    images = {"images": [{"id": 4, "height": 400, "width": 1000}]}
    levels = BoxLevels(cfg, images)
    assert levels.names == ["p2", "p3", "p4", "p5"]
    # 800 px for the shorter side would make 2000 of the longer: 1333 is the most.
    scale = 1.333
    box = Boxes(tensor([[0, 0, width * scale, height * 533 / 400]]))
    expected = assign_levels(box.tensor, 2, 5, canonical_level=k0)
    assert levels((0, 0, width, height), 4) == f"p{int(expected)}"


def test_a_box_of_the_canonical_size_after_resizing():
    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    levels = BoxLevels(cfg, {"images": [{"id": 1, "height": 400, "width": 400}]})  # twofold
    sides = [55, 56, 111, 112, 223, 224]
    assert [levels((3, 3, s, s), 1) for s in sides] == ["p2", "p3", "p3", "p4", "p4", "p5"]
    cfg.MODEL.ROI_HEADS.IN_FEATURES = ["res4"]
    assert BoxLevels(cfg, {"images": []}).names == []

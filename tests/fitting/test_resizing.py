"""Boxes at the network's input, against Detectron2's own transforms."""

import numpy as np
import pytest
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation
from hypothesis import given, settings
from hypothesis import strategies as st

from fpn_plugin import UserError
from fpn_plugin.fitting import GroundTruth, ResizeRule, boxes_at_input, resizing

SIDES = st.integers(20, 900)


@settings(deadline=None)
@given(
    shapes=st.lists(st.tuples(SIDES, SIDES), min_size=1, max_size=4),
    edges=st.lists(st.integers(0, 800), min_size=1, max_size=3),
    max_size=st.integers(100, 1400),
    corners=st.lists(st.floats(0, 1), min_size=4, max_size=4),
)
def test_boxes_are_resized_as_detectron2_resizes_them(shapes, edges, max_size, corners):
    x, y = sorted(corners[:2]), sorted(corners[2:])
    boxes = [[x[0] * w, y[0] * h, x[1] * w, y[1] * h] for h, w in shapes]
    truth = GroundTruth(np.array(boxes), np.arange(len(shapes)), np.array(shapes), {}, 0)
    found = boxes_at_input(truth, ResizeRule(tuple(edges), max_size))
    expected, sizes = [], []
    for edge in edges:
        for (height, width), box in zip(shapes, boxes, strict=True):
            image = np.zeros((height, width, 3), np.uint8)
            transform = T.ResizeShortestEdge([edge], max_size, "choice").get_transform(image)
            expected.append(transform.apply_box(np.array([box]))[0])
            sizes.append((getattr(transform, "new_h", height), getattr(transform, "new_w", width)))
    np.testing.assert_allclose(found.boxes, expected, rtol=1e-12, atol=1e-9)
    assert found.shapes.tolist() == [list(size) for size in sizes]
    assert found.pixels == pytest.approx(np.prod(sizes, axis=1).mean())


@pytest.mark.parametrize("training", [True, False])
def test_the_rule_is_that_of_the_config(mini_config, training):
    cfg = mini_config("INPUT.MIN_SIZE_TRAIN", "(64, 96)", "INPUT.MAX_SIZE_TRAIN", "100")
    rule = ResizeRule.from_config(cfg, training)
    augmentation = build_augmentation(cfg, training)[0]
    assert list(rule.short_edges) == list(np.unique(augmentation.short_edge_length))
    assert rule.max_size == augmentation.max_size


def test_a_range_is_stood_for_by_nine_lengths(mini_config):
    opts = ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range", "INPUT.MIN_SIZE_TRAIN")
    rule = ResizeRule.from_config(mini_config(*opts, "(640, 800)"), True)
    assert rule.short_edges == (640, 660, 680, 700, 720, 740, 760, 780, 800)
    few = ResizeRule.from_config(mini_config(*opts, "(64, 66)"), True)
    assert few.short_edges == (64, 65, 66)
    with pytest.raises(UserError, match=r"\(800, 640\); .*\(least, largest\)"):
        ResizeRule.from_config(mini_config(*opts, "(800, 640)"), True)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MAX_SIZE_TRAIN", "0", r"MAX_SIZE_TRAIN is 0, .*100000 for no limit"),
        ("MAX_SIZE_TEST", "-1", r"MAX_SIZE_TEST is -1, .*100000 for no limit"),
        ("MIN_SIZE_TRAIN", "(64, -5)", "MIN_SIZE_TRAIN has -5; .*0 to leave images"),
        ("MIN_SIZE_TEST", "-5", "MIN_SIZE_TEST has -5; .*0 to leave images"),
    ],
)
def test_lengths_that_no_image_can_have_are_refused(mini_config, key, value, message):
    cfg = mini_config(f"INPUT.{key}", value)
    with pytest.raises(UserError, match=message):
        ResizeRule.from_config(cfg, training="TRAIN" in key)


def test_no_side_is_resized_to_nothing(truth_of):
    """1 px of 4000 would be a quarter of a pixel at 1000; boxes would have no area."""
    truth = truth_of([[0, 0, 200, 1]], height=1, width=4000)
    found = boxes_at_input(truth, ResizeRule((800,), 1000))
    assert found.shapes.tolist() == [[1, 1000]]
    assert found.sides.tolist() == [[50, 1]]
    assert ResizeRule((0, 1), 1).scaled(0.25) == ResizeRule((0, 1), 1)


def test_images_that_stay_as_they_are_need_no_max_size(mini_config):
    cfg = mini_config("INPUT.MIN_SIZE_TRAIN", "(0,)", "INPUT.MAX_SIZE_TRAIN", "0")
    assert not ResizeRule.from_config(cfg, training=True).resizes


def test_many_boxes_are_dealt_out_among_the_lengths(monkeypatch):
    monkeypatch.setattr(resizing, "_MOST_BOXES", 10)
    shapes = np.full((30, 2), 100)
    boxes = np.tile([0.0, 0, 10, 10], (30, 1))
    truth = GroundTruth(boxes, np.arange(30), shapes, {}, 0)
    found = boxes_at_input(truth, ResizeRule((100, 200, 300), 1000))
    assert found.sampled
    assert np.unique(found.size.round(), return_counts=True)[1].tolist() == [10, 10, 10]
    again = boxes_at_input(truth, ResizeRule((100, 200, 300), 1000))
    np.testing.assert_array_equal(found.boxes, again.boxes)


def test_images_that_max_size_decides_on_are_counted(truth_of):
    truth = truth_of([[0, 0, 10, 10]], height=100, width=400)
    assert boxes_at_input(truth, ResizeRule((200,), 600)).limited == 1
    found = boxes_at_input(truth, ResizeRule((200, 100), 600))
    assert found.limited == 0.5
    assert found.shapes.tolist() == [[150, 600], [100, 400]]
    assert found.size.tolist() == [15, 10]

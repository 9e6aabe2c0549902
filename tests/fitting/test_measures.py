"""Levels and anchors of boxes, against the plugin's level mapping and Detectron2's anchors."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, pairwise_iou
from hypothesis import given, settings
from hypothesis import strategies as st

from fpn_plugin import UserError, assign_levels
from fpn_plugin.fitting import (
    InputBoxes,
    Pyramid,
    ResizeRule,
    best_anchors,
    boxes_at_input,
    measure,
)  # fmt: skip
from fpn_plugin.fitting.anchors import matching_anchors
from fpn_plugin.modeling import build_fpn_backbone

PYRAMID = Pyramid(
    node="MODEL.RPN", stages=(2, 3, 4), anchor_levels=(2, 3, 4, 5), roi_levels=(2, 3, 4),
    canonical_size=112.0, canonical_level=4, canonical_keys=True, offset=0.0, divisibility=16,
    sizes=((12.0, 20.0), (32.0, 40.0), (64.0, 80.0), (100.0, 128.0)),
    ratios=((0.5, 1.0, 2.0),) * 4,
)  # fmt: skip
FRACTION = st.floats(0, 1)


def inputs_of(boxes: object, height: int = 256, width: int = 256) -> InputBoxes:
    boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
    shapes = np.tile([height, width], (len(boxes), 1))
    return InputBoxes(boxes, shapes, False, 0.0, float(height * width))


@settings(max_examples=60, deadline=None)
@given(
    height=st.integers(16, 300),
    width=st.integers(16, 300),
    corners=st.lists(st.tuples(FRACTION, FRACTION, FRACTION, FRACTION), min_size=1, max_size=8),
    offset=st.sampled_from([0.0, 0.25, 0.5]),
    divisibility=st.sampled_from([1, 16, 32]),
    threshold=st.sampled_from([0.3, 0.5, 0.7]),
)
def test_anchors_are_those_of_detectron2s_whole_grid(
    height, width, corners, offset, divisibility, threshold
):
    x, y = np.sort(np.array(corners).reshape(-1, 2, 2), axis=2).transpose(1, 0, 2)
    boxes = np.column_stack([x[:, 0], y[:, 0], x[:, 1], y[:, 1]])
    boxes *= [width - 1, height - 1, width - 1, height - 1]
    boxes[:, 2:] += 1
    pyramid = replace(PYRAMID, offset=offset, divisibility=divisibility)
    best, levels = best_anchors(inputs_of(boxes, height, width), pyramid)

    strides = [2**level for level in pyramid.anchor_levels]
    generator = DefaultAnchorGenerator(
        sizes=pyramid.sizes, aspect_ratios=pyramid.ratios, strides=strides, offset=offset
    )
    padded = [-(-side // divisibility) * divisibility for side in (height, width)]
    maps = [torch.zeros(1, 1, *(-(-side // stride) for side in padded)) for stride in strides]
    ious = [pairwise_iou(Boxes(torch.tensor(boxes)), anchors) for anchors in generator(maps)]
    expected = torch.stack([iou.max(dim=1).values for iou in ious]).numpy()
    np.testing.assert_allclose(best, expected.max(axis=0), atol=2e-5)
    of_level = expected[levels - 2, np.arange(len(boxes))]
    np.testing.assert_allclose(of_level, expected.max(axis=0), atol=2e-5)

    matching = np.stack([(iou >= threshold).sum(dim=1).numpy() for iou in ious], axis=1)
    matched = expected.max(axis=0) >= threshold + 1e-4
    inputs = inputs_of(boxes, height, width)
    # Between the counts at next to the same IoU, which float32 may round to either side.
    least, most = (matching_anchors(inputs, pyramid, threshold + d) for d in (1e-4, -1e-4))
    assert (least[matched] <= matching[matched]).all()
    assert (matching[matched] <= most[matched]).all()
    unmatched = expected.max(axis=0) < threshold - 1e-4
    assert (least[unmatched].sum(axis=1) == 1).all()  # the best one, as the RPN has it
    best_level = least[unmatched].argmax(axis=1), np.flatnonzero(unmatched)
    np.testing.assert_allclose(expected[best_level], best[unmatched], atol=2e-5)


@settings(deadline=None)
@given(
    sides=st.lists(st.tuples(st.floats(0.5, 900), st.floats(0.5, 900)), min_size=1, max_size=20),
    size=st.sampled_from([56.0, 112.0, 224.0]),
    level=st.integers(3, 5),
)
def test_levels_are_those_of_eq_1_and_what_is_clamped_is_counted(sides, size, level):
    boxes = np.array([[0, 0, *pair] for pair in sides])
    pyramid = replace(PYRAMID, canonical_size=size, canonical_level=level)
    found = measure(inputs_of(boxes, 900, 900), pyramid)
    clamped = assign_levels(torch.tensor(boxes), 2, 4, size, level)
    assert found.level.tolist() == clamped.tolist()
    wider = assign_levels(torch.tensor(boxes), 1, 5, size, level)
    assert found.clamped_fine == (wider < 2).sum()
    assert found.clamped_coarse == (wider > 4).sum()


def test_boundaries_of_eq_1_go_to_the_coarser_level():
    boxes = [[0, 0, s, s] for s in (55.9, 56, 111.9, 112, 223.9, 224)]
    found = measure(inputs_of(boxes), PYRAMID)  # s0 = 112 at k0 = 4; P2 to P4
    assert found.level.tolist() == [2, 3, 3, 4, 4, 4]
    assert (found.clamped_fine, found.clamped_coarse) == (0, 1)


def test_hand_computed_overlaps():
    one = replace(
        PYRAMID, anchor_levels=(3,), sizes=((16.0,),), ratios=((1.0,),), roi_levels=(), offset=0.0
    )
    boxes = [
        [8, 8, 24, 24],  # centre (16, 16): an anchor of its size stands there
        [12, 8, 28, 24],  # half a stride off: 12 x 16 of 2 x 256 - 12 x 16
        [0, 0, 8, 8],  # centre (4, 4); the nearest anchor, at (0, 0) or (8, 8), covers all of it
        [240, 240, 256, 256],  # centre (248, 248), where the last one stands
        [252, 252, 256, 256],  # centre (254, 254), beyond the last one, which covers it
    ]
    best, levels = best_anchors(inputs_of(boxes), one)
    np.testing.assert_allclose(best, [1, 192 / 320, 64 / 256, 1, 16 / 256])
    assert set(levels) == {3}


def test_cells_are_the_shorter_side_over_the_stride():
    found = measure(inputs_of([[0, 0, 3, 90], [0, 0, 8, 8], [0, 0, 60, 60]]), PYRAMID)
    assert found.level.tolist() == [2, 2, 3]
    assert found.cells.tolist() == [0.75, 2, 7.5]
    assert found.below_cells(1) == pytest.approx(1 / 3)
    assert found.below_cells(2) == pytest.approx(1 / 3)


def test_tables_add_up():
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 100, (500, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 150, (500, 2))], axis=1)
    found = measure(inputs_of(boxes), PYRAMID)
    figures = found.as_dict()
    for rows in (figures["by_size"], figures["by_level"]):
        assert sum(row["share"] for row in rows) == pytest.approx(1)
        for key in ("recall_50", "recall_70", "mean_iou"):
            total = sum(row["share"] * row[key] for row in rows if row["share"])
            assert total == pytest.approx(figures[key])
    assert sum(row["pooled"] for row in figures["by_level"]) == pytest.approx(1)
    assert sum(figures[key] for key in ("small", "medium", "large")) == pytest.approx(1)
    assert figures["recall_50"] == (found.best_iou >= 0.5).mean()


def test_the_pyramid_of_a_config(mini_config):
    pyramid = Pyramid.from_config(mini_config())
    assert pyramid.stages == (2, 3, 4, 5)
    assert pyramid.anchor_levels == (2, 3, 4, 5, 6)
    assert pyramid.roi_levels == (2, 3, 4, 5)
    assert (pyramid.canonical_size, pyramid.canonical_level) == (112, 4)
    assert pyramid.sizes == ((16.0,), (32.0,), (64.0,), (128.0,), (256.0,))
    assert pyramid.ratios == ((0.5, 1.0, 2.0),) * 5
    assert pyramid.divisibility == 32
    stock = Pyramid.from_config(mini_config("MODEL.ROI_HEADS.NAME", "StandardROIHeads"))
    assert (stock.canonical_size, stock.canonical_keys) == (224, False)


def test_the_divisibility_is_that_of_the_model(mini_config):
    for opts in ((), ("MODEL.FPN.MATCH_LATERAL_SIZE", "True")):
        cfg = mini_config(*opts)
        built = build_fpn_backbone(cfg, ShapeSpec(channels=3)).size_divisibility
        assert Pyramid.from_config(cfg).divisibility == max(built, 1)


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (("MODEL.META_ARCHITECTURE", "FCOS"), "'FCOS' has no anchors .* one of GeneralizedRCNN"),
        (("MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"), "not from an RPN"),
        (("MODEL.BACKBONE.NAME", "build_image_pyramid_backbone"), "and take over its anchors"),
        (("MODEL.RPN.IN_FEATURES", "['res4']"), r"RPN.IN_FEATURES is \['res4'\], which is no pyr"),
        (("MODEL.RPN.IN_FEATURES", "['p2', 'p4']"), "without a gap"),
        (("MODEL.ANCHOR_GENERATOR.SIZES", "[[8], [16]]"), r"one for each of the 5 levels"),
        (("MODEL.ANCHOR_GENERATOR.SIZES", "[[0]]"), r"expected values above 0"),
        (("MODEL.ANCHOR_GENERATOR.NAME", "RotatedAnchorGenerator"), "only .* DefaultAnchorGener"),
    ],
)
def test_a_config_that_cannot_be_fitted_says_which_key(mini_config, opts, message):
    with pytest.raises(UserError, match=message):
        Pyramid.from_config(mini_config(*opts))


def test_a_dataset_at_two_input_sizes_is_measured_at_both(truth_of):
    inputs = boxes_at_input(truth_of([[0, 0, 50, 50]]), ResizeRule((256, 512), 1000))
    assert measure(inputs, PYRAMID).size.tolist() == [50, 100]


def test_octaves_below_a_pixel_are_reported_and_empty_ones_left_out(mini_config, truth_of):
    inputs = boxes_at_input(truth_of([[0, 0, 0.02, 0.02], [0, 0, 50, 50]]), ResizeRule((0,), 1))
    found = measure(inputs, Pyramid.from_config(mini_config()))
    octaves = [(row["from"], row["to"], row["share"]) for row in found.octaves()]
    assert octaves == [(1 / 64, 1 / 32, 0.5), (32, 64, 0.5)]


def test_thin_objects_are_counted_at_their_level(mini_config, truth_of):
    """At s0 112 and k0 4: 100 x 3 px and 100 x 6 px go to P2, cells of 4 px; 100 x 100 to P3."""
    boxes = [[0, 0, 100, 3], [0, 0, 100, 6], [0, 0, 100, 100]]
    inputs = boxes_at_input(truth_of(boxes), ResizeRule((256,), 512))
    found = measure(inputs, Pyramid.from_config(mini_config()))
    rows = {row["level"]: (row["below_1_cell"], row["below_2_cells"]) for row in found.by_level()}
    assert rows[2] == (0.5, 1.0)
    assert rows[3] == (0.0, 0.0)
    assert rows[4] == (None, None)

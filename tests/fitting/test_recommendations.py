"""What is recommended: anchors that fit, levels, canonical size, room; and when nothing is."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import MetadataCatalog
from hypothesis import given, settings
from hypothesis import strategies as st

from fpn_plugin import UserError
from fpn_plugin.engine import load_config
from fpn_plugin.fitting import (
    GroundTruth,
    InputBoxes,
    Pyramid,
    ResizeRule,
    boxes_at_input,
    fit_pyramid,
    measure,
    read_ground_truth,
)  # fmt: skip
from fpn_plugin.fitting.anchors import fit_anchors, matching_anchors
from fpn_plugin.fitting.density import Density, check_sampling
from fpn_plugin.fitting.recommendations import crowded_matches, recommend_room


def boxes_of(sides: object, seed: int = 0) -> np.ndarray:
    """Boxes of given widths and heights, anywhere in 256 x 256 px."""
    sides = np.asarray(sides, np.float64)
    corner = np.random.default_rng(seed).uniform(0, 1, sides.shape) * (256 - sides)
    return np.concatenate([corner, corner + sides], axis=1)


def inputs_of(boxes: np.ndarray) -> InputBoxes:
    return InputBoxes(boxes, np.full((len(boxes), 2), 256), False, 0.0, 256.0**2)


def by_subject(fit) -> dict[str, object]:
    return {each.subject: each for each in fit.recommendations}


def fit_to(cfg, truth_of, sides):
    """A fit; the pyramid that it measures is that of the config that it recommends."""
    fit = fit_pyramid(cfg, truth_of(boxes_of(sides)))
    assert fit.after.pyramid == Pyramid.from_config(fit.fitted)
    return fit


def recommended(cfg, truth_of, sides) -> dict[str, object]:
    return by_subject(fit_to(cfg, truth_of, sides))


@settings(max_examples=8, deadline=None)
@given(
    low=st.floats(4, 60),
    spread=st.floats(1, 4),
    aspect=st.floats(0.2, 5),
    strides=st.sampled_from([2, 4, 5, 8, 16]),
    seed=st.integers(0, 9),
)
def test_fitted_anchors_are_never_worse_and_keep_to_their_strides(
    low, spread, aspect, strides, seed
):
    sizes = [[strides * stride] for stride in (4, 8, 16, 32, 64)]
    opts = "MODEL.ANCHOR_GENERATOR.SIZES", str(sizes)
    pyramid = Pyramid.from_config(load_config("mini/faster_rcnn_R_18_FPN.yaml", opts))
    size = low * spread ** np.random.default_rng(seed).uniform(0, 1, 60)
    inputs = inputs_of(boxes_of(np.column_stack([size / aspect**0.5, size * aspect**0.5]), seed))
    fitted = fit_anchors(inputs, pyramid)
    assert measure(inputs, fitted).mean_iou >= measure(inputs, pyramid).mean_iou - 1e-4
    factor = fitted.sizes[0][0] / pyramid.sizes[0][0]
    for level, (before,), (after,) in zip(
        fitted.anchor_levels, pyramid.sizes, fitted.sizes, strict=True
    ):
        assert after / before == pytest.approx(factor, rel=0.01)
        assert 0.99 * min(4, strides) <= after / 2**level <= 1.01 * max(8, strides)
    assert fitted.canonical_size == pytest.approx(112 * factor, rel=0.01)
    assert fitted.ratios == pyramid.ratios


def test_squares_on_the_grid_are_fitted_exactly(mini_config):
    """Squares of 50 px, centred where P4 has anchors: of 64 px before, of 3.125 strides then."""
    pyramid = Pyramid.from_config(mini_config())
    centers = np.random.default_rng(0).integers(4, 12, (200, 2)) * 16.0
    inputs = inputs_of(np.concatenate([centers - 25, centers + 25], axis=1))
    fitted = fit_anchors(inputs, pyramid)
    assert measure(inputs, pyramid).mean_iou == pytest.approx((50 / 64) ** 2, abs=0.01)
    assert measure(inputs, fitted).mean_iou > 0.95
    assert fitted.sizes[1][0] == pytest.approx(50, rel=0.02)  # on P3, of 6.25


def test_anchors_of_one_level_are_fitted(truth_of):
    cfg = load_config("paper/table1_f_P2.yaml", ["INPUT.MIN_SIZE_TRAIN", "(256,)"])
    cfg.INPUT.MIN_SIZE_TEST = 256
    fit = fit_to(cfg, truth_of, np.full((120, 2), 24.0))
    [sizes] = fit.fitted.MODEL.ANCHOR_GENERATOR.SIZES
    [before] = cfg.MODEL.ANCHOR_GENERATOR.SIZES
    assert sizes == pytest.approx([size * sizes[0] / before[0] for size in before], rel=0.01)
    assert sizes[0] == pytest.approx(24, rel=0.1)


def test_levels_that_large_objects_do_not_need_are_reported_and_kept(mini_config, truth_of):
    cfg = mini_config()
    before = cfg.dump()
    fit = fit_to(cfg, truth_of, np.random.default_rng(0).uniform(100, 240, (300, 2)))
    assert cfg.dump() == before  # it changes only its copy
    levels = by_subject(fit)["levels"]
    # Narrower than 4 cells of P4, 64 px, is none either; two stages stay.
    assert levels.keep and "P2 and P3 may go" in levels.reason
    assert "not tried by training" in levels.effect
    sizes = [list(each) for each in fit.after.pyramid.sizes]
    assert levels.untried == {
        "MODEL.FPN.IN_FEATURES": ["res4", "res5"],
        "MODEL.RPN.IN_FEATURES": ["p4", "p5", "p6"],
        "MODEL.ROI_HEADS.IN_FEATURES": ["p4", "p5"],
        "MODEL.ANCHOR_GENERATOR.SIZES": sizes[2:],
    }
    # Cells, in those of P6: 1 + 4 + 16 of 1 + 4 + 16 + 64 + 256.
    assert levels.figures["cells"] == pytest.approx(21 / 341)
    assert Pyramid.from_config(fit.fitted).stages == (2, 3, 4, 5)


def test_a_level_goes_with_its_own_list_of_ratios(mini_config, truth_of):
    """Objects of 50 px: those need P3, of which 4 cells are 32 px, and not P2."""
    cfg = mini_config("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", str([[0.5, 1.0, 2.0]] * 5))
    fit = fit_to(cfg, truth_of, np.full((120, 2), 50.0))
    untried = by_subject(fit)["levels"].untried
    assert untried["MODEL.FPN.IN_FEATURES"] == ["res3", "res4", "res5"]
    assert untried["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"] == [[0.5, 1.0, 2.0]] * 4


@pytest.mark.parametrize(
    ("opts", "reason"),
    [
        (("MODEL.META_ARCHITECTURE", "PanopticFPN"), "semantic head"),
        (("MODEL.FPN.OUT_FEATURES", "['p2', 'p3', 'p4', 'p5', 'p6']"), "FPN.OUT_FEATURES names"),
    ],
)
def test_what_reads_the_finest_level_elsewhere_keeps_it(mini_config, truth_of, opts, reason):
    found = recommended(mini_config(*opts), truth_of, np.full((120, 2), 150.0))["levels"]
    assert found.keep and reason in found.effect


def retinanet(*opts: str):
    opts = ["INPUT.MIN_SIZE_TRAIN", "(256,)", "INPUT.MIN_SIZE_TEST", "256", *opts]
    return load_config("COCO-Detection/retinanet_R_50_FPN_1x.yaml", opts)


def test_p2_is_reported_for_objects_too_small_for_p3(truth_of):
    cfg = retinanet("INPUT.MIN_SIZE_TRAIN", "(512,)")  # as large as images may become
    fit = fit_to(cfg, truth_of, np.full((120, 2), 6.0))
    levels = by_subject(fit)["levels"]
    assert levels.keep and "P2 may help" in levels.reason
    untried = levels.untried
    assert untried["MODEL.FPN.IN_FEATURES"] == ["res2", "res3", "res4", "res5"]
    assert untried["MODEL.RETINANET.IN_FEATURES"] == ["p2", "p3", "p4", "p5", "p6", "p7"]
    assert untried["MODEL.ANCHOR_GENERATOR.SIZES"][0] == pytest.approx([16, 20.16, 25.4], abs=0.01)
    assert "MODEL.RESNETS.OUT_FEATURES" not in untried  # the plugin's backbone sees to it
    assert "canonical size" not in by_subject(fit)
    assert fit.before.below_cells(2) == 1


def test_as_many_levels_are_reported_as_the_rule_asks_for(truth_of):
    cfg = retinanet(
        "INPUT.MIN_SIZE_TRAIN", "(512,)",
        "MODEL.FPN.IN_FEATURES", "['res4', 'res5']",
        "MODEL.RETINANET.IN_FEATURES", "['p4', 'p5', 'p6', 'p7']",
        "MODEL.ANCHOR_GENERATOR.SIZES", "[[64], [128], [256], [512]]",
    )  # fmt: skip
    untried = recommended(cfg, truth_of, np.full((120, 2), 6.0))["levels"].untried
    assert untried["MODEL.FPN.IN_FEATURES"] == ["res2", "res3", "res4", "res5"]
    assert untried["MODEL.ANCHOR_GENERATOR.SIZES"][:3] == [[16.0], [32.0], [64.0]]


def test_p2_is_the_finest_there_is(mini_config, truth_of):
    cfg = mini_config("INPUT.MIN_SIZE_TRAIN", "(512,)")
    found = recommended(cfg, truth_of, np.full((120, 2), 3.0))["levels"]
    assert found.keep and not found.untried
    assert "INPUT.MIN_SIZE" in found.effect


@pytest.mark.parametrize(
    ("size", "level", "expected"),
    [(112, 4, None), (224, 4, None), (160, 4, None), (28, 4, 112), (448, 4, 224), (112, 5, 224)],
)
def test_the_canonical_size_is_one_to_two_cells_a_bin(mini_config, truth_of, size, level, expected):
    key = "MODEL.FPN.CANONICAL_BOX_SIZE"
    cfg = mini_config(key, str(size), "MODEL.FPN.CANONICAL_LEVEL", str(level))
    sides = np.random.default_rng(0).uniform(10, 200, (100, 2))
    found = recommended(cfg, truth_of, sides)["canonical size"]
    assert found.keep
    assert found.untried == ({} if expected is None else {key: expected})
    assert ("not tried by training" in found.effect) == bool(found.untried)


def test_heads_that_do_not_read_the_canonical_size_are_reported(mini_config, truth_of):
    opts = "MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "28"
    found = recommended(mini_config(*opts), truth_of, np.full((120, 2), 50.0))["canonical size"]
    assert found.keep
    assert "FPNROIHeads" in found.effect


def test_anchors_that_fit_are_kept(mini_config, truth_of):
    cfg = mini_config()
    first = fit_to(cfg, truth_of, np.full((120, 2), 40.0))
    assert not by_subject(first)["anchors"].keep
    again = fit_to(first.fitted, truth_of, np.full((120, 2), 40.0))
    assert by_subject(again)["anchors"].keep
    assert again.after is again.before


@pytest.mark.parametrize(("side", "kept"), [(32.0, True), (36.0, True), (46.0, False)])
def test_anchors_stay_if_fitted_ones_match_few_more_objects(mini_config, truth_of, side, kept):
    fit = fit_to(mini_config(), truth_of, np.full((120, 2), side))
    anchors = by_subject(fit)["anchors"]
    gained = anchors.figures["gained"]
    recalls = [anchors.figures[name]["recall_70"] for name in ("before", "fitted")]
    assert gained == pytest.approx(recalls[1] - recalls[0])
    assert (gained < 0.25) == kept == anchors.keep
    if not kept:
        factor = fit.after.pyramid.sizes[0][0] / 16
        assert anchors.changes == {
            "MODEL.ANCHOR_GENERATOR.SIZES": [
                [pytest.approx(size * factor, rel=0.01)] for size in (16, 32, 64, 128, 256)
            ],
            "MODEL.FPN.CANONICAL_BOX_SIZE": pytest.approx(112 * factor, abs=1),
        }


def test_matches_are_those_of_the_models_threshold(mini_config, truth_of):
    sides = np.full((120, 2), 46.0)
    cfg = mini_config("MODEL.RPN.IOU_THRESHOLDS", "[0.3, 0.4]")
    anchors = recommended(cfg, truth_of, sides)["anchors"]
    assert anchors.figures["match_threshold"] == 0.4
    assert anchors.keep  # all objects have one already


def test_heads_with_a_fixed_canonical_size_get_only_anchors(mini_config, truth_of):
    cfg = mini_config("MODEL.ROI_HEADS.NAME", "StandardROIHeads")
    changes = recommended(cfg, truth_of, np.full((120, 2), 46.0))["anchors"].changes
    assert list(changes) == ["MODEL.ANCHOR_GENERATOR.SIZES"]


def test_one_more_size_is_reported_and_not_set(mini_config, truth_of):
    size = np.geomspace(14, 120, 150)
    fit = fit_to(mini_config(), truth_of, np.column_stack([size, size]))
    anchors = by_subject(fit)["anchors"]
    assert anchors.keep and "6 anchors per cell instead of 3" in anchors.effect
    sizes = anchors.untried["MODEL.ANCHOR_GENERATOR.SIZES"]
    assert sizes[0] == pytest.approx([16, 16 * 2**0.5], rel=0.01)
    assert fit.fitted.MODEL.ANCHOR_GENERATOR.SIZES[0] == [16]


def test_too_few_objects_change_nothing(mini_config, truth_of):
    cfg = mini_config()
    for count, reason in ((1, "1 object is too few"), (99, "99 objects are too few")):
        fit = fit_to(cfg, truth_of, np.full((count, 2), 46.0))
        assert [each.subject for each in fit.recommendations] == ["everything"]
        assert reason in fit.recommendations[0].reason
        assert fit.fitted == cfg
        assert fit.after is fit.before
    fit = fit_to(cfg, truth_of, np.full((100, 2), 46.0))
    assert not by_subject(fit)["anchors"].keep


def photographs(side: float, height: int = 480, width: int = 640, count: int = 120):
    """Photographs with two squares each, of a side in stored pixels."""
    boxes = np.tile([[10.0, 10, 10 + side, 10 + side], [200, 100, 200 + side, 100 + side]], (60, 1))
    shapes = np.tile([height, width], (60, 1))
    return GroundTruth(boxes, np.repeat(np.arange(60), 2), shapes, {}, 0, ("thing",))


@pytest.mark.parametrize(
    ("side", "expected"),
    [
        (100, 256),  # 53 px at 256: shrunk, and large enough
        (50, 320),  # 26.7 px at 256, 33.3 at 320
        (42, 384),  # 31.5 at 360, 33.6 at 384
        (30, 448),  # 28 px at 448; 512 is larger than the photograph
        (7.6, 512),  # 7.1 px at 448, narrower than two cells of P2
    ],
)
def test_photographs_are_shrunk_only_as_far_as_their_objects_allow(mini_config, side, expected):
    fit = fit_pyramid(mini_config(), photographs(side))
    size = by_subject(fit)["input size"]
    assert "640 x 480 px" in size.reason and "shrinks them to 53%" in size.reason
    new = fit.fitted.INPUT
    assert (*new.MIN_SIZE_TRAIN, new.MIN_SIZE_TEST) == (expected, expected)
    assert fit.fitted.INPUT.MAX_SIZE_TRAIN == 1333
    assert size.keep == (expected == 256)
    assert np.allclose(fit.after.size, side * expected / 480, rtol=0.01)
    times = f"{(expected / 256) ** 2:.1f} times the pixels"
    assert (times in size.effect) != size.keep
    assert by_subject(fit_pyramid(fit.fitted, fit.truth))["input size"].keep


def test_images_with_tiny_objects_are_enlarged_to_twice_at_most(mini_config, truth_of):
    fit = fit_to(mini_config(), truth_of, np.full((120, 2), 5.0))
    size = by_subject(fit)["input size"]
    assert size.changes == {"INPUT.MIN_SIZE_TRAIN": [448], "INPUT.MIN_SIZE_TEST": 448}
    assert "not detail" in size.effect
    fit = fit_to(mini_config(), truth_of, np.full((120, 2), 2.0))
    assert fit.fitted.INPUT.MIN_SIZE_TRAIN == (512,)
    assert "Many stay too small" in by_subject(fit)["input size"].effect
    assert by_subject(fit_pyramid(fit.fitted, fit.truth))["input size"].keep


def test_all_lengths_grow_and_max_size_if_it_would_limit_them(mini_config):
    lengths = "INPUT.MIN_SIZE_TRAIN", "(240, 320)", "INPUT.MAX_SIZE_TRAIN", "450"
    for sampling in ("choice", "range"):
        cfg = mini_config(*lengths, "INPUT.MIN_SIZE_TRAIN_SAMPLING", sampling)
        changes = by_subject(fit_pyramid(cfg, photographs(40)))["input size"].changes
        factor = changes["INPUT.MIN_SIZE_TEST"] / 256
        assert factor > 1
        assert changes["INPUT.MIN_SIZE_TRAIN"] == [240 * factor, 320 * factor]
        assert changes["INPUT.MAX_SIZE_TRAIN"] == 450 * factor


def test_objects_of_other_sizes_in_testing_are_reported(mini_config):
    cfg = mini_config("INPUT.MIN_SIZE_TEST", "800")
    size = by_subject(fit_pyramid(cfg, photographs(100)))["input size"]
    assert size.keep and "MIN_SIZE_TEST shows objects 3.1 times as large" in size.effect
    size = by_subject(fit_pyramid(cfg, photographs(42)))["input size"]
    assert size.changes == {"INPUT.MIN_SIZE_TRAIN": [384]}
    assert "MIN_SIZE_TEST shows objects 2.1 times as large" in size.effect


@pytest.mark.parametrize(
    ("name", "sided"),
    [
        ("cell", False), ("bright lamp", False), ("copyright", False), ("stop_sign", False),
        ("left shoe", True), ("RightHand", True), ("hand_LEFT", True), ("7", True), ("12", True),
        ("B", True), ("turn-right", True), ("arrow", True),
    ],
)  # fmt: skip
def test_images_are_mirrored_unless_names_are_against_it(mini_config, truth_of, name, sided):
    boxes, key = boxes_of(np.full((120, 2), 46.0)), "INPUT.RANDOM_FLIP"
    truth = truth_of(boxes, classes=("thing", name))
    flips = by_subject(fit_pyramid(mini_config(), truth))["flips"]
    assert flips.changes == ({} if sided else {key: "horizontal"})
    assert (repr(name) in flips.reason) == sided
    flips = by_subject(fit_pyramid(mini_config(key, "horizontal"), truth))["flips"]
    assert flips.keep
    assert flips.untried == ({key: "none"} if sided else {})


def test_flips_are_not_set_without_names_or_pairs_of_keypoints(mini_config, truth_of):
    boxes, key = boxes_of(np.full((120, 2), 46.0)), "INPUT.RANDOM_FLIP"
    for classes in (None, ("",)):
        flips = by_subject(fit_pyramid(mini_config(), truth_of(boxes, classes=classes)))["flips"]
        assert flips.keep and flips.untried == {key: "horizontal"}
        assert "no names" in flips.reason
    opts = "MODEL.KEYPOINT_ON", "True", "DATASETS.TRAIN"
    for train, changes in (("mini_train", {}), ("keypoints_coco_2017_train", {key: "horizontal"})):
        cfg = mini_config(*opts, f"('{train}',)")
        MetadataCatalog.get("keypoints_coco_2017_train")
        assert by_subject(fit_pyramid(cfg, truth_of(boxes)))["flips"].changes == changes


CELLS = Path(__file__).parents[2].parent / "shared" / "data" / "cells" / "train.json"


@pytest.mark.skipif(not CELLS.is_file(), reason=f"photographs of blood cells are not at {CELLS}")
def test_blood_cells(mini_config):
    """55 px anchors on P2, and 400 candidates, once cost 9 AP here."""
    truth = read_ground_truth([str(CELLS)])
    fit = fit_pyramid(mini_config(), truth)
    changes = {key: v for each in fit.recommendations for key, v in each.changes.items()}
    sizes = changes.pop("MODEL.ANCHOR_GENERATOR.SIZES")
    assert [len(each) for each in sizes] == [1] * 5
    assert changes == {
        "INPUT.MIN_SIZE_TRAIN": [384], "INPUT.MIN_SIZE_TEST": 384,
        "INPUT.RANDOM_FLIP": "horizontal",
        "MODEL.FPN.CANONICAL_BOX_SIZE": round(112 * sizes[0][0] / 16),
    }  # fmt: skip
    counts = matching_anchors(
        boxes_at_input(truth, ResizeRule((384,), 1333)), fit.after.pyramid, 0.7
    )
    assert np.median(counts.sum(axis=1)) <= 2
    assert counts.sum(axis=0).argmax() == 2  # P4
    crowded = mini_config(
        "MODEL.ANCHOR_GENERATOR.SIZES",
        "[[21.1, 55.0], [47.0, 63.0], [85.8, 112.0], [91.9, 124.0], [184.0, 249.0]]",
        "INPUT.MIN_SIZE_TRAIN", "(256,)",
    )  # fmt: skip
    rule = ResizeRule((256,), 1333)
    matches = crowded_matches(crowded, truth, rule, Pyramid.from_config(crowded))
    assert matches == (204, 13)
    proposals, *_ = recommend_room(crowded, Density.of(truth), matches)
    assert proposals.changes["MODEL.RPN.PRE_NMS_TOPK_TRAIN"] == 2100


def test_samples_are_reported_by_what_takes_them(mini_config):
    def samples(*opts):
        found = recommend_room(mini_config(*opts), Density.of(crowds(5)), (5, 1.0))
        return next(each for each in found if each.subject == "samples")

    both, only = samples(), samples("MODEL.META_ARCHITECTURE", "ProposalNetwork")
    assert "in RPN and ROI_HEADS, and there is" in both.reason
    for part in ("RPN", "ROI_HEADS"):
        assert f" {part}.BATCH_SIZE_PER_IMAGE " in both.effect
    assert "in RPN, and there is" in only.reason and "ROI_HEADS" not in only.effect


def crowds(*counts: int) -> GroundTruth:
    image = np.repeat(np.arange(len(counts)), counts)
    boxes = np.tile([0.0, 0, 20, 20], (len(image), 1))
    return GroundTruth(boxes, image, np.full((len(counts), 2), 256), {}, 0)


def test_density_is_over_images_that_have_objects():
    density = Density.of(crowds(0, 10, 0, 30))
    assert density.counts.tolist() == [10, 30]
    assert density.empty == 2
    assert density.crowded == 30
    assert density.without_room(20) == pytest.approx(10 / 40)


def test_sparse_data_has_room(mini_config):
    assert all(
        each.keep for each in recommend_room(mini_config(), Density.of(crowds(5, 12, 3)), (12, 1.0))
    )


def test_dense_data_gets_room_for_each_object(mini_config):
    found = list(recommend_room(mini_config(), Density.of(crowds(*[300] * 10)), (420, 1.5)))
    proposals, samples, detections = found
    assert proposals.changes == {
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 4200, "MODEL.RPN.PRE_NMS_TOPK_TEST": 4200,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 1500, "MODEL.RPN.POST_NMS_TOPK_TEST": 1500,
    }  # fmt: skip
    assert "at most 420 anchors on a level that match" in proposals.reason
    assert detections.changes == {"TEST.DETECTIONS_PER_IMAGE": 450}
    assert samples.untried == {
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 960,  # 450 at a half, in 64s
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 1856,  # 450 at a quarter
    }
    assert samples.keep and "not tried by training" in samples.effect
    assert "66.7% before, 0.0% after" in detections.effect
    assert "100 detections of a class in an image" in detections.effect


def test_retinanet_gets_a_candidate_for_each_match():
    density = Density.of(crowds(*[300] * 10))
    for matches, changes in ((900, {}), (1210, {"MODEL.RETINANET.TOPK_CANDIDATES_TEST": 1300})):
        proposals, detections = recommend_room(retinanet(), density, (matches, 4.0))
        assert proposals.changes == changes
        assert detections.changes == {"TEST.DETECTIONS_PER_IMAGE": 450}


@pytest.mark.parametrize("part", ["RPN", "ROI_HEADS"])
def test_a_sampler_that_takes_no_object_is_refused(mini_config, part):
    cfg = mini_config(f"MODEL.{part}.POSITIVE_FRACTION", "0.0")
    with pytest.raises(UserError, match=f"{part}.POSITIVE_FRACTION is 0.0, .*as 0.25"):
        list(recommend_room(cfg, Density.of(crowds(5)), (5, 1.0)))
    check_sampling(mini_config(f"MODEL.{part}.POSITIVE_FRACTION", "0.01"))


def test_only_the_samplers_that_a_model_has_are_looked_at(mini_config):
    never = ["MODEL.RPN.POSITIVE_FRACTION", "0.0", "MODEL.ROI_HEADS.POSITIVE_FRACTION", "0.0"]
    check_sampling(mini_config("MODEL.META_ARCHITECTURE", "RetinaNet", *never))
    check_sampling(mini_config("MODEL.META_ARCHITECTURE", "ProposalNetwork", *never[2:]))
    with pytest.raises(UserError, match=r"RPN\.POSITIVE"):
        check_sampling(mini_config("MODEL.META_ARCHITECTURE", "ProposalNetwork", *never))


def test_a_padded_grid_reaches_beyond_the_image(mini_config):
    pyramid = Pyramid.from_config(mini_config())
    boxes = np.array([[236.0, 236, 252, 252]])
    inputs = InputBoxes(boxes, np.array([[252, 252]]), False, 0.0, 252.0**2)
    parts = {"anchor_levels": (5,), "sizes": ((16.0,),), "ratios": ((1.0,),), "roi_levels": ()}
    only = replace(pyramid, **parts, offset=0.5)
    # 252 px are padded to 256: the last anchor stands at 240, 4 px off either way.
    assert measure(inputs, only).best_iou[0] == pytest.approx(144 / (512 - 144))


def test_other_input_sizes_are_measured(mini_config, truth_of):
    fit = fit_to(mini_config(), truth_of, np.full((120, 2), 10.0))
    rows = {(row["factor"], row["max_factor"]): row for row in fit.input_sizes}
    double, half, same = rows[2, 2], rows[0.5, 0.5], rows[1, 1]
    assert double["short_edges"] == [512]
    assert double["pixels"] == 4 * same["pixels"]
    assert double["median_size"] == pytest.approx(20)
    assert half["below_2_cells"] == 1
    again = boxes_at_input(fit.truth, ResizeRule((512,), 2666))
    found = measure(again, Pyramid.from_config(fit.cfg))
    assert double["recall_50"] == found.recall(0.5)
    assert double["mean_iou"] == found.mean_iou
    assert same["levels"] == {2: 1.0, 3: 0, 4: 0, 5: 0}


def test_only_a_larger_max_size_is_measured_too(mini_config, truth_of):
    """256 x 1024 px at (256, 512) are halved; at twice the MAX_SIZE they stay."""
    cfg = mini_config("INPUT.MAX_SIZE_TRAIN", "512")
    fit = fit_pyramid(cfg, truth_of(boxes_of(np.full((120, 2), 30.0)), 256, 1024))
    rows = {(row["factor"], row["max_factor"]): row for row in fit.input_sizes}
    assert rows[1, 1]["median_size"] == pytest.approx(15)
    assert rows[1, 2]["median_size"] == pytest.approx(30)
    assert (rows[1, 2]["short_edges"], rows[1, 2]["max_size"]) == ([256], 1024)


def test_images_that_stay_as_they_are_have_no_other_size(mini_config, truth_of):
    cfg = mini_config("INPUT.MIN_SIZE_TRAIN", "(0,)")
    fit = fit_to(cfg, truth_of, np.full((120, 2), 30.0))
    assert [row["pixels"] for row in fit.input_sizes] == [256 * 256]

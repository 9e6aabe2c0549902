"""What is recommended: anchors that fit, levels, canonical size, room; and when nothing is."""

from dataclasses import replace

import numpy as np
import pytest
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
)  # fmt: skip
from fpn_plugin.fitting.anchors import fit_anchors
from fpn_plugin.fitting.density import Density, check_sampling
from fpn_plugin.fitting.recommendations import recommend_room


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
    num_sizes=st.integers(1, 2),
    ratios_too=st.booleans(),
    seed=st.integers(0, 9),
)
def test_fitted_anchors_are_never_worse_than_the_configs(
    low, spread, aspect, num_sizes, ratios_too, seed
):
    pyramid = Pyramid.from_config(load_config("mini/faster_rcnn_R_18_FPN.yaml"))
    rng = np.random.default_rng(seed)
    size = low * spread ** rng.uniform(0, 1, 120)
    inputs = inputs_of(boxes_of(np.column_stack([size / aspect**0.5, size * aspect**0.5]), seed))
    fitted = fit_anchors(inputs, pyramid, num_sizes, ratios_too=ratios_too)
    assert measure(inputs, fitted).mean_iou >= measure(inputs, pyramid).mean_iou - 2e-3
    assert [len(each) for each in fitted.sizes] == [num_sizes] * 5
    for level, sizes in zip(fitted.anchor_levels, fitted.sizes, strict=True):
        assert list(sizes) == sorted(sizes)
        assert 0.99 * 2**level <= sizes[0] and sizes[-1] <= 16.1 * 2**level
    assert list(fitted.ratios[0]) == sorted(fitted.ratios[0])
    assert len(set(fitted.ratios)) == 1
    assert ratios_too or fitted.ratios == pyramid.ratios


def test_two_shapes_on_the_grid_are_fitted_exactly(mini_config):
    opts = "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", "[[0.5, 2.0]]"
    pyramid = Pyramid.from_config(mini_config(*opts))
    # Centres on multiples of 32 px, where every level but the last has an anchor.
    centers = np.random.default_rng(0).integers(2, 6, (200, 2)) * 32.0
    half = np.where(np.arange(200)[:, None] % 2, [[20.0, 5.0]], [[5.0, 20.0]])
    inputs = inputs_of(np.concatenate([centers - half, centers + half], axis=1))
    before, fitted = measure(inputs, pyramid), fit_anchors(inputs, pyramid, 1, ratios_too=True)
    after = measure(inputs, fitted)
    assert before.mean_iou < 0.7
    assert after.mean_iou > 0.98
    assert fitted.ratios[0] == pytest.approx((0.25, 4), rel=0.03)
    assert min(abs(size - 20) for (size,) in fitted.sizes) < 0.6


def test_levels_that_no_box_decides_on_go_on_in_octaves(mini_config):
    pyramid = Pyramid.from_config(mini_config())
    sizes = fit_anchors(inputs_of(boxes_of(np.full((50, 2), 12.0))), pyramid, 1).sizes
    assert sizes[3][0] == pytest.approx(2 * sizes[2][0], rel=0.01) or sizes[3][0] == 32
    assert sizes[4][0] == pytest.approx(2 * sizes[3][0], rel=0.01) or sizes[4][0] == 64


def test_large_objects_drop_the_finest_level(mini_config, truth_of):
    cfg = mini_config()
    before = cfg.dump()
    fit = fit_to(cfg, truth_of, np.random.default_rng(0).uniform(100, 240, (300, 2)))
    assert cfg.dump() == before  # it changes only its copy
    levels = by_subject(fit)["levels"]
    # Narrower than 4 cells of P4, 64 px, is none either; two stages stay.
    assert levels.changes == {
        "MODEL.FPN.IN_FEATURES": ["res4", "res5"],
        "MODEL.RPN.IN_FEATURES": ["p4", "p5", "p6"],
        "MODEL.ROI_HEADS.IN_FEATURES": ["p4", "p5"],
        "MODEL.ANCHOR_GENERATOR.SIZES": [[64.0], [128.0], [256.0]],
    }
    assert "P2 and P3 are dropped" in levels.reason
    # Cells, in those of P6: 1 + 4 + 16 of 1 + 4 + 16 + 64 + 256.
    assert levels.figures["cells"] == pytest.approx(21 / 341)
    fitted = Pyramid.from_config(fit.fitted)
    assert (fitted.stages, fitted.anchor_levels) == ((4, 5), (4, 5, 6))
    assert fit.after.mean_iou > fit.before.mean_iou + 0.1
    again = by_subject(fit_pyramid(fit.fitted, fit.truth))
    assert again["levels"].keep and again["anchors"].keep


def test_a_level_is_dropped_with_its_own_list_of_ratios(mini_config, truth_of):
    """Objects of 50 px: those need P3, of which 4 cells are 32 px, and not P2."""
    cfg = mini_config("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", str([[0.5, 1.0, 2.0]] * 5))
    fit = fit_to(cfg, truth_of, np.full((120, 2), 50.0))
    changes = by_subject(fit)["levels"].changes
    assert changes["MODEL.FPN.IN_FEATURES"] == ["res3", "res4", "res5"]
    assert changes["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS"] == [[0.5, 1.0, 2.0]] * 4


def test_anchors_of_one_level_are_fitted(truth_of):
    cfg = load_config("paper/table1_f_P2.yaml", ["INPUT.MIN_SIZE_TRAIN", "(256,)"])
    cfg.INPUT.MIN_SIZE_TEST = 256
    fit = fit_to(cfg, truth_of, np.full((120, 2), 24.0))
    assert Pyramid.from_config(fit.fitted).anchor_levels == (2,)
    found = fit_anchors(fit.inputs, Pyramid.from_config(cfg), 2)
    assert min(abs(size - 24) for size in found.sizes[0]) < 3
    # Its five sizes are 8 to 128 strides: those of the fit are not held to 16.
    size = np.geomspace(20, 250, 150)
    inputs = inputs_of(boxes_of(np.column_stack([size, size])))
    own = Pyramid.from_config(cfg)
    fitted = fit_anchors(inputs, own, len(own.sizes[0]))
    assert measure(inputs, fitted).mean_iou > measure(inputs, own).mean_iou
    assert fitted.sizes[0][-1] > 100


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


def test_objects_too_small_for_p3_add_p2(truth_of):
    fit = fit_to(retinanet(), truth_of, np.full((120, 2), 12.0))
    changes = by_subject(fit)["levels"].changes
    assert changes["MODEL.FPN.IN_FEATURES"] == ["res2", "res3", "res4", "res5"]
    assert changes["MODEL.RETINANET.IN_FEATURES"] == ["p2", "p3", "p4", "p5", "p6", "p7"]
    assert changes["MODEL.ANCHOR_GENERATOR.SIZES"][0] == pytest.approx([16, 20.16, 25.4], abs=0.01)
    assert "MODEL.RESNETS.OUT_FEATURES" not in changes  # the plugin's backbone sees to it
    assert "canonical size" not in by_subject(fit)
    assert fit.before.below_cells(2) == 1
    assert fit.after.recall(0.5) > fit.before.recall(0.5)


def test_levels_are_added_until_none_is_asked_for(truth_of):
    cfg = retinanet(
        "MODEL.FPN.IN_FEATURES", "['res4', 'res5']",
        "MODEL.RETINANET.IN_FEATURES", "['p4', 'p5', 'p6', 'p7']",
        "MODEL.ANCHOR_GENERATOR.SIZES", "[[64], [128], [256], [512]]",
    )  # fmt: skip
    fit = fit_to(cfg, truth_of, np.full((120, 2), 12.0))
    changes = by_subject(fit)["levels"].changes
    assert changes["MODEL.FPN.IN_FEATURES"] == ["res2", "res3", "res4", "res5"]
    assert changes["MODEL.ANCHOR_GENERATOR.SIZES"][:3] == [[16.0], [32.0], [64.0]]
    assert by_subject(fit_pyramid(fit.fitted, fit.truth))["levels"].keep


def test_p2_is_the_finest_there_is(mini_config, truth_of):
    found = recommended(mini_config(), truth_of, np.full((120, 2), 6.0))["levels"]
    assert found.keep
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
    assert found.changes == ({} if expected is None else {key: expected})


def test_heads_that_do_not_read_the_canonical_size_are_reported(mini_config, truth_of):
    opts = "MODEL.ROI_HEADS.NAME", "StandardROIHeads", "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", "28"
    found = recommended(mini_config(*opts), truth_of, np.full((120, 2), 50.0))["canonical size"]
    assert found.keep
    assert "FPNROIHeads" in found.effect


def test_ratios_are_reported_and_kept(mini_config, truth_of):
    """Thin objects, sizes as the config has them: nothing but ratios could fit better."""
    cfg = mini_config("MODEL.ANCHOR_GENERATOR.SIZES", "[[16], [32], [64], [128], [256]]")
    lengths = np.random.default_rng(0).choice([16.0, 32.0, 64.0], 120)
    fit = fit_to(cfg, truth_of, np.column_stack([2.8 * lengths, lengths / 2.8]))
    anchors = by_subject(fit)["anchors"]
    assert all("ASPECT_RATIOS" not in key for each in fit.recommendations for key in each.changes)
    assert anchors.figures["fitted_ratios"][0] == pytest.approx(1 / 2.8**2, rel=0.2)
    gained = anchors.figures["ratios_too"]["mean_iou"] - anchors.figures["same"]["mean_iou"]
    assert gained > 0.1
    assert f"would add {gained:.2f} of IoU" in anchors.effect


def test_ratios_of_each_level_are_kept_as_they_are(mini_config):
    ratios = "[[0.5, 1], [1, 2], [0.25, 1], [1, 4], [1, 1]]"
    pyramid = Pyramid.from_config(mini_config("MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", ratios))
    inputs = inputs_of(boxes_of(np.full((60, 2), 30.0)))
    fitted = fit_anchors(inputs, pyramid, 2)
    assert fitted.ratios == pyramid.ratios
    assert measure(inputs, fitted).mean_iou > measure(inputs, pyramid).mean_iou
    assert len(set(fit_anchors(inputs, pyramid, 1, ratios_too=True).ratios)) == 1


def test_anchors_that_fit_are_kept(mini_config, truth_of):
    cfg = mini_config()
    first = fit_to(cfg, truth_of, np.full((120, 2), 40.0))
    assert not by_subject(first)["anchors"].keep
    again = fit_to(first.fitted, truth_of, np.full((120, 2), 40.0))
    assert by_subject(again)["anchors"].keep
    assert again.after is again.before


@pytest.mark.parametrize(("side", "kept"), [(18.0, True), (36.0, True), (40.0, False)])
def test_anchors_stay_where_fitted_ones_gain_little(mini_config, truth_of, side, kept):
    """Less than 0.1 of IoU brought no AP on the default data of docs/fitting.md."""
    fit = fit_to(mini_config(), truth_of, np.full((120, 2), side))
    anchors = by_subject(fit)["anchors"]
    gain = anchors.figures["more"]["mean_iou"] - anchors.figures["before"]["mean_iou"]
    assert gain > 0.05
    assert (gain < 0.1) == kept == anchors.keep
    assert ("MODEL.ANCHOR_GENERATOR.SIZES" in anchors.changes) != kept


def test_too_few_objects_change_nothing(mini_config, truth_of):
    cfg = mini_config()
    for count, reason in ((1, "1 object is too few"), (99, "99 objects are too few")):
        fit = fit_to(cfg, truth_of, np.full((count, 2), 150.0))
        assert [each.subject for each in fit.recommendations] == ["everything"]
        assert reason in fit.recommendations[0].reason
        assert fit.fitted == cfg
        assert fit.after is fit.before
    fit = fit_to(cfg, truth_of, np.full((100, 2), 150.0))
    assert not by_subject(fit)["levels"].keep


def test_regions_of_a_dropped_level_are_reported_where_they_were(mini_config, truth_of):
    """50 px at s0 112 and k0 4 are read from P2; it is dropped, and P3 has them."""
    sides = np.full((120, 2), 50.0)
    effect = recommended(mini_config(), truth_of, sides)["canonical size"].effect
    assert "at P2 100%, P3 0%, P4 0%, P5 0% before, and at P3 100%, P4 0%, P5 0% by" in effect
    cfg = mini_config("MODEL.FPN.CANONICAL_BOX_SIZE", "448")
    effect = recommended(cfg, truth_of, sides)["canonical size"].effect
    assert "by the change of levels too: P2 100%" in effect
    assert "not tried by training" in effect


def test_effects_that_no_training_has_shown_are_reported_as_such(mini_config, truth_of):
    large = recommended(mini_config(), truth_of, np.full((120, 2), 150.0))["levels"]
    small = recommended(retinanet(), truth_of, np.full((120, 2), 12.0))["levels"]
    dense = list(recommend_room(mini_config(), Density.of(crowds(*[300] * 10))))
    one = recommended(mini_config(), truth_of, np.full((120, 2), 50.0))["levels"]
    assert "P2 is dropped" in one.reason and "together with other anchors" in one.effect
    assert "not tried" not in one.effect
    for each in (large, small, *dense):
        assert each.changes and "not tried by training" in each.effect
    kept = recommend_room(mini_config(), Density.of(crowds(5)))
    assert not any("not tried" in each.effect for each in kept)


def test_samples_are_reported_by_what_takes_them(mini_config):
    def samples(*opts):
        found = recommend_room(mini_config(*opts), Density.of(crowds(5)))
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
    assert all(each.keep for each in recommend_room(mini_config(), Density.of(crowds(5, 12, 3))))


def test_dense_data_gets_room_for_each_object(mini_config):
    found = list(recommend_room(mini_config(), Density.of(crowds(*[300] * 10))))
    changed = {key: value for each in found for key, value in each.changes.items()}
    assert changed["MODEL.RPN.POST_NMS_TOPK_TEST"] == 1500
    assert changed["MODEL.RPN.PRE_NMS_TOPK_TRAIN"] == 3000
    assert changed["MODEL.RPN.BATCH_SIZE_PER_IMAGE"] == 960  # 450 at a half, in 64s
    assert changed["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE"] == 1856  # 450 at a quarter
    assert changed["TEST.DETECTIONS_PER_IMAGE"] == 450
    detections = found[-1]
    assert "66.7% before, 0.0% after" in detections.effect
    assert "100 detections an image" in detections.effect


@pytest.mark.parametrize("part", ["RPN", "ROI_HEADS"])
def test_a_sampler_that_takes_no_object_is_refused(mini_config, part):
    cfg = mini_config(f"MODEL.{part}.POSITIVE_FRACTION", "0.0")
    with pytest.raises(UserError, match=f"{part}.POSITIVE_FRACTION is 0.0, .*as 0.25"):
        list(recommend_room(cfg, Density.of(crowds(5))))
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

"""The rows of Tables 1 to 6 and of Figure 1: what tells a right one from a wrong one."""

import re
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import build_anchor_generator
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from fpn_plugin import PerLevelRPNHead, PyramidROIPooler, model_zoo
from fpn_plugin.config import flat_keys, value_at
from fpn_plugin.paper.tables import RUNS, TABLES

SEGMENT_RUNS = [row.run for row in TABLES[6].rows if row.run]
BOX_RUNS = [name for name in RUNS if name not in SEGMENT_RUNS]
RPN_RUNS = [name for name in BOX_RUNS if RUNS[name].proposals_from is None]
FAST_RUNS = [name for name, run in RUNS.items() if run.proposals_from is not None]
JOINT = [name for name, run in RUNS.items() if run.folder == "figure1"]
STAGES = ("res2", "res3", "res4", "res5")


def paper(name: str) -> CfgNode:
    return model_zoo.get_config(RUNS[name].config_name("paper"))


def mini(name: str) -> CfgNode:
    return model_zoo.get_config(RUNS[name].config_name("mini"))


def flat(cfg: CfgNode) -> dict[str, object]:
    values = {key: value_at(cfg, key) for key in flat_keys(cfg)}
    return {key: value for key, value in values.items() if not isinstance(value, CfgNode)}


def built(cfg: CfgNode) -> torch.nn.Module:
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    return build_model(cfg)


def batch(proposals: bool) -> list[dict]:
    target = Instances((128, 160))
    # One box of each anchor's size, in the middle of a cell, and one of the image's.
    boxes = [[8.0, 8, 16, 16], [40, 24, 56, 40], [64, 32, 96, 64], [64, 64, 128, 128]]
    target.gt_boxes = Boxes(torch.tensor([*boxes, [0, 0, 128, 128]]))
    target.gt_classes = torch.tensor([0, 5, 9, 2, 13])
    record = {"image": torch.randint(0, 255, (3, 128, 160)).float(), "instances": target}
    if proposals:
        given = Instances((128, 160))
        # Two boxes for each of P2 to P5.
        corners = [[8.0, 8, 16, 17], [4, 4, 30, 30], [40, 24, 80, 60], [64, 32, 96, 65]]
        corners += [[64, 60, 128, 128], [0, 0, 60, 60], [0, 0, 128, 126], [0, 0, 160, 128]]
        given.proposal_boxes = Boxes(torch.tensor(corners))
        given.objectness_logits = torch.arange(8.0)
        record["proposals"] = given
    return [record]


def losses_of(model: torch.nn.Module, proposals: bool) -> torch.Tensor:
    with EventStorage():
        return sum(model.train()(batch(proposals)).values())


# In an image of 800 x 1000, as Table 1 rounds them: 47k, 12k, 750k, and 200k in the other rows.
ANCHORS = dict.fromkeys([name for name in RUNS if name.startswith("table1")], 199_805)
ANCHORS |= {"table1_a_C4": 15 * 50 * 62.5, "table1_b_C5": 15 * 25 * 31.25, "table1_f_P2": 750_000}


@pytest.mark.parametrize("name", ANCHORS)
def test_an_image_of_800_by_1000_has_the_papers_number_of_anchors(name):
    cfg = paper(name)
    shapes = built(mini(name)).backbone.output_shape()
    levels = [shapes[level] for level in cfg.MODEL.RPN.IN_FEATURES]
    per_cell = build_anchor_generator(cfg, levels).num_anchors
    # Cells as the paper counts them: 1000 / 16 is 62.5 columns.
    cells = [800 * 1000 / shape.stride**2 for shape in levels]
    count = sum(n * area for n, area in zip(per_cell, cells, strict=True))
    assert count == pytest.approx(ANCHORS[name], rel=1e-4)
    assert set(per_cell) == ({3} if len(levels) == 5 else {15})


def reads(neck: torch.nn.Module, level: str) -> set[str]:
    """Stages that a level's value depends on."""
    stages = {
        f"res{k}": torch.rand(1, 64 * 2 ** (k - 2), 64 // 2**k, 64 // 2**k, requires_grad=True)
        for k in (2, 3, 4, 5)
    }
    neck.bottom_up.forward = lambda _: stages
    neck(torch.rand(1, 3, 64, 64))[level].sum().backward()
    return {name for name, x in stages.items() if x.grad is not None and x.grad.abs().sum() > 0}


@pytest.mark.parametrize("table", [1, 2])
@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ("c_FPN", {"p3": {"res3", "res4", "res5"}, "p2": set(STAGES)}),
        ("d_bottom_up", {"p2": {"res2"}, "p3": {"res3"}, "p6": {"res5"}}),
        ("e_no_lateral", {"p2": {"res5"}, "p3": {"res5"}}),
        ("f_P2", {"p2": set(STAGES)}),
    ],
)
def test_a_level_depends_on_only_its_rows_stages(table, row, expected):
    neck = built(mini(f"table{table}_{row}")).backbone
    assert {level: reads(neck, level) for level in expected} == expected


@pytest.mark.parametrize("name", BOX_RUNS)
def test_every_parameter_of_a_row_gets_a_gradient_that_is_not_zero(name):
    """Of the mini scale: the paper's differs only in scale, see below."""
    cfg = mini(name)
    # So that the batch has boxes for every level, see above.
    cfg.MODEL.FPN.CANONICAL_BOX_SIZE = 56
    halves = [[size / 2 for size in level] for level in cfg.MODEL.ANCHOR_GENERATOR.SIZES]
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = halves
    cfg.MODEL.ANCHOR_GENERATOR.OFFSET = 0.5
    model = built(cfg)
    losses_of(model, proposals=name in FAST_RUNS).backward()
    trained = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert trained
    largest = {k: 0 if p.grad is None else p.grad.abs().max() for k, p in trained.items()}
    assert not [key for key, value in largest.items() if value <= 1e-8]
    frozen = "step3" in name or ("_shared" in name and "not" not in name and "table5" in name)
    assert any(key.startswith("backbone.") for key in trained) is not frozen


def test_a_frozen_pyramid_is_the_same_function_in_training_as_in_evaluation():
    model = built(mini("table5_R_50_shared"))
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.backbone.modules())
    norms = [m for m in model.backbone.modules() if isinstance(m, FrozenBatchNorm2d)]
    assert len(norms) == 20  # of a ResNet-18
    image = torch.rand(1, 3, 64, 64)
    before, after = model.train().backbone(image), model.eval().backbone(image)
    assert all(torch.equal(before[level], after[level]) for level in before)


def test_weights_of_the_step_before_fit_the_frozen_pyramid():
    before, frozen = built(mini("table2_c_FPN")), built(mini("table5_R_50_step3_rpn"))
    missing, unexpected = frozen.load_state_dict(before.state_dict(), strict=False)
    assert all(key.startswith("proposal_generator.") for key in missing)
    left = [k for k in unexpected if not k.endswith("num_batches_tracked")]
    assert all(key.startswith("roi_heads.") for key in left)


def test_row_a_pools_14_by_14_cells_of_c4_for_all_of_conv5():
    heads = built(mini("table2_a_C4")).roi_heads
    assert heads.pooler.output_size == (14, 14)
    assert [tuple(p.spatial_scale for p in heads.pooler.level_poolers)] == [(1 / 16,)]
    assert type(heads.pooler.level_poolers[0]).__name__ == "RoIPool"
    convs = [m for m in heads.res5.modules() if type(m).__name__ == "Conv2d"]
    assert len(convs) == 10  # nine layers and the shortcut of the first block
    assert heads.res5(torch.rand(2, 256, 14, 14)).shape == (2, 512, 7, 7)


@pytest.mark.parametrize("row", ["b_C5", "c_FPN", "d_bottom_up", "e_no_lateral", "f_P2"])
def test_other_rows_pool_7_by_7_cells_for_two_fully_connected_layers(row):
    heads = built(mini(f"table2_{row}")).roi_heads
    pooler = heads.box_pooler
    assert isinstance(pooler, PyramidROIPooler)
    assert pooler.output_size == (7, 7)
    strides = {"b_C5": [32], "f_P2": [4]}.get(row, [4, 8, 16, 32])
    assert [1 / p.spatial_scale for p in pooler.level_poolers] == strides
    assert all(type(p).__name__ == "RoIPool" for p in pooler.level_poolers)
    assert len([m for m in heads.box_head.modules() if isinstance(m, torch.nn.Linear)]) == 2


def test_c5_is_not_dilated():
    assert paper("table1_b_C5").MODEL.RESNETS.RES5_DILATION == 1
    assert built(mini("table1_b_C5")).backbone.output_shape()["res5"].stride == 32


PUBLISHED_SETTINGS = {
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 256,
    "MODEL.RPN.IOU_THRESHOLDS": [0.3, 0.7],
    "MODEL.RPN.BOUNDARY_THRESH": -1,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 512,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TRAIN": 2000,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_TEST": 1000,
    "SOLVER.IMS_PER_BATCH": 16,
    "SOLVER.BASE_LR": 0.02,
    "SOLVER.GAMMA": 0.1,
    "SOLVER.WEIGHT_DECAY": 1e-4,
    "SOLVER.MOMENTUM": 0.9,
    "INPUT.MIN_SIZE_TRAIN": (800,),
    "INPUT.MIN_SIZE_TEST": 800,
    "MODEL.FPN.OUT_CHANNELS": 256,
    "MODEL.FPN.CANONICAL_BOX_SIZE": 224,
    "MODEL.FPN.CANONICAL_LEVEL": 4,
    "MODEL.ROI_BOX_HEAD.POOLER_TYPE": "ROIPool",
    "MODEL.ROI_BOX_HEAD.FC_DIM": 1024,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
}


@pytest.mark.parametrize("name", BOX_RUNS)
def test_settings_are_the_papers(name):
    cfg = paper(name)
    settings = flat(cfg)
    # Row (d) has a 3x3 on every level; elsewhere P5 is the 1x1 of C5 itself.
    assert cfg.MODEL.FPN.COARSEST_OUTPUT_CONV is ("bottom_up" in name or "SSD" in name)
    schedule = (tuple(cfg.SOLVER.STEPS), cfg.SOLVER.MAX_ITER)
    published = dict(PUBLISHED_SETTINGS)
    if "SSD" in name:
        published["MODEL.FPN.CANONICAL_LEVEL"] = 5
    assert {key: settings[key] for key in published} == published
    if name == "table4_R_101_FPN":
        assert schedule == ((120_000,), 160_000)
    elif name in (*FAST_RUNS, *JOINT):
        assert schedule == ((60_000,), 80_000)
    else:
        assert schedule == ((30_000,), 40_000)
        assert cfg.MODEL.RPN.POST_NMS_TOPK_TEST == 2000
    assert (101 if "R_101" in name else 50) == cfg.MODEL.RESNETS.DEPTH


@pytest.mark.parametrize(
    ("name", "kernels", "mask", "iterations"),
    [("5x5", [5], 14, 80_000), ("7x7", [7], 14, 80_000), ("5x5_7x7", [5, 7], 14, 80_000),
     ("28x28", [5, 7], 28, 80_000), ("2x", [5, 7], 28, 160_000)],
)  # fmt: skip
def test_settings_of_segment_proposals_are_the_papers(name, kernels, mask, iterations):
    cfg, small = paper(f"table6_{name}"), mini(f"table6_{name}")
    keys = cfg.MODEL.SEGMENT_PROPOSALS
    assert keys == {
        "IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"], "KERNEL_SIZES": kernels, "WIDTH": 512,
        "MASK_SIZE": mask, "OBJECT_CELLS": 8, "BATCH_SIZE_PER_IMAGE": 128,
        "POSITIVE_FRACTION": 0.25, "MASK_LOSS_WEIGHT": 10, "TOPK_TEST": 1000,
    }  # fmt: skip
    assert cfg.MODEL.FPN.OUT_CHANNELS == 128
    assert cfg.MODEL.RESNETS.DEPTH == 50
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.GAMMA) == (16, 0.03, 0.1)
    assert (tuple(solver.STEPS), solver.MAX_ITER) == ((iterations * 3 // 4,), iterations)
    assert cfg.INPUT.MIN_SIZE_TRAIN == (cfg.INPUT.MIN_SIZE_TEST,) == (800,)
    # Half of everything in an image of half the size; the longer schedule is twice as long there.
    assert {**keys, "WIDTH": 128, "OBJECT_CELLS": 4} == small.MODEL.SEGMENT_PROPOSALS
    assert mini("table6_5x5").SOLVER.MAX_ITER * iterations / 80_000 == small.SOLVER.MAX_ITER


# What scales may differ in: data, input size, anchors, canonical size, width, schedule.
SCALE_KEYS = re.compile(
    r"""DATASETS\.|DATALOADER\.|SOLVER\.|SEED|OUTPUT_DIR
    |INPUT\.(MIN_SIZE_TRAIN|MIN_SIZE_TEST|RANDOM_FLIP)
    |MODEL\.(WEIGHTS|PIXEL_STD|BACKBONE\.FREEZE_AT)
    |MODEL\.RESNETS\.(DEPTH|RES2_OUT_CHANNELS|WIDTH_PER_GROUP|NORM)
    |MODEL\.FPN\.(OUT_CHANNELS|CANONICAL_BOX_SIZE)
    |MODEL\.ANCHOR_GENERATOR\.SIZES
    |MODEL\.RPN\.(CONV_DIMS|PRE_NMS_TOPK_TRAIN|PRE_NMS_TOPK_TEST|POST_NMS_TOPK_TRAIN
                  |POST_NMS_TOPK_TEST)
    |MODEL\.ROI_HEADS\.(NUM_CLASSES|BATCH_SIZE_PER_IMAGE)
    |MODEL\.ROI_BOX_HEAD\.FC_DIM
    |MODEL\.SEGMENT_PROPOSALS\.(WIDTH|OBJECT_CELLS)
    |INPUT\.MASK_FORMAT""",
    re.VERBOSE,
)


@pytest.mark.parametrize("name", RUNS)
def test_scales_differ_only_in_scale(name):
    ours, theirs = flat(mini(name)), flat(paper(name))
    assert ours.keys() == theirs.keys()
    differing = {key for key in ours if ours[key] != theirs[key]}
    assert "MODEL.RESNETS.DEPTH" in differing
    assert not {key for key in differing if not SCALE_KEYS.match(key)}
    # As many anchors a cell, in as many lists; half the size each.
    halved = [[size / 2 for size in level] for level in theirs["MODEL.ANCHOR_GENERATOR.SIZES"]]
    if name in RPN_RUNS:
        assert ours["MODEL.ANCHOR_GENERATOR.SIZES"] == halved
    assert ours["MODEL.FPN.CANONICAL_BOX_SIZE"] == 112


@pytest.mark.parametrize("scale", ["mini", "paper"])
def test_every_row_has_a_config_and_every_config_of_a_table_a_row(scale):
    folder = {Path(n).stem for n in model_zoo.names() if scale in Path(n).parts}
    tables = {name for name in folder if name.startswith(("table", "figure"))}
    # Rows that share the run of another row have a config that says so.
    twins = {"table3_c_FPN", "table5_R_50_not_shared"}
    assert tables == set(RUNS) | twins
    for twin in twins:
        same = model_zoo.get_config(f"{scale}/{twin}.yaml")
        assert same == model_zoo.get_config(f"{scale}/table2_c_FPN.yaml")
    rows = [row for table in TABLES.values() for row in table.rows]
    assert {row.run for row in rows if row.run} <= set(RUNS)


@pytest.mark.parametrize("name", [n for n, run in RUNS.items() if run.proposals_from])
@pytest.mark.parametrize("scale", ["mini", "paper"])
def test_a_config_reads_from_the_run_that_the_table_names(name, scale):
    cfg, run = model_zoo.get_config(f"{scale}/{name}.yaml"), RUNS[name]
    folder = f"output/{scale}/{run.proposals_from}/seed0/proposals"
    assert (f"{folder}/{cfg.DATASETS.TRAIN[0]}.pkl",) == cfg.DATASETS.PROPOSAL_FILES_TRAIN
    assert (f"{folder}/{cfg.DATASETS.TEST[0]}.pkl",) == cfg.DATASETS.PROPOSAL_FILES_TEST
    if run.weights_from:
        weights = f"output/{scale}/{run.weights_from}/seed0/model_final.pth"
        assert weights == cfg.MODEL.WEIGHTS


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("figure1_a_image_pyramid", {f"p{k}": {"res4"} for k in (2, 3, 4, 5, 6)}),
        ("figure1_c_SSD", {"p4": {"res4"}, "p5": {"res5"}, "p6": {"res5"}, "p7": {"res5"}}),
        ("figure1_c_bottom_up", {"p2": {"res2"}, "p5": {"res5"}, "p6": {"res5"}}),
        ("figure1_d_FPN", {"p2": set(STAGES), "p5": {"res5"}}),
    ],
)
def test_a_level_of_figure_1_depends_on_only_its_designs_stages(name, expected):
    neck = built(mini(name)).backbone
    assert {level: reads(neck, level) for level in expected} == expected


@pytest.mark.parametrize("name", [*JOINT, "table2_c_FPN"])
def test_designs_of_figure_1_have_all_five_scales_of_anchors(name):
    cfg = paper(name)
    sizes = [size for level in cfg.MODEL.ANCHOR_GENERATOR.SIZES for size in level]
    assert sizes == [32, 64, 128, 256, 512]
    assert cfg.MODEL.META_ARCHITECTURE == "GeneralizedRCNN"


def test_the_single_map_of_figure_1_is_row_a_and_b_of_table_1_and_2():
    for letter, stage in (("a", "C4"), ("b", "C5")):
        single = paper(f"figure1_b_{stage}")
        for table in (1, 2):
            row = paper(f"table{table}_{letter}_{stage}")
            for key in ("RESNETS", "BACKBONE"):
                assert single.MODEL[key] == row.MODEL[key]
            assert single.MODEL.ROI_HEADS.NAME == row.MODEL.ROI_HEADS.NAME
        assert single.MODEL.ROI_BOX_HEAD == row.MODEL.ROI_BOX_HEAD
        rpn = paper(f"table1_{letter}_{stage}").MODEL
        assert single.MODEL.ANCHOR_GENERATOR == rpn.ANCHOR_GENERATOR
        assert single.MODEL.RPN.CONV_DIMS == rpn.RPN.CONV_DIMS


def test_heads_that_are_not_shared_are_each_their_own():
    head = built(mini("table1_c_FPN_unshared")).proposal_generator.rpn_head
    assert isinstance(head, PerLevelRPNHead)
    assert len(head.heads) == 5
    features = [torch.rand(1, 64, 2 ** (6 - i), 2 ** (6 - i)) for i in range(5)]
    logits, deltas = head(features)
    for level, (own, feature) in enumerate(zip(head.heads, features, strict=True)):
        (expected_logits,), (expected_deltas,) = own([feature])
        assert torch.equal(logits[level], expected_logits)
        assert torch.equal(deltas[level], expected_deltas)
        assert logits[level].shape[1] == 3
    with torch.no_grad():
        head.heads[1].objectness_logits.bias += 1
    changed, _ = head(features)
    assert torch.equal(changed[0], logits[0])
    torch.testing.assert_close(changed[1], logits[1] + 1)


def test_published_figures_are_those_of_the_paper():
    table1 = {row.key: row.published for row in TABLES[1].rows}
    assert list(table1["1c"].values()) == [44.0, 56.3, 44.9, 63.4, 66.2]
    assert list(table1["1e"].values()) == [34.5, 46.1, 26.5, 57.4, 64.7]
    table2 = {row.key: row.published for row in TABLES[2].rows}
    assert list(table2["2d"].values()) == [44.9, 24.9, 10.9, 24.4, 38.5]
    assert TABLES[3].rows[-1].published == table2["2c"]
    table6 = {row.key: row.published for row in TABLES[6].rows}
    assert table6["6-InstanceFCN"] == {"AR1k": 39.2}
    assert list(table6["6-2x"]) == ["AR1k", "AR1k s", "AR1k m", "AR1k l"]
    assert list(table6["6-2x"].values()) == [48.1, 32.6, 54.2, 65.6]

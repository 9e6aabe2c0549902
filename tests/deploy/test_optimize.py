"""An optimised model gives the original's detections."""

import copy
import logging
import os
import shutil

import detectron2.modeling
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.layers import Conv2d
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

from fpn_plugin import UserError, model_zoo, optimize_for_inference
from fpn_plugin.deploy import fold_batch_norms, folding, optimize, steps_of
from fpn_plugin.deploy.convolution import FusedConv2d
from fpn_plugin.deploy.fused import FusedBlock
from fpn_plugin.deploy.optimize import dtype_of
from fpn_plugin.inspection.forward_trace import recorded_levels
from tests.helpers.detectors import vary_norms


def detect(model, image):
    with torch.no_grad():
        return model([image])[0]["instances"]


def assert_same_detections(ours, theirs, *, least=1):
    assert len(ours) == len(theirs) >= least
    torch.testing.assert_close(ours.pred_boxes.tensor, theirs.pred_boxes.tensor, rtol=0, atol=0.01)
    torch.testing.assert_close(ours.scores, theirs.scores, rtol=0, atol=1e-4)
    assert torch.equal(ours.pred_classes, theirs.pred_classes)
    # Before they are pasted, which makes a yes or no of a probability.
    assert ours.has("pred_masks") == theirs.has("pred_masks")
    if theirs.has("pred_masks") and theirs.pred_masks.is_floating_point():
        torch.testing.assert_close(ours.pred_masks, theirs.pred_masks, rtol=0, atol=1e-3)


@pytest.mark.parametrize("kind", ["faster", "mask", "retinanet"])
def test_detections_are_the_originals_at_every_size(kind, detector, images):
    model = detector(kind)
    state = copy.deepcopy(model.state_dict())
    before = [detect(model, image) for image in images]
    fast = optimize_for_inference(model)
    confident = 0
    for image, expected in zip(images, before, strict=True):
        assert_same_detections(detect(fast, image), expected)
        confident += int((expected.scores > 0.4).sum())
    assert confident > 5  # it has learned something
    # The original is what it was.
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for image, expected in zip(images, before, strict=True):
        assert torch.equal(detect(model, image).pred_boxes.tensor, expected.pred_boxes.tensor)
    if kind == "mask":
        for image in images:
            both = [each.inference([image], do_postprocess=False)[0] for each in (fast, model)]
            assert both[1].pred_masks.is_floating_point()
            assert_same_detections(*both)
    assert any(isinstance(module, FusedConv2d) for module in fast.modules())
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fast.modules())
    assert all(step.taken for step in steps_of(fast)) and not steps_of(model)


def test_a_batch_of_images_and_an_image_without_detections(detector, images):
    model = detector("mask")
    fast = optimize_for_inference(model)
    empty = {"image": torch.zeros(3, 100, 140)}
    with torch.no_grad():
        together, expected = fast([images[1], empty]), model([images[1], empty])
    for ours, theirs in zip(together, expected, strict=True):
        assert_same_detections(ours["instances"], theirs["instances"], least=0)
    for each in (model, fast):
        each.roi_heads.box_predictor.test_score_thresh = 1.1
        assert len(detect(each, images[0])) == 0


def stock_of(ours, cfg_of_ours):
    """Detectron2's own model with the weights of one of ours."""
    cfg = get_cfg()
    for key, value in cfg_of_ours.MODEL.items():
        if key in cfg.MODEL and key != "FPN":
            cfg.MODEL[key] = value
    cfg.MODEL.BACKBONE.NAME = "build_resnet_fpn_backbone"
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    cfg.MODEL.FPN.IN_FEATURES = ["res2", "res3", "res4", "res5"]
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    stock = detectron2.modeling.build_model(cfg).eval()
    state = ours.state_dict()
    for part in ("weight", "bias"):  # the convolution on P5 that ours has not
        state[f"backbone.fpn_output5.{part}"] = stock.state_dict()[f"backbone.fpn_output5.{part}"]
    stock.load_state_dict(state)
    return stock


def test_a_stock_model_becomes_as_fast(detector, images, config_of):
    stock = stock_of(detector("faster"), config_of("faster"))
    fast = optimize_for_inference(stock)
    for image in images:
        assert_same_detections(detect(fast, image), detect(stock, image))
    assert type(stock.roi_heads.box_pooler) is detectron2.modeling.poolers.ROIPooler
    kinds = {type(module).__name__ for module in fast.modules()}
    assert {"FusedNeck", "FusedBlock", "FusedRPNHead", "PyramidROIPooler"} <= kinds


def test_bfloat16_finds_the_same_objects(detector, images):
    model = detector("faster")
    fast = optimize_for_inference(model, dtype=torch.bfloat16)
    if dtype_of(fast) != torch.bfloat16:
        pytest.skip("this CPU has no bfloat16 convolutions")
    found = missed = 0
    for image in images:
        expected, ours = detect(model, image), detect(fast, image)
        assert ours.scores.dtype == ours.pred_boxes.tensor.dtype == torch.float32
        overlaps = detectron2.structures.pairwise_iou(expected.pred_boxes, ours.pred_boxes)
        same = (overlaps > 0.5) & (expected.pred_classes[:, None] == ours.pred_classes)
        sure = expected.scores > 0.4
        found += int(same.any(dim=1)[sure].sum())
        missed += int((~same.any(dim=1))[sure].sum())
    assert found > 5 and missed <= 0.15 * found


def test_the_level_of_each_detection_is_still_known(detector, images):
    model = detector("faster")
    fast = optimize_for_inference(model)
    with recorded_levels(fast):
        ours = detect(fast, images[1])
    with recorded_levels(model):
        theirs = detect(model, images[1])
    assert torch.equal(ours.pyramid_level, theirs.pyramid_level)


def test_the_predictor_takes_it(detector, images, config_of, tmp_path):
    cfg = config_of("faster")
    model = detector("faster")
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    predictor = DefaultPredictor(cfg)
    image = images[1]["image"].permute(1, 2, 0).numpy().astype(np.uint8)
    expected = predictor(image)["instances"]
    predictor.model = optimize_for_inference(predictor.model)
    assert_same_detections(predictor(image)["instances"], expected)


def test_without_fused_operators_it_still_runs(detector, images, monkeypatch):
    model = detector("faster")
    monkeypatch.setattr(optimize, "can_fuse", lambda *_: False)
    fast = optimize_for_inference(model, dtype=torch.float16)
    skipped = [step.name for step in steps_of(fast) if not step.taken]
    assert skipped == ["torch.float16", "fusing"]
    for image in images:
        assert_same_detections(detect(fast, image), detect(model, image))


def test_without_a_compiler_it_says_so_and_still_runs(detector, images, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no C++ compiler\nand a long story")

    monkeypatch.setattr(torch, "compile", fails)
    model = detector("faster")
    fast = optimize_for_inference(model, compile=True, example=images[0]["image"])
    (skipped,) = [step for step in steps_of(fast) if not step.taken]
    assert str(skipped) == "skipped compiling: RuntimeError: no C++ compiler and a long story"
    assert "first call" in {step.name for step in steps_of(fast)}
    assert any(isinstance(module, FusedBlock) for module in fast.backbone.modules())
    assert_same_detections(detect(fast, images[0]), detect(model, images[0]))


needs_compiler = pytest.mark.skipif(
    not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")),
    reason="torch.compile needs a C++ compiler",
)


@needs_compiler
def test_a_compiled_backbone_takes_other_sizes_without_compiling_again(detector):
    model = detector("faster")
    torch._dynamo.reset()
    fast = optimize_for_inference(model, compile=True)
    assert "compiling" in {step.name for step in steps_of(fast) if step.taken}
    assert not any(isinstance(module, FusedConv2d) for module in fast.backbone.modules())
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    found = 0
    # Not below 256 px, see docs/performance.md; wide, high, square; one image, two and more.
    for count, height, width in [
        (1, 320, 320), (1, 288, 416), (1, 416, 288), (2, 416, 300), (3, 256, 256),
    ]:  # fmt: skip
        batch = [{"image": torch.rand(3, height, width) * 255} for _ in range(count)]
        with torch.no_grad():
            for ours, theirs in zip(fast(batch), model(batch), strict=True):
                assert_same_detections(ours["instances"], theirs["instances"], least=0)
                found += len(theirs["instances"])
    assert found > 0
    if not torch.__version__.startswith("2.3."):  # which compiles some of these again
        assert counters["stats"]["unique_graphs"] == graphs
    # A copy runs too, uncompiled and on its own.
    assert_same_detections(detect(copy.deepcopy(fast), batch[0]), detect(model, batch[0]), least=0)


BREAKING = [
    ("_fold", "folding"),
    ("as_plugin_pyramid", "fused pyramid"),
    ("_plugin_pooler", "pooling"),
    ("select_first", "proposals"),
    ("register_forward_hook", "bfloat16"),
    ("fuse_linears", "fusing heads"),
    ("FusedNeck", "fusing the backbone"),
]


@pytest.mark.parametrize(("broken", "name"), BREAKING, ids=[name for _, name in BREAKING])
def test_a_step_that_fails_halfway_is_skipped_whole(
    broken, name, detector, images, config_of, monkeypatch, caplog
):
    model = stock_of(detector("faster"), config_of("faster"))
    expected = detect(model, images[0])

    owner = {"_fold": folding, "register_forward_hook": nn.Module}.get(broken, optimize)
    original, calls = getattr(owner, broken), []

    def fails(*given, **named):
        calls.append(given)
        if broken == "_fold" and len(calls) < 5:
            return original(*given, **named)
        raise RuntimeError("something of others'\nand more")

    monkeypatch.setattr(owner, broken, fails)
    dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    fast = optimize_for_inference(model, dtype=dtype)
    monkeypatch.undo()
    skipped = [str(step) for step in steps_of(fast) if not step.taken]
    assert f"skipped {name}: RuntimeError: something of others' and more" in skipped
    warned = [
        each.getMessage()
        for each in caplog.records
        if each.name.startswith("fpn_plugin") and each.levelno == logging.WARNING
    ]
    assert warned == skipped
    assert dtype_of(fast) == torch.float32
    assert_same_detections(detect(fast, images[0]), expected)


@pytest.mark.parametrize(("kind", "dtype"), [("faster", torch.float32), ("mask", torch.bfloat16)])
def test_copies_are_independent_and_can_be_saved(kind, dtype, detector, images, tmp_path):
    fast = optimize_for_inference(detector(kind), dtype=dtype)
    expected = detect(fast, images[0])
    torch.save(fast, tmp_path / "fast.pth")
    copies = [copy.deepcopy(fast), torch.load(tmp_path / "fast.pth", weights_only=False)]
    # Whatever becomes of the first: later ones do not call it.
    for parameter in fast.parameters():
        parameter.zero_()
    fast.proposal_generator.pre_nms_topk = {False: 0}
    for each in copies:
        assert_same_detections(detect(each, images[0]), expected)
        assert steps_of(each) == steps_of(fast)


def test_an_optimised_copy_is_not_optimised_again(detector):
    fast = optimize_for_inference(detector("faster"), dtype=torch.bfloat16)
    given = str(dtype_of(fast)).removeprefix("torch.")
    with pytest.raises(UserError, match=f"optimised copy already, in {given}: give the model"):
        optimize_for_inference(fast)


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (torch.zeros(1, 3, 64, 64), r"example is \(1, 3, 64, 64\); it must be one image"),
        (torch.zeros(64, 64, 3), r"example is \(64, 64, 3\)"),
        (np.zeros((3, 64, 64)), "example is ndarray"),
    ],
)
def test_an_example_that_is_no_image_is_named_before_the_work(example, message, config_of, caplog):
    model = detectron2.modeling.build_model(config_of("faster"))
    with pytest.raises(UserError, match=message):
        optimize_for_inference(model, example=example)
    assert not any(each.name.startswith("fpn_plugin") for each in caplog.records)
    model.proposal_generator = None
    with pytest.raises(UserError, match="this Fast R-CNN reads proposals"):
        optimize_for_inference(model, example=torch.zeros(3, 64, 64))


def test_norms_that_are_left_are_those_of_the_whole_model(config_of):
    cfg = config_of("retinanet")
    cfg.MODEL.RETINANET.NORM = "BN"
    model = detectron2.modeling.build_model(cfg).eval()
    # One in the backbone that no order of modules shows, so that the backbone is looked at again.
    stem = model.backbone.bottom_up.stem
    stem.after, stem.conv1.norm = stem.conv1.norm, None
    stem.forward = lambda x: F.max_pool2d(stem.after(input=stem.conv1(x)).relu(), 3, 2, 1)
    said = {}
    optimize.fold(model, lambda name, detail: said.update({name: detail}))
    optimize.fold_observed(model, lambda name, detail: said.update({name: detail}))
    left = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    assert left == 20  # two towers, two convolutions, five levels
    assert said == {
        "folding": "19 batch norms into their convolutions, 21 left",
        "folding what a pass shows": "1 batch norms more, 20 left",
    }


@pytest.mark.parametrize(
    "opts",
    [
        ["MODEL.FPN.BOTTOM_UP", "build_timm_backbone", "MODEL.TIMM.NAME", "mobilenetv3_small_050",
         "MODEL.TIMM.PRETRAINED", False, "MODEL.TIMM.NORM", ""],
        ["MODEL.FPN.BOTTOM_UP", "build_timm_backbone", "MODEL.TIMM.NAME", "resnet18",
         "MODEL.TIMM.PRETRAINED", False],
        ["MODEL.FPN.BOTTOM_UP", "build_timm_backbone", "MODEL.TIMM.NAME", "convnext_atto",
         "MODEL.TIMM.PRETRAINED", False],
        ["MODEL.FPN.BOTTOM_UP", "build_timm_backbone", "MODEL.TIMM.NAME", "tf_efficientnet_lite0",
         "MODEL.TIMM.PRETRAINED", False, "MODEL.BACKBONE.FREEZE_AT", 0],
        ["MODEL.FPN.BOTTOM_UP", "build_torchvision_backbone", "MODEL.TORCHVISION.NAME",
         "regnet_y_400mf", "MODEL.TORCHVISION.WEIGHTS", ""],
        ["MODEL.FPN.TOP_DOWN", False],
        ["MODEL.BACKBONE.NAME", "build_image_pyramid_backbone", "MODEL.FPN.IN_FEATURES", ["res3"],
         "MODEL.FPN.IMAGE_SCALES", [2.0, 1.0, 0.5, 0.25]],
        ["MODEL.FPN.LATERAL", False],
        ["MODEL.FPN.FUSE_TYPE", "avg", "MODEL.FPN.NORM", "GN"],
        ["MODEL.FPN.MATCH_LATERAL_SIZE", True],
        ["MODEL.FPN.OUT_FEATURES", ["p2"], "MODEL.FPN.TOP_BLOCK", "none", "MODEL.RPN.IN_FEATURES",
         ["p2"], "MODEL.ROI_HEADS.IN_FEATURES", ["p2"], "MODEL.ANCHOR_GENERATOR.SIZES", [[32]]],
        ["MODEL.RPN.HEAD_NAME", "PerLevelRPNHead"],
        ["MODEL.ROI_HEADS.NAME", "FPNCascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
         True],
    ],
    ids=lambda opts: "-".join(str(opt) for opt in opts[:4]),
)  # fmt: skip
def test_other_networks_and_pyramids_run_with_the_same_features(opts, images, config_of):
    cfg = config_of("faster")
    cfg.merge_from_list(opts)
    model = detectron2.modeling.build_model(cfg).eval()
    vary_norms(model)
    with torch.no_grad():
        x = model.preprocess_image([images[3]]).tensor
        expected = model.backbone(x)
        for dtype, most in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
            fast = optimize_for_inference(model, dtype=dtype)
            fast([images[3]])
            ours = fast.backbone(x)
            assert ours.keys() == expected.keys()
            for name, level in expected.items():
                error = (ours[name].float() - level).norm() / level.norm()
                assert error < most, (dtype, name)


def test_norms_are_folded_where_the_order_of_modules_does_not_show_them():
    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(4), nn.Conv2d(3, 4, 3)
            self.second_norm, self.second = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            x = self.norm(self.conv(x))
            y = self.second(x)
            return self.second_norm(y) + y  # y is read twice: its norm cannot be folded

    net = Shuffled().eval()
    for norm in (net.norm, net.second_norm):
        norm.running_mean.uniform_(-1, 1)
    x = torch.randn(1, 3, 9, 9)
    expected = net(x)
    assert fold_batch_norms(net) == (0, 2)
    # Both were folded, the values changed, both were put back.
    assert fold_batch_norms(net, example=x) == (0, 2)
    torch.testing.assert_close(net(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("norm", ["FrozenBN", ""])
def test_every_norm_that_holds_an_activation_is_folded(norm, config_of):
    cfg = config_of("faster")
    cfg.merge_from_list([
        "MODEL.FPN.BOTTOM_UP", "build_timm_backbone", "MODEL.TIMM.NAME", "tf_efficientnet_lite0",
        "MODEL.TIMM.PRETRAINED", False, "MODEL.TIMM.NORM", norm, "MODEL.BACKBONE.FREEZE_AT", 0,
    ])  # fmt: skip
    network = detectron2.modeling.build_model(cfg).backbone.bottom_up.eval()
    vary_norms(network)
    image = torch.randn(1, 3, 128, 96)
    with torch.no_grad():
        expected = network(image)
        # A pass frees maps, and the next ones get their ids: they are other tensors.
        assert fold_batch_norms(network, example=torch.randn(1, 3, 64, 64)) == (48, 0)
        for name, level in network(image).items():
            assert (level - expected[name]).norm() < 1e-5 * expected[name].norm(), name


def test_a_norm_that_still_counts_is_not_folded():
    conv = Conv2d(3, 4, 3, norm=nn.BatchNorm2d(4)).train()
    assert fold_batch_norms(nn.Sequential(conv)) == (0, 0)
    assert isinstance(conv.norm, nn.BatchNorm2d)


def test_what_cannot_be_optimised_is_named():
    with pytest.raises(UserError, match="Linear has no backbone"):
        optimize_for_inference(nn.Linear(2, 2))
    model = model_zoo.get("mini/faster_rcnn_R_18_FPN.yaml", device="cpu")
    with pytest.raises(UserError, match="none of float32, bfloat16 and float16"):
        optimize_for_inference(model, dtype=torch.int8)

"""Weights from and to other libraries: the same numbers, and the same function."""

import copy

import pytest
import torch
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from detectron2.structures import Boxes
from torchvision.models.detection import (
    fasterrcnn_resnet50_fpn,
    keypointrcnn_resnet50_fpn,
    maskrcnn_resnet50_fpn,
    retinanet_resnet50_fpn,
)

from fpn_plugin import UserError
from fpn_plugin.cli.convert import convert_main
from fpn_plugin.conversion import (
    CONFIG_KEYS,
    check_config,
    from_library,
    library_name,
    to_library,
)  # fmt: skip
from fpn_plugin.engine import load_config
from fpn_plugin.engine.trainer import FPNTrainer
from fpn_plugin.utils.weight_files import read_checkpoint

FASTER = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
MASK = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
CASCADE = "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"
KEYPOINTS = "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml"
PANOPTIC = "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml"
RETINANET = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"
NEW = {"weights": None, "weights_backbone": None}
CPU = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]
META = ["MODEL.DEVICE", "meta", "MODEL.WEIGHTS", ""]


def config(name: str, classes: int, *opts: str):
    opts = ["MODEL.ROI_HEADS.NUM_CLASSES", str(classes), *opts]
    return load_config(name, [*CONFIG_KEYS["torchvision"], *CPU, *opts])


def randomised(model: torch.nn.Module) -> torch.nn.Module:
    """Batch norms that do something, and predictors of which every row differs."""
    torch.manual_seed(0)
    for key, value in model.state_dict().items():
        if "running_var" in key:
            value.uniform_(0.5, 1.5)
        elif key.endswith(("running_mean", "bias")):
            value.normal_(0, 0.2)
    return model.eval()


def converted(net: torch.nn.Module, cfg, **opts):
    """A config's model with torchvision's weights, and these weights."""
    model = FPNTrainer.build_model(cfg).eval()
    state = from_library(net.state_dict(), cfg, "torchvision", **opts)
    model.load_state_dict(state, strict=True)
    return model, state


def assert_holds(state: dict, expected: dict) -> None:
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


@pytest.fixture(scope="module")
def faster():
    return randomised(fasterrcnn_resnet50_fpn(**NEW, num_classes=7))


def test_the_pyramid_the_rpn_and_the_heads_are_torchvisions(faster):
    model, _ = converted(faster, config(FASTER, 6))
    x = torch.randn(1, 3, 128, 160)
    with torch.no_grad():
        theirs, ours = list(faster.backbone(x).values()), model.backbone(x)
        for level, expected in zip(("p2", "p3", "p4", "p5", "p6"), theirs, strict=True):
            torch.testing.assert_close(ours[level], expected, rtol=1e-4, atol=1e-4)
        logits, deltas = model.proposal_generator.rpn_head(theirs)
        their_logits, their_deltas = faster.rpn.head(theirs)
        for mine, expected in zip([*logits, *deltas], [*their_logits, *their_deltas], strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-4)
        regions = torch.randn(5, 256, 7, 7)
        features = model.roi_heads.box_head(regions)
        torch.testing.assert_close(features, faster.roi_heads.box_head(regions))
        scores, boxes = model.roi_heads.box_predictor(features)
        their_scores, their_boxes = faster.roi_heads.box_predictor(features)
    # torchvision's background is class 0, Detectron2's the last; the background has no box here.
    torch.testing.assert_close(scores, their_scores.roll(-1, dims=1))
    torch.testing.assert_close(boxes, their_boxes[:, 4:])


def test_regions_are_pooled_as_torchvision_pools_them(faster):
    pooler = FPNTrainer.build_model(config(FASTER, 6)).roi_heads.box_pooler
    x = {str(i): torch.randn(1, 256, 160 // 4 // 2**i, 160 // 4 // 2**i) for i in range(4)}
    boxes = torch.rand(40, 4, generator=torch.Generator().manual_seed(2)) * 70
    boxes[:, 2:] += boxes[:, :2] + 5
    expected = faster.roi_heads.box_roi_pool(x, [boxes], [(160, 160)])
    ours = pooler(list(x.values()), [Boxes(boxes)])
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)


def test_another_epsilon_is_put_into_the_variance(faster):
    model, _ = converted(faster, config(FASTER, 6), bn_eps=1e-2)
    theirs = copy.deepcopy(faster)
    for module in theirs.modules():
        if hasattr(module, "running_var"):
            module.eps = 1e-2
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.backbone(x)["0"]
        torch.testing.assert_close(model.backbone(x)["p2"], expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(faster.backbone(x)["0"], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("classes", [6, 80])
def test_torchvisions_weights_come_back_as_they_went(classes):
    theirs = 7 if classes == 6 else 91
    state = randomised(maskrcnn_resnet50_fpn(**NEW, num_classes=theirs)).state_dict()
    ours = from_library(state, config(MASK, classes), "torchvision")
    blank = {k: torch.full_like(v, -7) for k, v in state.items()}
    back = to_library(ours, "torchvision", into=blank)
    assert back.keys() == state.keys()
    unused = [0] if classes == 6 else [0, 12, 26, 29, 30, 45, 66, 68, 69, 71, 83]
    for key, value in back.items():
        if key.endswith("num_batches_tracked"):
            continue
        rows = unused if "mask_fcn_logits" in key else []
        if "bbox_pred" in key and "box_predictor" in key:
            rows = [4 * n + i for n in unused for i in range(4)]
        elif "cls_score" in key:
            rows = unused[1:]  # the background has a score
        kept = [i for i in range(len(value)) if i not in rows] if value.dim() else ...
        assert torch.equal(value[kept], state[key][kept]), key
        assert all((value[i] == -7).all() for i in rows), key
    # Filled into what it came from, it is that.
    assert_holds(to_library(ours, "torchvision", into=state), state)


@pytest.mark.parametrize("classes", [5, 80])
def test_retinanet_is_torchvisions(classes):
    net = randomised(retinanet_resnet50_fpn(**NEW, num_classes=6 if classes == 5 else 91))
    for layer in (net.head.classification_head.cls_logits, net.head.regression_head.bbox_reg):
        torch.nn.init.normal_(layer.weight, std=0.01)  # rows that differ
    opts = ["MODEL.FPN.TOP_BLOCK", "p6p7_p5", "MODEL.RETINANET.NUM_CLASSES", str(classes)]
    cfg = config(RETINANET, classes, *opts)
    model, state = converted(net, cfg)
    x = torch.randn(1, 3, 128, 160)
    with torch.no_grad():
        pyramid = list(net.backbone(x).values())
        for mine, expected in zip(model.backbone(x).values(), pyramid, strict=True):
            torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)
        logits, deltas = model.head(pyramid)
        out = net.head(pyramid)
    # By cell, scale, ratio here; by cell, ratio, scale there.
    numbers = range(1, 6)
    if classes == 80:
        numbers = sorted(MetadataCatalog.get("coco_2017_val").thing_dataset_id_to_contiguous_id)
    for mine, expected, width in (
        (logits, out["cls_logits"][..., list(numbers)], classes),
        (deltas, out["bbox_regression"], 4),
    ):
        flat = [m.view(1, 3, 3, width, *m.shape[2:]).permute(0, 4, 5, 2, 1, 3) for m in mine]
        flat = torch.cat([m.reshape(1, -1, width) for m in flat], dim=1)
        torch.testing.assert_close(flat, expected, rtol=1e-3, atol=1e-4)
    assert_holds(to_library(state, "torchvision", into=net.state_dict()), net.state_dict())
    blank = {k: torch.full_like(v, -7) for k, v in net.state_dict().items()}
    back = to_library(state, "torchvision", into=blank)
    assert_holds(from_library(back, cfg, "torchvision"), state)


def test_keypoint_heads_are_torchvisions():
    net = keypointrcnn_resnet50_fpn(**NEW, num_classes=2)
    theirs = randomised(net).roi_heads
    model, state = converted(net, config(KEYPOINTS, 1))
    regions = torch.randn(2, 256, 14, 14)
    with torch.no_grad():
        expected = theirs.keypoint_predictor(theirs.keypoint_head(regions))
        ours = model.roi_heads.keypoint_head.layers(regions)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert_holds(to_library(state, "torchvision", into=net.state_dict()), net.state_dict())


@pytest.mark.parametrize("library", ["torchvision", "mmdet"])
def test_the_plugins_weights_come_back_as_they_went(library):
    cfg = config(MASK, 5)
    state = randomised(FPNTrainer.build_model(cfg)).state_dict()
    there = to_library(state, library)
    assert len(there) == len({k for k in state if not k.startswith("pixel_")})
    assert_holds(state, from_library(there, cfg, library))


def test_mmdetections_weights_come_back_as_they_went():
    cfg = config(MASK, 5)
    state = to_library(FPNTrainer.build_model(cfg).state_dict(), "mmdet")
    for value in state.values():
        value.normal_()
    # Which mmdetection's files have and no model here.
    state["backbone.bn1.num_batches_tracked"] = torch.tensor(7)
    back = to_library(from_library(state, cfg, "mmdet"), "mmdet", into=state)
    assert back.keys() == state.keys()
    assert_holds(back, state)


TIMM = ["MODEL.FPN.BOTTOM_UP", "build_timm_backbone", "MODEL.TIMM.NAME", "resnet10t"]
# A config's keys by which its model has something that the library's has not, and its name.
NO_COUNTERPART = [
    ("torchvision", CASCADE, [], "box_head.0.fc1"),
    ("mmdet", CASCADE, [], "box_head.0.fc1"),
    ("mmdet", RETINANET, [], "backbone.top_block.p6"),
    ("mmdet", PANOPTIC, [], "sem_seg_head.p2"),
    ("torchvision", PANOPTIC, [], "sem_seg_head.p2"),
    ("mmdet", KEYPOINTS, [], "keypoint_head.conv_fcn1"),
    ("torchvision", FASTER, TIMM, "backbone.bottom_up.net.conv1.0.weight"),
    ("torchvision", FASTER, ["MODEL.FPN.NORM", "GN"], "backbone.fpn_lateral2.norm.weight"),
    ("mmdet", FASTER, ["MODEL.RESNETS.NORM", "GN"], "norm without running statistics"),
    ("torchvision", FASTER, ["MODEL.ROI_BOX_HEAD.NUM_FC", "3"], "roi_heads.box_head.fc3"),
]


@pytest.mark.parametrize(("library", "name", "opts", "key"), NO_COUNTERPART)
def test_what_has_no_counterpart_is_refused_by_name(library, name, opts, key):
    keys = [*META, "MODEL.TIMM.PRETRAINED", "False", "MODEL.FPN.COARSEST_OUTPUT_CONV", "True"]
    with torch.device("meta"):
        state = build_model(load_config(name, [*keys, *opts])).state_dict()
    with pytest.raises(UserError, match=key.replace(".", r"\.")):
        to_library(state, library)


@pytest.mark.parametrize(
    ("key", "name"), [("COARSEST_OUTPUT_CONV", "fpn_output5"), ("LATERAL", "fpn_lateral2")]
)
@pytest.mark.parametrize("library", ["torchvision", "mmdet"])
def test_a_pyramid_that_lacks_a_convolution_is_refused(library, key, name):
    with torch.device("meta"):
        state = build_model(config(FASTER, 6, *META, f"MODEL.FPN.{key}", "False")).state_dict()
    with pytest.raises(UserError, match=rf"{name}.* MODEL\.FPN\.{key} True"):
        to_library(state, library)


@pytest.mark.parametrize(
    ("library", "key", "value"),
    [
        ("torchvision", "INPUT.FORMAT", "BGR"),
        ("torchvision", "MODEL.PIXEL_STD", "[1.0, 1.0, 1.0]"),
        ("torchvision", "MODEL.RESNETS.STRIDE_IN_1X1", "True"),
        ("torchvision", "MODEL.ROI_BOX_HEAD.POOLER_TYPE", "ROIAlignV2"),
        ("torchvision", "MODEL.FPN.CANONICAL_BOX_SIZE", "112"),
        ("mmdet", "MODEL.FPN.TOP_DOWN", "False"),
        ("mmdet", "MODEL.FPN.FUSE_TYPE", "avg"),
    ],
)
def test_a_config_that_computes_something_else_is_refused(library, key, value):
    check_config(config(FASTER, 6), library)
    with pytest.raises(UserError, match=f"{key} is .*train with {key}"):
        check_config(config(FASTER, 6, key, value), library)


def test_keys_of_heads_that_a_model_has_not_are_not_asked_for():
    other = "MODEL.ROI_MASK_HEAD.POOLER_TYPE", "ROIAlignV2"
    check_config(config(FASTER, 6, *other), "torchvision")
    check_config(config(RETINANET, 6, "MODEL.FPN.CANONICAL_BOX_SIZE", "112"), "torchvision")
    with pytest.raises(UserError, match="ROI_MASK_HEAD.POOLER_TYPE"):
        check_config(config(MASK, 6, *other), "torchvision")


def test_a_layout_of_another_kind_is_refused(faster):
    state = from_library(faster.state_dict(), config(FASTER, 6), "torchvision")
    layout = faster.state_dict()
    with pytest.raises(UserError, match="gives nothing for 1 tensors .* extra.weight"):
        to_library(state, "torchvision", into={**layout, "extra.weight": torch.zeros(1)})
    layout["roi_heads.box_predictor.cls_score.bias"] = torch.zeros(9)
    with pytest.raises(UserError, match=r"cls_score.bias is \(7,\) and does not fit .*\(9,\)"):
        to_library(state, "torchvision", into=layout)


MINI = ["--config-file", "mini/faster_rcnn_R_18_FPN.yaml"]
MINI_OPTS = [*CPU, *CONFIG_KEYS["torchvision"], "MODEL.FPN.CANONICAL_BOX_SIZE", "224"]


@pytest.fixture(scope="module")
def mini(tmp_path_factory):
    """A file of a small model's weights, and the arguments that say which model it is."""
    model = build_model(load_config(MINI[1], MINI_OPTS))
    path = tmp_path_factory.mktemp("mini") / "model_final.pth"
    torch.save({"model": model.state_dict(), "iteration": 3}, path)
    return path


def test_the_tool_checks_the_config_before_it_writes(mini, tmp_path):
    output = tmp_path / "out.pth"
    arguments = ["--to", "torchvision", "--weights", str(mini), "--output", str(output), *MINI]
    with pytest.raises(UserError, match="INPUT.FORMAT is 'BGR'"):
        convert_main([*arguments, *MINI_OPTS, "INPUT.FORMAT", "BGR"])
    with pytest.raises(UserError, match="not the config of these weights: .*cls_score"):
        convert_main([*arguments, *MINI_OPTS, "MODEL.ROI_HEADS.NUM_CLASSES", "2"])
    assert not output.exists()
    convert_main([*arguments, *MINI_OPTS])
    assert "rpn.head.cls_logits.weight" in torch.load(output)


class _Meta:
    """What only a pickle can hold, as mmdetection's checkpoints do."""


def test_a_pickle_is_read_where_it_is_trusted(mini, tmp_path):
    state = to_library(torch.load(mini)["model"], "mmdet")
    source, output = tmp_path / "mmdet.pth", tmp_path / "out.pth"
    torch.save({"state_dict": state, "meta": _Meta()}, source)
    arguments = ["--from", "mmdet", "--weights", str(source), "--output", str(output), *MINI]
    with pytest.raises(UserError, match="holds more than tensors"):
        convert_main([*arguments, *CPU])
    convert_main([*arguments, "--trust-pickle", *CPU])
    state = read_checkpoint(output)["model"]
    assert state
    assert_holds(torch.load(mini)["model"], state)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "a value of type list, expected a dict of tensors"),
        ({"a": "b"}, "has 'a' of type str, expected a tensor"),
        ({"model": {"backbone": {"weight": torch.ones(1)}}}, "'model' has 'backbone' of type dict"),
        ({"model": {}}, "its 'model' holds no tensors"),
        ({3: torch.zeros(1)}, "'3' of type int for the name of a tensor"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, content, message):
    source = tmp_path / "weights.pth"
    torch.save(content, source)
    arguments = ["--weights", str(source), "--output", str(tmp_path / "out.pth"), *MINI]
    with pytest.raises(UserError, match=message):
        convert_main(["--to", "mmdet", *arguments])


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_an_output_that_cannot_be_written_is_named(mini, tmp_path, suffix):
    (tmp_path / f"taken{suffix}").mkdir()
    (tmp_path / "file").write_text("")
    arguments = ["--to", "torchvision", "--weights", str(mini), *MINI]
    for output in (tmp_path / f"taken{suffix}", tmp_path / "file" / f"out{suffix}"):
        with pytest.raises(UserError, match=f"argument --output: '{output}'"):
            convert_main([*arguments, "--output", str(output), *MINI_OPTS])
    with pytest.raises(UserError, match="expected a name that ends in .pth, .safetensors"):
        convert_main([*arguments, "--output", str(tmp_path / "out.yaml"), *MINI_OPTS])


def test_torchvision_itself_loads_what_was_converted(faster):
    cfg = config(FASTER, 6)
    state = randomised(FPNTrainer.build_model(cfg)).state_dict()
    missing, unexpected = faster.load_state_dict(to_library(state, "torchvision"), strict=False)
    assert not unexpected
    assert all(key.endswith("num_batches_tracked") for key in missing)


# Names that mmdetection 3.3's faster-rcnn_r50_fpn and mask-rcnn_r50_fpn give their parameters.
MMDET_NAMES = {
    "backbone.bottom_up.stem.conv1.weight": "backbone.conv1.weight",
    "backbone.bottom_up.stem.conv1.norm.running_var": "backbone.bn1.running_var",
    "backbone.bottom_up.res2.0.shortcut.weight": "backbone.layer1.0.downsample.0.weight",
    "backbone.bottom_up.res5.2.conv3.norm.bias": "backbone.layer4.2.bn3.bias",
    "backbone.fpn_lateral2.weight": "neck.lateral_convs.0.conv.weight",
    "backbone.fpn_output5.bias": "neck.fpn_convs.3.conv.bias",
    "proposal_generator.rpn_head.conv.weight": "rpn_head.rpn_conv.weight",
    "proposal_generator.rpn_head.objectness_logits.bias": "rpn_head.rpn_cls.bias",
    "proposal_generator.rpn_head.anchor_deltas.weight": "rpn_head.rpn_reg.weight",
    "roi_heads.box_head.fc1.weight": "roi_head.bbox_head.shared_fcs.0.weight",
    "roi_heads.box_predictor.cls_score.weight": "roi_head.bbox_head.fc_cls.weight",
    "roi_heads.box_predictor.bbox_pred.bias": "roi_head.bbox_head.fc_reg.bias",
    "roi_heads.mask_head.mask_fcn1.weight": "roi_head.mask_head.convs.0.conv.weight",
    "roi_heads.mask_head.deconv.bias": "roi_head.mask_head.upsample.bias",
    "roi_heads.mask_head.predictor.weight": "roi_head.mask_head.conv_logits.weight",
}


def test_names_are_mmdetections():
    assert {key: library_name(key, "mmdet") for key in MMDET_NAMES} == MMDET_NAMES


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_the_tool_writes_weights_and_the_config_that_loads_them(faster, tmp_path, suffix):
    source, output = tmp_path / "torchvision.pth", tmp_path / f"converted{suffix}"
    torch.save(faster.state_dict(), source)
    args = ["--from", "torchvision", "--weights", str(source), "--config-file", FASTER]
    args += ["--output", str(output), *CPU, "MODEL.ROI_HEADS.NUM_CLASSES", "6"]
    convert_main(args)
    config_file = str(output.with_suffix(".yaml"))
    cfg = load_config(config_file)
    assert (str(output), "RGB") == (cfg.MODEL.WEIGHTS, cfg.INPUT.FORMAT)
    model = FPNTrainer.build_model(cfg)
    model.load_state_dict(read_checkpoint(output)["model"], strict=True)
    back = tmp_path / "back.pth"
    args = ["--to", "torchvision", "--weights", str(output), "--config-file", config_file]
    convert_main([*args, "--into", str(source), "--output", str(back)])
    assert_holds(torch.load(back), faster.state_dict())


def test_what_does_not_fit_is_named(faster):
    state = faster.state_dict()
    with pytest.raises(UserError, match=r"lack roi_heads.mask_head.0.0.weight"):
        from_library(state, config(MASK, 6), "torchvision")
    with pytest.raises(UserError, match=r"is \(7, 1024\).*number of classes"):
        from_library(state, config(FASTER, 3), "torchvision")
    with pytest.raises(UserError, match=r"2 of torchvision's tensors have no place.*extra.bias"):
        more = {**state, "extra.bias": torch.zeros(1), "extra.weight": torch.zeros(1)}
        from_library(more, config(FASTER, 6), "torchvision")
    with pytest.raises(UserError, match="BOTTOM_UP is 'build_timm_backbone'; only weights of"):
        from_library(state, config(FASTER, 6, *TIMM[:2]), "torchvision")
    with pytest.raises(UserError, match="mmdet.s weights lack neck.lateral_convs.0.conv.weight"):
        from_library(state, config(FASTER, 6), "mmdet")


def test_torchvisions_older_layout_is_read(faster):
    older = {}
    for key, value in faster.state_dict().items():
        short = key.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        if "inner_blocks" in key or "layer_blocks" in key:
            short = short.replace(".0.weight", ".weight").replace(".0.bias", ".bias")
        older[short] = value
    assert "backbone.fpn.inner_blocks.0.weight" in older
    new = from_library(faster.state_dict(), config(FASTER, 6), "torchvision")
    assert_holds(from_library(older, config(FASTER, 6), "torchvision"), new)

"""Whole models: twins of the zoo against stock ones, heads, and the keys that reach them."""

from pathlib import Path
from unittest import mock

import detectron2
import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_backbone, build_model
from detectron2.structures import BitMasks, Boxes, Instances, Keypoints
from detectron2.utils.events import EventStorage

from fpn_plugin import PyramidROIPooler, UserError, add_fpn_config, model_zoo
from fpn_plugin.modeling import without_network_weights

ZOO = Path(detectron2.__file__).parent / "model_zoo" / "configs"
# Every packaged config that the zoo has under the same name.
TWINS = [name for name in model_zoo.names() if (ZOO / name).is_file()]
FASTER = "COCO-Detection/faster_rcnn_{}.yaml"
PLUGIN_KEYS = {
    "BOTTOM_UP", "COMPILE", "TOP_DOWN", "LATERAL", "COARSEST_OUTPUT_CONV", "TOP_BLOCK",
    "OUT_FEATURES", "FREEZE", "MATCH_LATERAL_SIZE", "CANONICAL_BOX_SIZE", "CANONICAL_LEVEL",
    "LEVEL_STATS_PERIOD", "IMAGE_SCALES",
}  # fmt: skip


def stock_config(name: str) -> CfgNode:
    cfg = get_cfg()
    cfg.merge_from_file(str(ZOO / name))
    return cfg


@pytest.mark.parametrize("name", TWINS)
def test_a_twins_config_is_the_zoos_but_for_two_names_and_the_plugins_keys(name):
    ours, theirs = model_zoo.get_config(name), stock_config(name)
    assert ours.MODEL.FPN.pop("COARSEST_OUTPUT_CONV") is True
    for key in PLUGIN_KEYS - {"COARSEST_OUTPUT_CONV"}:
        ours.MODEL.FPN.pop(key)
    for node in ("TIMM", "TORCHVISION", "SEGMENT_PROPOSALS"):
        ours.MODEL.pop(node)
    ours.SOLVER.AMP.pop("DTYPE")
    for key in ("EPOCHS", "REFERENCE_BATCH", "BEST_METRIC", "PATIENCE"):
        ours.SOLVER.pop(key)
    assert ours.MODEL.BACKBONE.NAME == "build_fpn_backbone"
    ours.MODEL.BACKBONE.NAME = theirs.MODEL.BACKBONE.NAME
    if theirs.MODEL.META_ARCHITECTURE != "RetinaNet":
        heads = {"StandardROIHeads": "FPNROIHeads", "CascadeROIHeads": "FPNCascadeROIHeads"}
        assert heads[theirs.MODEL.ROI_HEADS.NAME] == ours.MODEL.ROI_HEADS.NAME
        ours.MODEL.ROI_HEADS.NAME = theirs.MODEL.ROI_HEADS.NAME
    assert ours == theirs


def test_the_zoos_kinds_have_twins():
    kinds = {"faster_rcnn", "fast_rcnn", "rpn", "retinanet", "mask_rcnn", "cascade_mask_rcnn"}
    kinds |= {"keypoint_rcnn", "panoptic_fpn"}
    found = {Path(name).name.partition("_R_")[0].partition("_X_")[0] for name in TWINS}
    assert found == kinds
    assert len(TWINS) == 22


def small(cfg: CfgNode) -> CfgNode:
    """The model of a config at a size that a test can run: fewer layers, channels, proposals."""
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.RESNETS.DEPTH = 50
    cfg.MODEL.PIXEL_STD = [500.0] * 3  # keeps an untrained network's activations in bounds
    cfg.MODEL.FPN.OUT_CHANNELS = 32
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 64
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 16
    cfg.MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS = (16, 16)
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 100
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.MODEL.RETINANET.SCORE_THRESH_TEST = 0.0
    return cfg


def batch(masks: bool = False, keypoints: int = 0) -> list[dict]:
    inputs = []
    for height, width in ((192, 256), (224, 160)):
        target = Instances((height, width))
        corners = [[10.0, 10, 60, 90], [50, 40, 150, 150], [5, 100, 30, 120]]
        target.gt_boxes = Boxes(torch.tensor(corners))
        target.gt_classes = torch.tensor([0, 5, 9])
        if masks:
            target.gt_masks = BitMasks(torch.rand(3, height, width) > 0.5)
        if keypoints:
            points = torch.rand(3, keypoints, 3) * 100 + 20
            points[:, :, 2] = 2
            target.gt_keypoints = Keypoints(points)
        image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        inputs.append({"image": image, "height": height, "width": width, "instances": target})
    return inputs


def compare(ours, theirs, inputs) -> None:
    """Losses, then detections, of two models that have one state dict."""
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    losses = []
    for model in (ours, theirs):
        model.train()
        torch.manual_seed(1)  # proposals and anchors are sampled
        with EventStorage(0):
            losses.append(model(inputs))
    assert losses[0].keys() == losses[1].keys()
    for name, expected in losses[1].items():
        assert expected > 0 or "stage" in name, name  # a later stage may sample no object
        torch.testing.assert_close(losses[0][name], expected, rtol=1e-5, atol=1e-5)
    sum(losses[0].values()).backward()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None or not parameter.requires_grad, name

    # With torchvision's RoIAlign for both, every digit is the same.
    with mock.patch("fpn_plugin.modeling.pooler.pays", lambda *_: False):
        compare_detections(ours, theirs, inputs, exactly=True)
    compare_detections(ours, theirs, inputs, exactly=False)


def compare_detections(ours, theirs, inputs, exactly) -> None:
    detections = []
    for model in (ours.eval(), theirs.eval()):
        with torch.no_grad():
            outputs = model(inputs)
        key = "proposals" if "proposals" in outputs[0] else "instances"
        detections.append([out[key] for out in outputs])
    if "sem_seg" in outputs[0]:
        for mine, other in zip(ours(inputs), outputs, strict=True):
            assert torch.equal(mine["sem_seg"], other["sem_seg"])
    for mine, other in zip(*detections, strict=True):
        assert len(mine) == len(other) > 10
        assert mine.get_fields().keys() == other.get_fields().keys()
        for field, value in mine.get_fields().items():
            expected = other.get(field)
            if isinstance(value, Boxes):
                value, expected = value.tensor, expected.tensor
            if exactly:
                assert torch.equal(value, expected), field
            elif value.dtype == torch.bool:  # masks: a pixel may lie just at the threshold
                assert (value != expected).float().mean() < 1e-6, field
            else:
                torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-4)


ONE_OF_A_KIND = [
    *(FASTER.format(net) for net in ("R_50_FPN_1x", "X_101_32x8d_FPN_3x")),
    "COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml",
    "COCO-Detection/rpn_R_50_FPN_1x.yaml",
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml",
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml",
    "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml",
    "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
]


@pytest.mark.parametrize("name", ONE_OF_A_KIND)
def test_a_twin_gives_the_stock_models_losses_and_detections(name):
    configs = [small(model_zoo.get_config(name)), small(stock_config(name))]
    for cfg in configs:
        cfg.INPUT.MASK_FORMAT = "bitmask"
    ours, theirs = map(build_model, configs)
    poolers = [m for m in ours.modules() if type(m).__name__.endswith("ROIPooler")]
    masks, keypoints = configs[0].MODEL.MASK_ON, configs[0].MODEL.KEYPOINT_ON
    kind = configs[0].MODEL.META_ARCHITECTURE
    if kind in ("GeneralizedRCNN", "PanopticFPN"):
        assert len(poolers) == (2 if masks or keypoints else 1)
    assert all(isinstance(pooler, PyramidROIPooler) for pooler in poolers)
    inputs = batch(masks, 17 if keypoints else 0)
    for record in inputs:
        if keypoints:
            record["instances"].gt_classes.zero_()
        if kind == "PanopticFPN":
            record["sem_seg"] = torch.randint(0, 54, record["image"].shape[1:])
        if configs[0].MODEL.LOAD_PROPOSALS:
            record["proposals"] = given_proposals(record)
    compare(ours, theirs, inputs)


def given_proposals(record: dict) -> Instances:
    proposals = Instances((record["height"], record["width"]))
    corners = torch.rand(60, 2, generator=torch.Generator().manual_seed(3)) * 120
    sides = torch.rand(60, 2, generator=torch.Generator().manual_seed(4)) * 100 + 4
    proposals.proposal_boxes = Boxes(torch.cat([corners, corners + sides], dim=1))
    proposals.proposal_boxes.clip((record["height"], record["width"]))
    proposals.objectness_logits = torch.linspace(3, -3, 60)
    return proposals


def test_k0_and_canonical_size_reach_every_pooler_from_the_config():
    cfg = model_zoo.get_config("Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml")
    cfg.merge_from_list(["MODEL.FPN.CANONICAL_LEVEL", "3", "MODEL.FPN.CANONICAL_BOX_SIZE", "160"])
    for heads in ("FPNROIHeads", "FPNCascadeROIHeads"):
        cfg.MODEL.ROI_HEADS.NAME = heads
        model = build_model(small(cfg))
        for pooler in (model.roi_heads.box_pooler, model.roi_heads.mask_pooler):
            assert (pooler.canonical_level, pooler.canonical_box_size) == (3, 160)
        # A constant map per level: each box comes back as the number of the level it was read
        # from, which with these keys is 3 from 160 px on and 4 from 320 px on.
        maps = [torch.full((1, 32, 512 // 2**k, 512 // 2**k), float(k)) for k in (2, 3, 4, 5)]
        boxes = [Boxes(torch.tensor([[9.0, 9, 9 + s, 9 + s] for s in (159, 160, 319, 320)]))]
        pooled = model.roi_heads.box_pooler(maps, boxes)
        assert pooled.mean(dim=(1, 2, 3)).tolist() == [2.0, 3.0, 3.0, 4.0]


def test_the_papers_config_is_what_the_paper_states():
    cfg = model_zoo.get_config("paper/faster_rcnn_R_50_FPN.yaml")
    assert cfg.MODEL.FPN.COARSEST_OUTPUT_CONV is False
    assert (cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.FPN.NORM) == (256, "")
    assert (cfg.MODEL.FPN.CANONICAL_LEVEL, cfg.MODEL.FPN.CANONICAL_BOX_SIZE) == (4, 224)
    assert cfg.MODEL.ANCHOR_GENERATOR.SIZES == [[32], [64], [128], [256], [512]]
    assert cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS == [[0.5, 1.0, 2.0]]
    assert cfg.MODEL.RPN.IN_FEATURES == ["p2", "p3", "p4", "p5", "p6"]
    assert (cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE, cfg.MODEL.RPN.IOU_THRESHOLDS) == (256, [0.3, 0.7])
    assert cfg.MODEL.RPN.BOUNDARY_THRESH == -1  # anchors that cross the border are kept
    assert (cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN, cfg.MODEL.RPN.POST_NMS_TOPK_TEST) == (2000, 1000)
    assert cfg.MODEL.ROI_HEADS.IN_FEATURES == ["p2", "p3", "p4", "p5"]
    assert cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE == 512
    head = cfg.MODEL.ROI_BOX_HEAD
    assert (head.POOLER_TYPE, head.POOLER_RESOLUTION) == ("ROIPool", 7)
    assert (head.NUM_FC, head.FC_DIM) == (2, 1024)
    assert cfg.INPUT.MIN_SIZE_TRAIN == (800,)
    assert cfg.INPUT.MIN_SIZE_TEST == 800
    solver = cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.GAMMA) == (16, 0.02, 0.1)
    assert (solver.STEPS, solver.MAX_ITER) == ((60000,), 80000)
    assert (solver.WEIGHT_DECAY, solver.MOMENTUM) == (0.0001, 0.9)


def test_the_papers_model_trains_and_has_no_idle_parameter():
    model = build_model(small(model_zoo.get_config("paper/faster_rcnn_R_50_FPN.yaml")))
    assert not hasattr(model.backbone, "fpn_output5")
    with EventStorage(0):
        losses = model(batch())
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad or parameter.grad is not None, name


@pytest.mark.parametrize("name", model_zoo.names())
def test_every_packaged_config_builds(name):
    cfg = without_network_weights(model_zoo.get_config(name))
    backbone = build_backbone(cfg)
    retinanet = cfg.MODEL.META_ARCHITECTURE == "RetinaNet"
    node = cfg.MODEL.RETINANET if retinanet else cfg.MODEL.ROI_HEADS
    assert backbone.output_shape().keys() >= set(node.IN_FEATURES)


@pytest.mark.parametrize(
    ("opts", "levels"),
    [
        (["MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]], ["p3", "p4", "p5", "p6"]),
        (["MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4"]], ["p2", "p3", "p4", "p5"]),
        (["MODEL.FPN.TOP_BLOCK", "p6p7_c5"], ["p2", "p3", "p4", "p5", "p6", "p7"]),
        (["MODEL.FPN.TOP_BLOCK", "p6p7_p5"], ["p2", "p3", "p4", "p5", "p6", "p7"]),
        (["MODEL.FPN.TOP_BLOCK", "none"], ["p2", "p3", "p4", "p5"]),
        (["MODEL.FPN.MATCH_LATERAL_SIZE", True], ["p2", "p3", "p4", "p5", "p6"]),
    ],
)
def test_backbone_keys(opts, levels):
    cfg = model_zoo.get_config("mini/faster_rcnn_R_18_FPN.yaml")
    cfg.merge_from_list(opts)
    backbone = build_backbone(cfg)
    size = (250, 181) if "MODEL.FPN.MATCH_LATERAL_SIZE" in opts else (256, 192)
    out = backbone(torch.randn(1, 3, *size))
    assert list(out) == levels
    # A ResNet is not built deeper than what is read: no parameter is left without a gradient.
    sum(level.sum() for level in out.values()).backward()
    for name, parameter in backbone.named_parameters():
        assert parameter.grad is not None, name


def test_a_config_without_the_plugins_keys_is_told_what_to_call():
    cfg = stock_config(FASTER.format("R_50_FPN_1x"))
    cfg.MODEL.BACKBONE.NAME = "build_fpn_backbone"
    with pytest.raises(UserError, match="add_fpn_config"):
        build_backbone(cfg)


def test_add_fpn_config_keeps_what_was_set():
    cfg = get_cfg()
    before = set(cfg.MODEL.FPN)
    add_fpn_config(cfg)
    assert set(cfg.MODEL.FPN) - before == PLUGIN_KEYS
    cfg.MODEL.FPN.CANONICAL_LEVEL = 3
    add_fpn_config(cfg)
    assert cfg.MODEL.FPN.CANONICAL_LEVEL == 3
    assert not set(get_cfg().MODEL.FPN) & PLUGIN_KEYS, "Detectron2's own defaults were changed"


def test_model_zoo_names_what_is_near():
    with pytest.raises(UserError, match="faster_rcnn_R_50_FPN_1x"):
        model_zoo.get_config_file("COCO-Detection/faster_rcnn_R50_FPN_1x.yaml")
    assert Path(model_zoo.get_config_file(FASTER.format("R_50_FPN_1x"))).is_file()
    model = model_zoo.get("mini/faster_rcnn_R_18_FPN.yaml", "cpu")
    assert type(model).__name__ == "GeneralizedRCNN"

"""torch.jit.script, torch.jit.trace and torch.export of the plugin's modules, against eager."""

import copy
import warnings

import pytest
import torch
from detectron2.export import scripting_with_instances
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import Boxes
from detectron2.utils.testing import convert_scripted_instances
from torch import Tensor, nn

from fpn_plugin import FeaturePyramidNetwork, PyramidROIPooler, model_zoo
from fpn_plugin.modeling.bottom_up import build_image_pyramid, build_pyramid

STAGES = ["res2", "res3", "res4", "res5"]
SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]


@pytest.fixture(autouse=True)
def _without_torchs_advice():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that TorchScript is old
        yield


class TinyNetwork(Backbone):
    """Four strided convolutions."""

    def __init__(self):
        super().__init__()
        shapes = [(3, 4), (8, 2), (8, 2), (8, 2)]  # channels of the input, stride
        self.convs = nn.ModuleList(nn.Conv2d(c, 8, 3, stride=s, padding=1) for c, s in shapes)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        maps: dict[str, Tensor] = {}
        for i, conv in enumerate(self.convs):
            x = conv(x).relu()
            maps[f"res{i + 2}"] = x
        return maps

    def output_shape(self):
        return {name: ShapeSpec(channels=8, stride=4 << i) for i, name in enumerate(STAGES)}


def pyramid(stages=STAGES, **options) -> FeaturePyramidNetwork:
    return build_pyramid(TinyNetwork(), stages, 32, **options).eval()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"coarsest_output_conv": True, "fuse_type": "avg"},
        {"top_down": False},
        {"lateral": False},
        {"match_lateral_size": True},
        {"match_lateral_size": True, "lateral": False, "fuse_type": "avg"},
        {"top_block": "none", "out_features": ["p2"]},
        {"out_features": ["p2", "p5", "p6"]},
        {"top_block": "p6p7_c5", "norm": "GN"},
        {"top_block": "p6p7_p5", "norm": "FrozenBN", "stages": ["res3", "res4", "res5"]},
        {"stages": ["res4"]},
    ],
    ids=str,
)
def test_a_scripted_pyramid_is_the_pyramid(options):
    neck = pyramid(**options)
    kept = copy.deepcopy(neck)
    scripted = torch.jit.script(neck)
    assert list(scripted.state_dict()) == list(kept.state_dict()) == list(neck.state_dict())
    sides = [(64, 96), (128, 64)] + ([(75, 101)] if neck.size_divisibility == 0 else [])
    for side in sides:  # another than the first, which torch specializes for
        image = torch.randn(2, 3, *side)
        expected = kept(image)
        for found in (scripted(image), neck(image)):
            assert list(found) == list(expected)
            for name, level in expected.items():
                torch.testing.assert_close(found[name], level)


def test_a_scripted_image_pyramid_is_the_image_pyramid():
    backbone = build_image_pyramid(TinyNetwork(), ["res4"], [2, 1, 0.5], 32).eval()
    scripted = torch.jit.script(nn.Sequential(backbone))
    for side in ((64, 96), (75, 101)):
        image = torch.randn(2, 3, *side)
        expected, found = backbone(image), scripted(image)
        assert list(found) == list(expected)
        for name, level in expected.items():
            torch.testing.assert_close(found[name], level)


def test_a_pyramid_may_be_scripted_again_and_altered_after():
    model = nn.Sequential(pyramid())
    torch.jit.script(model)
    assert isinstance(model[0], FeaturePyramidNetwork)  # torch puts what it read in its place
    with torch.no_grad():
        model[0].fpn_output3 = nn.Conv2d(32, 32, 1)
    image = torch.randn(1, 3, 64, 64)
    expected = FeaturePyramidNetwork.forward(model[0], image)
    for found in (torch.jit.script(model)(image), model(image), copy.deepcopy(model)(image)):
        for name, level in expected.items():
            torch.testing.assert_close(found[name], level)


def test_a_scripted_pyramid_refuses_what_the_pyramid_refuses():
    scripted = torch.jit.script(pyramid())
    with pytest.raises(torch.jit.Error, match=r"multiples of 32 px.*`match_lateral_size` True"):
        scripted(torch.randn(1, 3, 100, 64))
    neck = pyramid()
    neck.top_block.forward = lambda x: [x, x]
    with pytest.raises(ValueError, match="gives 2 maps, and its num_levels is 1"):
        neck(torch.randn(1, 3, 64, 64))


class Pooling(nn.Module):
    """A pooler by tensors alone, which torch takes as arguments."""

    def __init__(self, pooler):
        super().__init__()
        self.pooler = pooler

    def forward(self, x: list[Tensor], first: Tensor, second: Tensor) -> Tensor:
        return self.pooler(x, [Boxes(first), Boxes(second)])


def maps(levels: int, dtype=torch.float32) -> list[Tensor]:
    return [torch.randn(2, 3, 64 >> i, 64 >> i).to(dtype) for i in range(levels)]


def boxes(count: int) -> Tensor:
    corner, size = torch.rand(count, 2) * 200, torch.exp(torch.rand(count, 2) * 6)
    return torch.cat([corner, corner + size], dim=1)


def exported(module: nn.Module, example: tuple) -> nn.Module:
    return torch.export.export(module, example, strict=False).module()


HOW = {
    "script": lambda module, example: torch.jit.script(module),
    "trace": lambda module, example: torch.jit.trace(module, example, check_trace=False),
    "export": exported,
}


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize(
    ("kind", "levels", "size", "dtype"),
    [
        ("ROIAlignV2", 4, 7, torch.float32),
        ("ROIAlignV2", 4, (3, 5), torch.float32),
        ("ROIAlign", 1, (3, 5), torch.float64),
        ("ROIPool", 4, 3, torch.float32),
        ("ROIAlignV2", 4, 2, torch.bfloat16),
    ],
)
def test_a_recorded_pooler_is_the_pooler(how, kind, levels, size, dtype):
    module = Pooling(PyramidROIPooler(size, SCALES[:levels], 2, kind, 112, 4))
    example = (maps(levels, dtype), boxes(40), boxes(30))
    recorded = HOW[how](module, example)
    cases = [example] if how == "export" else [example, (example[0], boxes(0), boxes(11))]
    for case in cases:
        found, expected = recorded(*case), module(*case)
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_scripted_pooler_refuses_boxes_that_are_not_finite():
    scripted = torch.jit.script(Pooling(PyramidROIPooler(7, SCALES, 0, "ROIAlignV2")))
    bad = torch.tensor([[0.0, 0, 10, 10], [0, 0, float("nan"), 10]])
    with pytest.raises(torch.jit.Error, match=r"1 of 5 boxes .* the first is box 4: \[0.*, nan"):
        scripted(maps(4), boxes(3), bad)


INFERRED = {"pred_boxes": Boxes, "scores": Tensor, "pred_classes": Tensor}
PROPOSED = {"proposal_boxes": Boxes, "objectness_logits": Tensor, **INFERRED}
MODELS = {
    "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml": PROPOSED,
    "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml": {**PROPOSED, "pred_masks": Tensor},
    "COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml": {
        **PROPOSED, "pred_keypoints": Tensor, "pred_keypoint_heatmaps": Tensor,
    },
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml": INFERRED,
}  # fmt: skip
TIMM = ["MODEL.FPN.BOTTOM_UP", "build_timm_backbone", "MODEL.TIMM.NAME", "resnet10t",
        "MODEL.TIMM.PRETRAINED", False, "MODEL.RPN.HEAD_NAME", "PerLevelRPNHead"]  # fmt: skip
TORCHVISION = ["MODEL.FPN.BOTTOM_UP", "build_torchvision_backbone", "MODEL.TORCHVISION.NAME",
               "mobilenet_v3_small", "MODEL.TORCHVISION.WEIGHTS", "", "MODEL.FPN.TOP_BLOCK",
               "p6p7_p5"]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "opts"),
    [
        *((name, []) for name in MODELS),
        ("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml", TIMM),
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", TORCHVISION),
    ],
)
def test_a_scripted_model_detects_what_the_model_detects(name, opts):
    if opts is TIMM:
        pytest.importorskip("timm")
    cfg = model_zoo.get_config(name)
    cfg.merge_from_list([
        "MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
        "MODEL.FPN.OUT_CHANNELS", 16, "MODEL.ROI_BOX_HEAD.FC_DIM", 16,
        "MODEL.ROI_MASK_HEAD.CONV_DIM", 8, "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [8],
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "MODEL.RETINANET.SCORE_THRESH_TEST", 0.0,
        "MODEL.BACKBONE.FREEZE_AT", 0, "TEST.DETECTIONS_PER_IMAGE", 20,
        "MODEL.PIXEL_STD", [57.0, 57.0, 57.0], *opts,
    ])  # fmt: skip
    model = build_model(cfg).eval()
    for path, parameter in model.named_parameters():
        if "cls_score.weight" in path:
            nn.init.normal_(parameter)  # scores far apart, so that their order is
    kept = copy.deepcopy(model)
    scripted = scripting_with_instances(model, MODELS[name])
    images = [torch.rand(3, 120, 150) * 255, torch.rand(3, 90, 100) * 255]
    inputs = [{"image": image} for image in images]
    with torch.no_grad():
        if name.startswith("COCO-Detection/retinanet"):
            found = [
                detector_postprocess(convert_scripted_instances(each), *image.shape[1:])
                for each, image in zip(scripted(inputs), images, strict=True)
            ]
            outputs = found, [each["instances"] for each in kept(inputs)]
        else:
            outputs = (each.inference(inputs, do_postprocess=False) for each in (scripted, kept))
        for found, expected in zip(*outputs, strict=True):
            assert len(expected) == 20
            for field, value in expected.get_fields().items():
                value = getattr(value, "tensor", value)
                theirs = getattr(found, field)
                theirs = getattr(theirs, "tensor", theirs)
                torch.testing.assert_close(theirs, value, rtol=1e-4, atol=1e-3)

"""FeaturizedImagePyramid: its network run by hand on resized images, and detectors on it."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_backbone, build_model
from detectron2.modeling.backbone import Backbone
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import nn

from fpn_plugin import FeaturizedImagePyramid, UserError, model_zoo
from fpn_plugin.modeling.bottom_up import build_image_pyramid

STRIDES = {"res2": 4, "res3": 8, "res4": 16}


class Strided(Backbone):
    """A convolution of stride 4 and two of stride 2, without a norm."""

    def __init__(self, divisibility: int = 0):
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(c, 6, s + 1, s, padding=s // 2) for c, s in ((3, 4), (6, 2), (6, 2))
        )
        self.divisibility = divisibility

    @property
    def size_divisibility(self):
        return self.divisibility

    def forward(self, x):
        maps = {}
        for name, conv in zip(STRIDES, self.convs, strict=True):
            x = maps[name] = conv(x).tanh()
        return maps

    def output_shape(self):
        return {name: ShapeSpec(channels=6, stride=stride) for name, stride in STRIDES.items()}


def resized_by_pillow(image: torch.Tensor, scale: float) -> torch.Tensor:
    """Bilinear where it grows, the mean of each area where it shrinks."""
    size = [round(side * scale) for side in image.shape[:0:-1]]
    how = Image.Resampling.BILINEAR if scale > 1 else Image.Resampling.BOX
    channels = [Image.fromarray(channel.numpy()).resize(size, how) for channel in image]
    return torch.stack([torch.frombuffer(bytearray(c.tobytes()), dtype=torch.float32).view(
        size[::-1]) for c in channels])  # fmt: skip


@pytest.mark.parametrize(
    ("stage", "scales", "levels"),
    [
        ("res4", [4, 2, 1, 0.5], [2, 3, 4, 5]),
        ("res3", [2, 1, 0.5, 0.25], [2, 3, 4, 5]),
        ("res2", [1, 0.5], [2, 3]),
        ("res4", [0.5], [5]),
    ],
)
def test_levels_are_the_network_run_by_hand_on_images_that_pillow_resized(stage, scales, levels):
    backbone = build_image_pyramid(Strided(), [stage], scales, 8, top_block="none")
    images = torch.rand(2, 3, 64, 96)
    out = backbone(images)
    assert list(out) == list(backbone.output_shape()) == [f"p{level}" for level in levels]
    lateral = getattr(backbone, f"fpn_lateral{stage[-1]}")
    for (name, found), scale in zip(out.items(), scales, strict=True):
        by_hand = torch.stack([resized_by_pillow(image, scale) for image in images])
        expected = lateral(backbone.bottom_up(by_hand)[stage])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        shape = backbone.output_shape()[name]
        assert found.shape == (2, shape.channels, 64 // shape.stride, 96 // shape.stride)
    assert backbone.size_divisibility == 2 ** levels[-1]


@pytest.mark.parametrize("norm", ["", "BN"])
@pytest.mark.parametrize("top_block", ["maxpool", "p6p7_c5", "p6p7_p5", "none"])
def test_gradients_reach_every_parameter_from_every_level(top_block, norm):
    backbone = build_image_pyramid(
        Strided(), ["res4"], [4, 2, 1, 0.5], 8, top_block=top_block, norm=norm
    )
    assert [n for n, _ in backbone.named_children()][:1] == ["fpn_lateral4"]
    out = backbone(torch.rand(1, 3, 128, 128))
    assert list(out) == list(backbone.output_shape())
    read = {key for key, _ in backbone.bottom_up.named_parameters()}
    for level in out.values():
        backbone.zero_grad()
        level.square().sum().backward(retain_graph=True)
        reached = {k for k, p in backbone.bottom_up.named_parameters() if p.grad.abs().sum() > 0}
        assert reached == read
    backbone.zero_grad()
    sum(level.square().sum() for level in out.values()).backward()
    assert not [k for k, p in backbone.named_parameters() if p.grad is None]


@pytest.mark.parametrize("top_block", ["maxpool", "p6p7_c5", "p6p7_p5"])
def test_a_top_block_follows_the_coarsest_level(top_block):
    backbone = build_image_pyramid(Strided(), ["res4"], [1, 0.5], 8, top_block=top_block)
    image = torch.rand(1, 3, 64, 64)
    out = backbone(image)
    half = nn.functional.avg_pool2d(image, 2)
    stage = backbone.bottom_up(half)["res4"]
    source = stage if top_block == "p6p7_c5" else backbone.fpn_lateral4(stage)
    for name, expected in zip(("p6", "p7"), backbone.top_block(source), strict=False):
        torch.testing.assert_close(out[name], expected)
    assert list(out) == ["p4", "p5", "p6"] + ["p7"] * (top_block != "maxpool")


@pytest.mark.parametrize("size", [(101, 75), (33, 258), (64, 97)])
def test_an_odd_size_is_that_of_the_padded_image_and_cells_cover_it(size):
    backbone = build_image_pyramid(Strided(), ["res4"], [2, 1, 0.5, 0.25], 8, top_block="none")
    image = torch.rand(1, 3, *size)
    padded = nn.functional.pad(image, (0, -size[1] % 64, 0, -size[0] % 64))
    out, whole = backbone(image), backbone(padded)
    for name, level in out.items():
        stride = backbone.output_shape()[name].stride
        height, width = (-(-side // stride) for side in size)
        assert level.shape[-2:] == (height, width)
        # Cells whose field of view does not reach the edge, where the network itself pads.
        inner = (..., slice(0, max(height - 3, 0)), slice(0, max(width - 3, 0)))
        torch.testing.assert_close(level[inner], whole[name][inner], rtol=1e-4, atol=1e-5)


def test_a_network_that_needs_multiples_gets_them_at_every_scale():
    backbone = build_image_pyramid(Strided(32), ["res4"], [2, 1, 0.5, 0.25], 8)
    assert backbone.size_divisibility == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"image_scales": [4, 1]},
            r"^`image_scales` \[4, 1\] make .* strides \[4.0, 16.0\] from",
        ),
        ({"image_scales": [1, 2]}, "not a pyramid: list the largest scale first"),
        ({"image_scales": [3, 1.5]}, r"for example \[4.0, 2.0, 1.0, 0.5\] for p2 to p5"),
        ({"image_scales": [32, 16]}, "not a pyramid"),  # half a pixel
        ({"image_scales": []}, r"^`image_scales` \[\]"),
        ({"image_scales": [1, 0]}, "not a pyramid"),
        ({"in_features": ["res3", "res4"]}, "^`in_features` .* are 2 stages; .* name one"),
        ({"in_features": ["res5"]}, "^`in_features` names 'res5', .* offers res2"),
        ({"in_features": []}, "^`in_features` is empty"),
        ({"out_channels": 0}, "^`out_channels` is 0"),
        ({"norm": "BatchNorm"}, "^`norm` 'BatchNorm' is no norm"),
        ({"top_block": nn.MaxPool2d(1)}, "the top block reads 'p9'"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named(arguments, message):
    given = {"in_features": ["res4"], "image_scales": [1, 0.5], "out_channels": 8, **arguments}
    if "top_block" in given:
        given["top_block"].in_feature = "p9"
    with pytest.raises(UserError, match=message):
        FeaturizedImagePyramid(Strided(), **given)


FASTER = "mini/faster_rcnn_R_18_FPN.yaml"
IMAGE_PYRAMID = [
    "MODEL.DEVICE", "cpu", "MODEL.BACKBONE.NAME", "build_image_pyramid_backbone",
    "MODEL.FPN.IN_FEATURES", ["res4"], "MODEL.FPN.OUT_CHANNELS", 16,
]  # fmt: skip
KINDS = {
    "faster": (FASTER, []),
    "rpn": (FASTER, ["MODEL.META_ARCHITECTURE", "ProposalNetwork"]),
    "fast": ("mini/table2_c_FPN.yaml", ["MODEL.WEIGHTS", ""]),
    "retinanet": (
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        [
            "MODEL.WEIGHTS", "", "MODEL.FPN.COARSEST_OUTPUT_CONV", False,
            "MODEL.FPN.IMAGE_SCALES", [2.0, 1.0, 0.5], "MODEL.RETINANET.NUM_CONVS", 1,
            "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
            "MODEL.BACKBONE.FREEZE_AT", 0,
        ],
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_detectors_stand_on_it_by_config(kind):
    """Losses give every parameter a gradient, and images of odd sizes detections inside them."""
    name, opts = KINDS[kind]
    cfg = model_zoo.get_config(name)
    cfg.merge_from_list([*IMAGE_PYRAMID, *opts])
    torch.manual_seed(0)
    model = build_model(cfg)
    assert type(model.backbone) is FeaturizedImagePyramid
    target = Instances((45, 61))
    target.gt_boxes = Boxes(torch.tensor([[8.0, 8, 24, 24], [20, 10, 60, 40]]))
    target.gt_classes = torch.tensor([0, 5])
    record = {"image": torch.rand(3, 45, 61) * 255, "instances": target}
    if kind == "fast":
        record["proposals"] = Instances((45, 61), proposal_boxes=target.gt_boxes)
        record["proposals"].objectness_logits = torch.zeros(2)
    with EventStorage():
        sum(model([record]).values()).backward()
    assert not [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None]
    [found] = model.eval()([record])
    found = found.get("instances", found.get("proposals"))
    boxes = (found.pred_boxes if found.has("pred_boxes") else found.proposal_boxes).tensor
    assert kind == "retinanet" or len(boxes)
    assert ((boxes >= 0) & (boxes <= torch.tensor([61, 45, 61, 45]))).all()


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["IMAGE_SCALES", [4, 1]], "^MODEL.FPN.IMAGE_SCALES"),
        (["IN_FEATURES", ["res3", "res4"]], "^MODEL.FPN.IN_FEATURES .* name one"),
        (["TOP_BLOCK", "max"], "^MODEL.FPN.TOP_BLOCK 'max'"),
        (["TOP_DOWN", False], "^MODEL.FPN.TOP_DOWN is False; an image pyramid .* leave it True"),
        (["BOTTOM_UP", "build_image_pyramid_backbone"], "^MODEL.FPN.BOTTOM_UP names the pyramid"),
    ],
    ids=str,
)
def test_an_error_names_the_key(opts, message):
    cfg = model_zoo.get_config(FASTER)
    cfg.merge_from_list([*IMAGE_PYRAMID, f"MODEL.FPN.{opts[0]}", opts[1]])
    with pytest.raises(UserError, match=message) as error:
        build_backbone(cfg)
    assert "`" not in str(error.value)


def test_frozen_it_trains_nothing():
    cfg = model_zoo.get_config(FASTER)
    cfg.merge_from_list([*IMAGE_PYRAMID, "MODEL.FPN.FREEZE", True])
    backbone = build_backbone(cfg)
    assert not [k for k, p in backbone.named_parameters() if p.requires_grad]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in backbone.modules())

"""FeaturePyramidNetwork against Detectron2's FPN, torchvision's, and the paper's equations."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import FPN, Backbone, build_resnet_backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool, LastLevelP6P7
from torch import nn
from torchvision.ops import FeaturePyramidNetwork as TorchvisionFPN

from fpn_plugin import FeaturePyramidNetwork, UserError
from fpn_plugin.modeling.bottom_up import build_pyramid

STAGES = ["res2", "res3", "res4", "res5"]


def resnet(depth: int, norm: str = "BN") -> Backbone:
    cfg = get_cfg()
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.OUT_FEATURES = STAGES
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    if depth < 50:
        cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    return build_resnet_backbone(cfg, ShapeSpec(channels=3))


class GivenStages(Backbone):
    """A bottom-up pathway that hands on the maps it is given."""

    def __init__(self, strides=(4, 8, 16, 32), channels=(8, 12, 16, 20)):
        super().__init__()
        names = [f"res{i + 2}" for i in range(len(strides))]
        self._shapes = {
            name: ShapeSpec(channels=c, stride=s)
            for name, c, s in zip(names, channels, strides, strict=True)
        }

    def forward(self, x):
        return x

    def output_shape(self):
        return self._shapes

    def maps(self, height=64, width=96, images=2):
        return {
            name: torch.randn(images, s.channels, -(-height // s.stride), -(-width // s.stride))
            for name, s in self._shapes.items()
        }


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fuse_type", ["sum", "avg"])
@pytest.mark.parametrize(("depth", "channels"), [(18, 32), (50, 256)])
def test_equals_detectron2s_fpn_from_one_state_dict(depth, channels, fuse_type, training):
    theirs = FPN(resnet(depth), STAGES, channels, top_block=LastLevelMaxPool(), fuse_type=fuse_type)
    options = {"fuse_type": fuse_type, "coarsest_output_conv": True}
    ours = build_pyramid(resnet(depth), STAGES, channels, **options)
    shapes = [{k: v.shape for k, v in neck.state_dict().items()} for neck in (ours, theirs)]
    assert shapes[0] == shapes[1]
    ours.load_state_dict(theirs.state_dict())
    ours.train(training)
    theirs.train(training)
    image = torch.randn(2, 3, 64, 96)
    ours_out, theirs_out = ours(image), theirs(image)
    assert list(ours_out) == list(theirs_out) == ["p2", "p3", "p4", "p5", "p6"]
    for name, expected in theirs_out.items():
        torch.testing.assert_close(ours_out[name], expected, rtol=1e-6, atol=1e-6)
    assert ours.output_shape() == theirs.output_shape()
    assert ours.size_divisibility == theirs.size_divisibility == 32

    for out in (ours_out, theirs_out):
        sum((level**2).mean() for level in out.values()).backward()
    theirs_grads = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, theirs_grads[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("depth", "channels"), [(18, 32), (50, 256)])
def test_equals_torchvisions_fpn(depth, channels, training):
    ours = FeaturePyramidNetwork(resnet(depth), STAGES, channels, coarsest_output_conv=True)
    ours.train(training)
    shapes = ours.bottom_up.output_shape()
    theirs = TorchvisionFPN([shapes[name].channels for name in STAGES], channels)
    for i, level in enumerate((2, 3, 4, 5)):
        theirs.inner_blocks[i][0].load_state_dict(getattr(ours, f"fpn_lateral{level}").state_dict())
        theirs.layer_blocks[i][0].load_state_dict(getattr(ours, f"fpn_output{level}").state_dict())
    image = torch.randn(2, 3, 64, 96)
    stages = ours.bottom_up(image)
    ours.bottom_up.forward = lambda _: stages  # once: in training, BN moves its averages
    ours_out = ours(image)
    theirs_out = theirs(OrderedDict((name, stages[name]) for name in STAGES))
    for level, name in zip((2, 3, 4, 5), STAGES, strict=True):
        torch.testing.assert_close(ours_out[f"p{level}"], theirs_out[name], rtol=1e-5, atol=1e-5)
    grads = [
        torch.autograd.grad(sum(p.square().mean() for p in out.values()), weight, retain_graph=True)
        for out, weight in (
            (ours_out, ours.fpn_lateral5.weight), (theirs_out, theirs.inner_blocks[3][0].weight),
        )
    ]  # fmt: skip
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_one_seed_gives_detectron2s_initial_weights_in_its_order():
    torch.manual_seed(3)
    theirs = FPN(GivenStages(), STAGES, 16, top_block=LastLevelMaxPool())
    torch.manual_seed(3)
    ours = FeaturePyramidNetwork(GivenStages(), STAGES, 16, coarsest_output_conv=True)
    # The order too: optimizer states are saved by the parameters' order.
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_the_papers_equations_by_hand():
    """M5 = 1x1(C5) = P5; Mk = 1x1(Ck) + upsampled Mk+1; Pk = 3x3(Mk), no non-linearity."""
    bottom_up = GivenStages()
    neck = FeaturePyramidNetwork(bottom_up, STAGES, 8, top_block=LastLevelMaxPool())
    c = bottom_up.maps()
    out = neck(c)
    merged = F.conv2d(c["res5"], neck.fpn_lateral5.weight, neck.fpn_lateral5.bias)
    torch.testing.assert_close(out["p5"], merged)
    torch.testing.assert_close(out["p6"], merged[:, :, ::2, ::2])
    for level in (4, 3, 2):
        lateral, output = getattr(neck, f"fpn_lateral{level}"), getattr(neck, f"fpn_output{level}")
        doubled = merged.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
        merged = F.conv2d(c[f"res{level}"], lateral.weight, lateral.bias) + doubled
        expected = F.conv2d(merged, output.weight, output.bias, padding=1)
        torch.testing.assert_close(out[f"p{level}"], expected)
    assert not hasattr(neck, "fpn_output5")


def test_gradcheck():
    bottom_up = GivenStages((4, 8), (2, 3))
    neck = build_pyramid(bottom_up, ["res2", "res3"], 2).double()
    maps = [m.double().requires_grad_() for m in bottom_up.maps(16, 16, 1).values()]

    def run(fine, coarse):
        return tuple(neck({"res2": fine, "res3": coarse}).values())

    assert torch.autograd.gradcheck(run, maps)


@pytest.mark.parametrize("norm", ["", "BN", "FrozenBN", "GN", "LN", "naiveSyncBN"])
@pytest.mark.parametrize(
    ("stages", "top_block"),
    [
        (STAGES, "maxpool"),
        (["res3", "res4", "res5"], "p6p7_c5"),
        (["res3", "res4", "res5"], "p6p7_p5"),
        (["res2", "res3", "res4"], "maxpool"),
        (["res2", "res3", "res4"], "p6p7_c5"),
        (["res4", "res5"], "none"),
        (["res5"], "maxpool"),
    ],
)
def test_any_run_of_levels_any_norm(stages, top_block, norm):
    bottom_up = GivenStages()
    coarsest = int(stages[-1][-1])
    neck = build_pyramid(bottom_up, stages, 32, norm=norm, top_block=top_block)
    out = neck(bottom_up.maps())
    assert list(out) == list(neck.output_shape())
    for name, shape in neck.output_shape().items():
        assert shape.stride == 2 ** int(name[1:])
        assert shape.channels == 32
        size = (-(-64 // shape.stride), -(-96 // shape.stride))
        assert out[name].shape == (2, 32, *size)
    extra = {"maxpool": 1, "none": 0}.get(top_block, 2)
    assert list(out) == [f"p{k}" for k in range(int(stages[0][-1]), coarsest + extra + 1)]
    # No parameter without a gradient: distributed training would wait for it for ever.
    sum(level.square().sum() for level in out.values()).backward()
    for name, parameter in neck.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0 or norm, name


def test_retinanets_top_block_equals_detectron2s():
    stages = ["res3", "res4", "res5"]
    theirs = FPN(resnet(18), stages, 32, top_block=LastLevelP6P7(512, 32, "res5"))
    options = {"top_block": "p6p7_c5", "coarsest_output_conv": True}
    ours = build_pyramid(resnet(18), stages, 32, **options)
    ours.load_state_dict(theirs.state_dict())
    image = torch.randn(1, 3, 128, 128)
    for name, expected in theirs.eval()(image).items():
        torch.testing.assert_close(ours.eval()(image)[name], expected, rtol=1e-6, atol=1e-6)


def test_without_top_down_levels_do_not_see_coarser_stages():
    bottom_up = GivenStages()
    neck = FeaturePyramidNetwork(bottom_up, STAGES, 8, top_down=False)
    maps = {name: m.requires_grad_() for name, m in bottom_up.maps().items()}
    neck(maps)["p3"].sum().backward()
    assert {name for name, m in maps.items() if m.grad is not None} == {"res3"}


def test_without_laterals_levels_see_the_coarsest_stage_alone():
    bottom_up = GivenStages()
    neck = FeaturePyramidNetwork(bottom_up, STAGES, 8, lateral=False)
    maps = {name: m.requires_grad_() for name, m in bottom_up.maps().items()}
    out = neck(maps)
    out["p3"].sum().backward()
    assert {name for name, m in maps.items() if m.grad is not None} == {"res5"}
    upsampled = F.interpolate(out["p5"], scale_factor=8, mode="nearest")
    torch.testing.assert_close(out["p2"], neck.fpn_output2(upsampled))
    assert [name for name, _ in neck.named_children() if "lateral" in name] == ["fpn_lateral5"]


@pytest.mark.parametrize(
    ("chosen", "convs"),
    [
        (["p2"], {"fpn_output2"}),
        (["p4", "p2"], {"fpn_output2", "fpn_output4"}),
        (["p2", "p5", "p6"], {"fpn_output2"}),
        (["p2", "p3", "p4", "p5", "p6"], {"fpn_output2", "fpn_output3", "fpn_output4"}),
    ],
)
def test_chosen_levels_are_those_of_the_whole_pyramid(chosen, convs):
    bottom_up = GivenStages()
    whole = FeaturePyramidNetwork(bottom_up, STAGES, 8, top_block=LastLevelMaxPool())
    block = LastLevelMaxPool() if "p6" in chosen else None
    neck = FeaturePyramidNetwork(bottom_up, STAGES, 8, top_block=block, out_features=chosen)
    left_out = neck.load_state_dict(whole.state_dict(), strict=False)
    assert not left_out.missing_keys
    assert {name for name, _ in neck.named_children() if "output" in name} == convs
    maps = bottom_up.maps()
    expected, out = whole(maps), neck(maps)
    assert list(out) == sorted(chosen) == list(neck.output_shape())
    for name, level in out.items():
        assert torch.equal(level, expected[name])
    sum(level.square().sum() for level in out.values()).backward()
    assert all(p.grad is not None for p in neck.parameters())


@pytest.mark.parametrize("size", [(100, 75), (33, 257), (64, 96)])
def test_any_input_size_with_match_lateral_size(size):
    bottom_up = GivenStages()
    neck = FeaturePyramidNetwork(bottom_up, STAGES, 8, match_lateral_size=True)
    maps = bottom_up.maps(*size)
    out = neck(maps)
    assert neck.size_divisibility == 0
    for level in (2, 3, 4, 5):
        assert out[f"p{level}"].shape[-2:] == maps[f"res{level}"].shape[-2:]
    theirs = TorchvisionFPN([8, 12, 16, 20], 8)
    with torch.no_grad():
        for i, level in enumerate((2, 3, 4, 5)):
            lateral = getattr(neck, f"fpn_lateral{level}").state_dict()
            theirs.inner_blocks[i][0].load_state_dict(lateral)
            if level < 5:
                output = getattr(neck, f"fpn_output{level}").state_dict()
                theirs.layer_blocks[i][0].load_state_dict(output)
    expected = theirs(OrderedDict(maps))
    for level in (2, 3, 4):
        torch.testing.assert_close(out[f"p{level}"], expected[f"res{level}"], rtol=1e-5, atol=1e-5)


def test_matching_changes_nothing_where_sizes_fit():
    bottom_up = GivenStages()
    plain = FeaturePyramidNetwork(bottom_up, STAGES, 8)
    matching = FeaturePyramidNetwork(bottom_up, STAGES, 8, match_lateral_size=True)
    matching.load_state_dict(plain.state_dict())
    maps = bottom_up.maps()
    for name, expected in plain(maps).items():
        assert torch.equal(matching(maps)[name], expected)


def test_unpadded_input_is_named():
    bottom_up = GivenStages()
    neck = FeaturePyramidNetwork(bottom_up, STAGES, 8)
    with pytest.raises(UserError, match=r"multiples of 32 px.* set `match_lateral_size` True"):
        neck(bottom_up.maps(100, 64))


@pytest.mark.parametrize("with_conv", [True, False])
def test_a_checkpoint_of_the_other_reading_of_p5_names_the_key(with_conv):
    saved = FeaturePyramidNetwork(GivenStages(), STAGES, 8, coarsest_output_conv=with_conv)
    other = FeaturePyramidNetwork(GivenStages(), STAGES, 8, coarsest_output_conv=not with_conv)
    model = nn.ModuleDict({"backbone": other})
    state = {f"backbone.{name}": value for name, value in saved.state_dict().items()}
    expected = rf"backbone.fpn_output5.weight.* set `coarsest_output_conv` {with_conv}"
    for strict in (True, False):
        with pytest.raises(UserError, match=expected):
            model.load_state_dict(state, strict=strict)


def test_a_checkpoint_of_a_bare_network_loads():
    neck = FeaturePyramidNetwork(resnet(18), STAGES, 8)
    state = {f"bottom_up.{k}": v for k, v in resnet(18).state_dict().items()}
    missing = neck.load_state_dict(state, strict=False).missing_keys
    assert missing
    assert all(name.startswith("fpn_") for name in missing)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"in_features": ["res3", "res5"]}, r"strides \[8, 32\].*not a pyramid"),
        ({"in_features": ["res4", "res3"]}, "not a pyramid"),
        ({"in_features": ["res2", "res6"]}, r"'res6'.*offers res2 \(stride 4\)"),
        ({"in_features": []}, "^`in_features` is empty"),
        ({"norm": "GN", "out_channels": 48}, "`out_channels` must be a multiple of 32"),
        ({"norm": "GroupNorm"}, "^`norm` 'GroupNorm' is no norm of this Detectron2"),
        ({"norm": "SynBN"}, "did you mean SyncBN"),
        ({"fuse_type": "mean"}, "^`fuse_type` 'mean' is unknown"),
        ({"out_channels": 0}, "^`out_channels` is 0; a level has 1"),
        ({"top_down": False, "lateral": False}, "^`top_down` and `lateral` are both"),
        ({"out_features": ["p2", "p7"]}, r"^`out_features` names 'p7'"),
        ({"out_features": ["p3", "p4"]}, "of `in_features` .* without use: it must have p2,"),
        ({"out_features": ["p2"], "top_down": False}, "must have p2, p3, p4, p5"),
        ({"out_features": ["p2"], "top_block": LastLevelMaxPool()}, r"out some of \['p5', 'p6'\]"),
        ({"top_block": LastLevelMaxPool(), "in_features": ["res2", "res3"]}, "reads 'p5'"),
    ],
)
def test_what_does_not_fit_is_named(kwargs, message):
    arguments = {"in_features": STAGES, "out_channels": 32, **kwargs}
    with pytest.raises(UserError, match=message) as error:
        FeaturePyramidNetwork(GivenStages(), **arguments)
    assert "MODEL." not in str(error.value)  # nobody wrote a config


@pytest.mark.parametrize("strides", [(6, 12, 24, 48), (4, 4, 4, 4), (3, 6, 12, 24)])
def test_strides_that_are_no_pyramid_are_refused(strides):
    with pytest.raises(UserError, match="power-of-2 strides"):
        FeaturePyramidNetwork(GivenStages(strides), STAGES, 8)

"""Networks under the pyramid: Detectron2's, timm's, torchvision's and a user's own."""

import logging
import re
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import timm
import torch
import torchvision
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, build_backbone
from detectron2.modeling.backbone import Backbone
from huggingface_hub.errors import LocalEntryNotFoundError
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor

from fpn_plugin import UserError, add_fpn_config
from fpn_plugin.modeling import without_network_weights
from fpn_plugin.modeling.detectron2_networks import DETECTRON2_NETWORKS
from fpn_plugin.utils.weight_files import write_checkpoint

STAGES = ["res2", "res3", "res4", "res5"]

TIMM = [
    "resnet10t", "resnext26ts", "regnetx_002", "regnety_002", "convnext_atto", "convnextv2_atto",
    "efficientnet_b0", "mobilenetv3_small_050", "densenet121", "hrnet_w18_small", "dla34",
    "ghostnet_050", "repvgg_a0", "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256",
    "pvt_v2_b0", "mvitv2_tiny", "mambaout_femto", "poolformer_s12", "davit_tiny",
]  # fmt: skip
TORCHVISION = [
    "resnet18", "regnet_y_400mf", "convnext_tiny",
    "mobilenet_v2", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x0_5", "mnasnet0_5",
    "densenet121",
]  # fmt: skip
RESNETS = {
    "R-18": ["DEPTH", 18, "RES2_OUT_CHANNELS", 64],
    "R-50-GN": ["DEPTH", 50, "NORM", "GN"],
    "R-101": ["DEPTH", 101],
    "X-50-32x4d": ["DEPTH", 50, "NUM_GROUPS", 32, "WIDTH_PER_GROUP", 4],
    "R-50-SyncBN": ["DEPTH", 50, "NORM", "SyncBN"],
    "R-152-narrow": [
        "DEPTH", 152, "STEM_OUT_CHANNELS", 16, "RES2_OUT_CHANNELS", 32, "WIDTH_PER_GROUP", 8,
    ],
}  # fmt: skip
DETECTRON2 = [
    "build_regnetx_4gf_backbone", "build_regnety_4gf_backbone", "build_swin_t_backbone",
    "build_mvitv2_t_backbone",
]  # fmt: skip
NETWORKS = [
    *(f"timm:{name}" for name in TIMM),
    *(f"torchvision:{name}" for name in TORCHVISION),
    *(f"resnet:{name}" for name in RESNETS if name != "R-101"),  # R-50 but for its depth
    *(f"detectron2:{name}" for name in DETECTRON2),
]


def stages_of(network: str) -> list[str]:
    """What a network's stages of strides 4 to 32 are called."""
    return list(DETECTRON2_NETWORKS.get(network.partition(":")[2], STAGES))


def config(network: str, *opts: object) -> CfgNode:
    kind, _, name = network.partition(":")
    cfg = get_cfg()
    add_fpn_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME = "build_fpn_backbone"
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    cfg.MODEL.FPN.BOTTOM_UP = f"build_{kind}_backbone"
    cfg.MODEL.FPN.IN_FEATURES = stages_of(network)
    cfg.MODEL.FPN.OUT_CHANNELS = 8
    cfg.MODEL.TIMM.PRETRAINED = False
    cfg.MODEL.TORCHVISION.WEIGHTS = ""
    if kind == "resnet":
        settings = iter(RESNETS[name])
        for key in settings:
            cfg.MODEL.RESNETS[key] = next(settings)
    elif kind == "detectron2":
        cfg.MODEL.FPN.BOTTOM_UP = name
        kind_of = name.split("_")[1].rstrip("xyv2")
        pytest.importorskip(f"detectron2.modeling.backbone.{kind_of}")
    else:
        cfg.MODEL[kind.upper()].NAME = name
        cfg.MODEL[kind.upper()].NORM = ""
    cfg.merge_from_list(list(opts))
    return cfg


# What drops paths in training without being asked.
STOCHASTIC = {"detectron2:build_swin_t_backbone", "detectron2:build_mvitv2_t_backbone"}


@pytest.mark.parametrize("network", NETWORKS)
def test_any_network_carries_a_pyramid(network):
    torch.manual_seed(0)
    neck = build_backbone(config(network)).eval()
    stages = neck.bottom_up.output_shape()
    assert list(stages) == stages_of(network)
    assert [shape.stride for shape in stages.values()] == [4, 8, 16, 32]
    image = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        maps, pyramid = neck.bottom_up(image), neck(image)
    for name, shape in stages.items():
        assert maps[name].shape == (2, shape.channels, 64 // shape.stride, 96 // shape.stride)
    for name, shape in neck.output_shape().items():
        assert pyramid[name].shape == (2, 8, 64 // shape.stride, -(-96 // shape.stride))
    # Its state goes into another one of its kind, which then is the same function.
    other = build_backbone(config(network)).eval()
    other.load_state_dict(neck.state_dict())
    with torch.no_grad():
        for name, level in other(image).items():
            assert torch.equal(level, pyramid[name])
    # Frozen by key, it computes the same in training: no norm or activation was lost.
    fixed = build_backbone(config(network, "MODEL.FPN.FREEZE", True))
    fixed.train(network not in STOCHASTIC)
    fixed.load_state_dict(neck.state_dict(), strict=False)
    with torch.no_grad():
        for name, level in fixed(image).items():
            torch.testing.assert_close(level, pyramid[name], rtol=1e-3, atol=1e-3)
    assert not [name for name, p in fixed.named_parameters() if p.requires_grad]
    # In training, every parameter gets a gradient.
    neck.train()
    sum(level.square().sum() for level in neck(image).values()).backward()
    assert not [name for name, p in neck.named_parameters() if p.grad is None]


# What cannot add maps of odd sizes, or cuts its input into windows.
NEED_PADDING = {
    "timm:hrnet_w18_small", "timm:dla34", "timm:swin_tiny_patch4_window7_224",
    "timm:swinv2_tiny_window8_256",
}  # fmt: skip


@pytest.mark.parametrize("network", NETWORKS)
def test_odd_input_sizes_with_match_lateral_size(network):
    neck = build_backbone(config(network, "MODEL.FPN.MATCH_LATERAL_SIZE", True)).eval()
    # Detectron2's models pad what the backbone says it needs; most networks need nothing.
    assert neck.size_divisibility == (32 if network in NEED_PADDING else 0)
    size = (75, 100)
    if neck.size_divisibility:
        with pytest.raises((AssertionError, RuntimeError)):
            neck(torch.randn(1, 3, *size))
        size = (96, 128)
    image = torch.randn(1, 3, *size)
    with torch.no_grad():
        maps, pyramid = neck.bottom_up(image), neck(image)
    for stage, level in zip(stages_of(network), ("p2", "p3", "p4", "p5"), strict=True):
        assert pyramid[level].shape[-2:] == maps[stage].shape[-2:]
        stride = 2 ** int(level[-1])
        for cells, side in zip(maps[stage].shape[-2:], size, strict=True):
            assert side // stride <= cells <= -(-side // stride)


def detectron2s_input(cfg: CfgNode, rgb: torch.Tensor) -> torch.Tensor:
    """What Detectron2's models hand to a backbone for an RGB image in 0-255."""
    image = rgb if cfg.INPUT.FORMAT == "RGB" else rgb.flip(1)
    mean, std = (torch.tensor(cfg.MODEL[k]).view(-1, 1, 1) for k in ("PIXEL_MEAN", "PIXEL_STD"))
    return (image - mean) / std


NORMALISATIONS = [
    [],
    ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", [123.675, 116.28, 103.53]],
    ["MODEL.PIXEL_STD", [57.375, 57.12, 58.395], "MODEL.PIXEL_MEAN", [90.0, 100.0, 110.0]],
]


def randomised(net: nn.Module) -> nn.Module:
    """The network with batch norms that do something, as trained ones do."""
    generator = torch.Generator().manual_seed(1)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.3, generator=generator)
            module.running_var.uniform_(0.5, 2, generator=generator)
    return net.eval()


@pytest.mark.parametrize(
    ("opts", "norm"), [*((opts, "") for opts in NORMALISATIONS), ([], "FrozenBN")]
)
@pytest.mark.parametrize("name", ["resnet10t", "mobilenetv3_small_050", "swin_tiny"])
def test_timms_network_sees_what_it_was_trained_on(name, opts, norm):
    """Values: the stages are timm's own for the image normalised as timm does."""
    name = "swin_tiny_patch4_window7_224" if name == "swin_tiny" else name
    cfg = config(f"timm:{name}", *opts, "MODEL.TIMM.NORM", norm)
    ours = build_backbone(cfg).bottom_up.eval()
    indices = (0, 1, 2, 3) if "swin" in name else (1, 2, 3, 4)
    kwargs = {"strict_img_size": False} if "swin" in name else {}
    theirs = timm.create_model(name, features_only=True, out_indices=indices, **kwargs)
    randomised(theirs)
    told = ours.net.load_state_dict(theirs.state_dict(), strict=False)
    assert not told.missing_keys
    assert all(key.endswith("num_batches_tracked") for key in told.unexpected_keys)
    rgb = torch.rand(2, 3, 64, 96) * 255
    data = timm.data.resolve_model_data_config(theirs)
    mean, std = (torch.tensor(data[key]).view(-1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        expected = theirs((rgb / 255 - mean) / std)
        stages = ours(detectron2s_input(cfg, rgb))
    for stage, level in zip(stages.values(), expected, strict=True):
        level = level.permute(0, 3, 1, 2) if "swin" in name else level
        torch.testing.assert_close(stage, level, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("opts", NORMALISATIONS)
def test_torchvisions_network_sees_what_it_was_trained_on(opts):
    cfg = config("torchvision:resnet18", *opts)
    ours = build_backbone(cfg).bottom_up.eval()
    net = randomised(torchvision.models.resnet18())
    theirs = create_feature_extractor(net, [f"layer{i}" for i in (1, 2, 3, 4)])
    told = ours.net.load_state_dict(net.state_dict(), strict=False)
    assert not told.missing_keys
    assert set(told.unexpected_keys) == {"fc.weight", "fc.bias"}
    rgb = torch.rand(2, 3, 64, 96)
    preset = torchvision.models.ResNet18_Weights.DEFAULT.transforms()
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (preset.mean, preset.std))
    with torch.no_grad():
        expected = theirs((rgb - mean) / std)
        stages = ours(detectron2s_input(cfg, rgb * 255))
    for stage, level in zip(stages.values(), expected.values(), strict=True):
        torch.testing.assert_close(stage, level, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("network", "freeze_at"),
    [
        *((network, 2) for network in NETWORKS if network not in STOCHASTIC),
        *((f"timm:{name}", 4) for name in ("resnet10t", "hrnet_w18_small", "convnext_atto")),
        ("torchvision:mobilenet_v3_small", 4),
        ("resnet:R-18", 4),
    ],
)
def test_frozen_stages_get_no_gradient_and_keep_their_statistics(network, freeze_at):
    neck = build_backbone(config(network, "MODEL.BACKBONE.FREEZE_AT", freeze_at))
    bottom_up = neck.train().bottom_up
    image = torch.randn(2, 3, 64, 64)
    before = {k: v.clone() for k, v in bottom_up.state_dict().items()}
    maps = bottom_up(image)
    for number, (stage, level) in enumerate(maps.items(), start=2):
        # HRNet's branches are mixed to the end: a finer map is made of more than a coarser one.
        if "hrnet" not in network or number == freeze_at:
            assert level.requires_grad == (number > freeze_at), stage
    neck(image)["p2"].sum().backward()
    frozen = [name for name, p in bottom_up.named_parameters() if not p.requires_grad]
    assert frozen
    assert not [n for n, p in bottom_up.named_parameters() if p.grad is not None and n in frozen]
    norms = nn.modules.batchnorm._BatchNorm
    with_norms = any(isinstance(module, norms) for module in bottom_up.modules())
    changed = {k for k, v in bottom_up.state_dict().items() if not torch.equal(v, before[k])}
    assert changed or not with_norms or "hrnet" in network  # statistics of what is trained
    # A stage that is frozen computes the same in training as in evaluation.
    with torch.no_grad():
        for stage, level in bottom_up.eval()(image).items():
            if not maps[stage].requires_grad:
                torch.testing.assert_close(level, maps[stage], rtol=1e-3, atol=1e-3)


def test_a_frozen_norm_keeps_the_activation_that_timm_put_into_it():
    plain = build_backbone(config("timm:mobilenetv3_small_050")).bottom_up.eval()
    frozen = config("timm:mobilenetv3_small_050", "MODEL.TIMM.NORM", "FrozenBN")
    frozen = build_backbone(frozen).bottom_up.train()
    frozen.load_state_dict(plain.state_dict(), strict=False)
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for stage, level in frozen(image).items():
            torch.testing.assert_close(level, plain(image)[stage], rtol=1e-4, atol=1e-5)


def test_a_pyramid_from_p3_freezes_what_lies_below():
    opts = ["MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"], "MODEL.BACKBONE.FREEZE_AT", 2]
    for network in ("timm:resnet10t", "torchvision:mobilenet_v2"):
        bottom_up = build_backbone(config(network, *opts)).bottom_up
        maps = bottom_up(torch.randn(1, 3, 64, 64))
        assert list(maps) == list(bottom_up.output_shape()) == ["res3", "res4", "res5"]
        frozen = [name for name, p in bottom_up.named_parameters() if not p.requires_grad]
        assert frozen and all(level.requires_grad for level in maps.values())


def test_a_stage_is_the_last_block_of_its_stride_not_what_the_classifier_adds():
    channels = {
        "shufflenet_v2_x0_5": 192, "mnasnet0_5": 160, "mobilenet_v2": 320, "efficientnet_b0": 320,
        "resnet18": 512, "vgg11": 512,
    }  # fmt: skip
    for name, expected in channels.items():
        neck = build_backbone(config(f"torchvision:{name}"))
        assert neck.bottom_up.output_shape()["res5"].channels == expected, name


def test_torchvisions_other_normalisations_are_read():
    cfg = config("torchvision:efficientnet_v2_l", "MODEL.FPN.IN_FEATURES", ["res2"])
    half = build_backbone(cfg)
    # Detectron2's mean grey becomes (mean - 0.5) / 0.5 of RGB in [0, 1].
    mean = torch.tensor([123.675, 116.28, 103.53]) / 255
    torch.testing.assert_close(half.bottom_up._shift.flatten(), (mean - 0.5) / 0.5)


def test_norms_are_converted():
    kinds = {"": nn.BatchNorm2d, "SyncBN": nn.SyncBatchNorm, "FrozenBN": FrozenBatchNorm2d}
    for norm, kind in kinds.items():
        neck = build_backbone(config("torchvision:resnet18", "MODEL.TORCHVISION.NORM", norm))
        names = [type(m) for m in neck.bottom_up.modules() if isinstance(m, (*kinds.values(),))]
        assert names == [kind] * 20


@pytest.mark.parametrize("network", ["timm:resnet10t", "torchvision:resnet18"])
def test_norms_are_frozen_with_weights_and_trained_without(network, tmp_path, caplog):
    caplog.set_level("INFO", "fpn_plugin")
    key = f"MODEL.{network.partition(':')[0].upper()}"
    opts = [f"{key}.NORM", "auto", "MODEL.BACKBONE.FREEZE_AT", 2]
    random = build_backbone(config(network, *opts)).bottom_up
    assert "No weights are given" in caplog.text
    torch.save(random.net.state_dict(), tmp_path / "weights.pth")
    caplog.clear()
    for given in (f"{key}.WEIGHTS", "MODEL.WEIGHTS"):  # the latter are loaded by a checkpointer
        frozen = build_backbone(config(network, *opts, given, str(tmp_path / "weights.pth")))
        kinds = {type(m).__name__ for m in frozen.modules() if "Norm" in type(m).__name__}
        assert kinds and all(kind.startswith("FrozenBatchNorm") for kind in kinds)
        assert not all(p.requires_grad for p in frozen.bottom_up.parameters())
    assert "No weights are given" not in caplog.text
    assert not any("Frozen" in type(m).__name__ for m in random.modules())
    assert all(p.requires_grad for p in random.parameters())


@pytest.mark.parametrize("rate", [0.0, 0.3])
def test_drop_path_is_the_rate_whatever_timms_default(rate):
    network = "timm:swin_tiny_patch4_window7_224"  # whose default is 0.1
    opts = ["MODEL.FPN.IN_FEATURES", ["res2", "res3"], "MODEL.TIMM.DROP_PATH", rate]
    bottom_up = build_backbone(config(network, *opts)).bottom_up
    drops = [m.drop_prob for m in bottom_up.modules() if isinstance(m, timm.layers.DropPath)]
    assert (max(drops, default=0.0) > 0.05) == (rate > 0)


def test_drop_path_reaches_timm():
    neck = build_backbone(config("timm:convnext_atto", "MODEL.TIMM.DROP_PATH", 0.9))
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert not torch.equal(neck.train()(image)["p5"], neck(image)["p5"])
        assert torch.equal(neck.eval()(image)["p5"], neck(image)["p5"])


def test_a_network_is_built_no_deeper_than_it_is_read():
    whole = build_backbone(config("timm:resnet10t"))
    short = build_backbone(config("timm:resnet10t", "MODEL.FPN.IN_FEATURES", ["res2", "res3"]))
    assert list(short.output_shape()) == ["p2", "p3", "p4"]
    count = [sum(p.numel() for p in neck.bottom_up.parameters()) for neck in (short, whole)]
    assert count[0] < count[1] / 4


@pytest.mark.parametrize(
    ("network", "opts", "message"),
    [
        ("timm:vit_tiny_patch16_224", [], r"strides \[16\].*asks for res2 \(stride 4\)"),
        ("timm:coatnet_pico_rw_224", [], "does not take images of 128 x 160 px"),
        ("timm:maxvit_nano_rw_256", [], "128 x 160 px, so not of any size that Detectron2"),
        ("timm:vgg11", ["MODEL.TIMM.DROP_PATH", 0.1], "DROP_PATH is 0.1, .*vgg11 has no stoch"),
        ("timm:dla34", ["MODEL.TIMM.DROP_PATH", 0.1], "DROP_PATH is 0.1, .*dla34 has no stoch"),
        ("timm:resnet10t", ["MODEL.TIMM.DROP_PATH", 1.0], "DROP_PATH is 1.0: a rate from 0"),
        ("timm:resnet10t", ["MODEL.TIMM.DROP_PATH", -0.5], "DROP_PATH is -0.5: a rate from 0"),
        ("timm:resnet10t", ["MODEL.PIXEL_MEAN", [100.0]], r"PIXEL_MEAN is \[100.0\].*three values"),
        ("torchvision:resnet18", ["MODEL.PIXEL_STD", [1.0]], r"PIXEL_STD is \[1.0\].*three values"),
        ("resnet:R-18", ["MODEL.BACKBONE.FREEZE_AT", 9], "FREEZE_AT is 9; build_resnet_backbone"),
        ("resnet:R-18", ["MODEL.BACKBONE.FREEZE_AT", -3], "FREEZE_AT is -3; .*nothing at 0"),
        ("detectron2:build_swin_t_backbone", ["MODEL.BACKBONE.FREEZE_AT", 6], "FREEZE_AT is 6"),
        ("detectron2:build_mvitv2_t_backbone", ["MODEL.BACKBONE.FREEZE_AT", 2], "MViT freezes no"),
        ("resnet:R-18", ["MODEL.FPN.OUT_CHANNELS", 0], "OUT_CHANNELS is 0; a level has 1"),
        ("resnet:R-18", ["MODEL.FPN.OUT_CHANNELS", -4], "OUT_CHANNELS is -4; a level has 1"),
        ("timm:inception_v3", [], r"res2 of .* stride 4 would be \(1, 192, 32, 40\)"),
        ("timm:resnet18.nope", [], "gives no feature maps: .*nope"),
        ("timm:resnet81", [], r"no model of timm 1.*did you mean resnet"),
        ("timm:resnet10t", ["MODEL.TIMM.NORM", "GN"], "NORM 'GN' is unknown"),
        ("timm:pvt_v2_b0", ["MODEL.BACKBONE.FREEZE_AT", 1], "res1 is not among"),
        ("torchvision:resnet19", [], "did you mean resnet1"),
        ("torchvision:vit_b_16", [], "does not take images of 128 x 160 px"),
        ("torchvision:squeezenet1_0", [], r"asks for res2 \(stride 4\)"),
        ("torchvision:resnet18", ["MODEL.TORCHVISION.WEIGHTS", "V7"], "'V7' is not known for"),
        ("timm:resnet10t", ["INPUT.FORMAT", "L"], "INPUT.FORMAT is 'L'"),
    ],
)
def test_a_network_that_does_not_fit_is_refused_with_what_it_offers(network, opts, message):
    with pytest.raises(UserError, match=message):
        build_backbone(config(network, *opts))


def test_without_timm_one_line_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"pip install 'fpn_plugin\[timm\]'"):
        build_backbone(config("timm:resnet10t"))


def test_weights_that_cannot_be_fetched_are_named_with_the_key(monkeypatch, tmp_path):
    def unreachable(*args: object, **kwargs: object) -> None:
        raise LocalEntryNotFoundError("no network here")

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", unreachable)
    with pytest.raises(UserError, match=r"resnet10t cannot be fetched: no net.*PRETRAINED False"):
        build_backbone(config("timm:resnet10t", "MODEL.TIMM.PRETRAINED", True))

    def no_host(*args: object, **kwargs: object) -> None:
        raise URLError("no host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_host)
    with pytest.raises(UserError, match=r"DEFAULT of resnet18 .* no host.*WEIGHTS '' builds"):
        build_backbone(config("torchvision:resnet18", "MODEL.TORCHVISION.WEIGHTS", "DEFAULT"))


def test_a_trained_detector_keeps_only_names_of_weights_that_change_its_input():
    usual, unusual = ("resnet18", "IMAGENET1K_V1"), ("vgg16", "IMAGENET1K_FEATURES")
    for (name, weights), kept in ((usual, ""), (unusual, unusual[1])):
        cfg = config(f"torchvision:{name}", "MODEL.TORCHVISION.WEIGHTS", weights)
        trained = without_network_weights(cfg)
        assert kept == trained.MODEL.TORCHVISION.WEIGHTS


def random_state(network: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict of which no value is one that a new network begins with."""
    return {
        name: torch.rand_like(value) + 0.5 if value.is_floating_point() else value
        for name, value in network.state_dict().items()
    }


def whole_network(network: str) -> nn.Module:
    """The classification network, and not only its stages."""
    kind, _, name = network.partition(":")
    if kind == "timm":
        return timm.create_model(name, pretrained=False)
    return torchvision.models.get_model(name, weights=None)


def with_file(network: str, path: Path, *opts: object) -> nn.Module:
    key = f"MODEL.{network.partition(':')[0].upper()}.WEIGHTS"
    return build_backbone(config(network, key, str(path), *opts)).bottom_up.net


# One of each way in which extractors rename tensors.
FROM_FILES = [
    "timm:tf_efficientnet_lite0", "timm:convnext_atto", "timm:densenet121", "timm:hrnet_w18_small",
    "timm:swin_tiny_patch4_window7_224", "torchvision:resnet18", "torchvision:regnet_y_400mf",
    "torchvision:mobilenet_v2", "torchvision:densenet121",
]  # fmt: skip


@pytest.mark.parametrize("network", FROM_FILES)
def test_a_file_gives_the_weights_that_the_library_itself_loads(network, tmp_path, caplog):
    kind, _, name = network.partition(":")
    state = random_state(whole_network(network))
    paths = [tmp_path / "bare.pth", tmp_path / "sorted.safetensors", tmp_path / "training.pth"]
    write_checkpoint(state, paths[0], bare=True)
    write_checkpoint(state, paths[1])
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, paths[2])
    caplog.set_level(logging.INFO)
    nets = [with_file(network, path) for path in paths]
    assert len(caplog.records) == 3
    for record in caplog.records:
        assert re.search(r"(\d+) of \1 tensors are loaded.*no place for .*", record.getMessage())
    if kind == "timm":
        overlay = {"state_dict": {k: v.clone() for k, v in state.items()}}
        theirs = timm.create_model(
            name, pretrained=True, features_only=True, pretrained_cfg_overlay=overlay,
            out_indices=nets[0].feature_info.out_indices,
        )  # fmt: skip
        expected = theirs.state_dict()
    else:
        expected = {name: state[name] for name in nets[0].state_dict()}
    # A detector's checkpoint, of any run of this plugin.
    detector = build_backbone(config(network, f"MODEL.{kind.upper()}.WEIGHTS", str(paths[0])))
    whole = {f"backbone.{k}": v for k, v in detector.state_dict().items()}
    write_checkpoint({**whole, "roi_heads.box_head.fc1.bias": torch.zeros(3)}, tmp_path / "d.pth")
    for net in (*nets, with_file(network, tmp_path / "d.pth")):
        assert net.state_dict().keys() == expected.keys()
        for key, value in net.state_dict().items():
            assert key.endswith("num_batches_tracked") or torch.equal(value, expected[key]), key
    assert "from backbone.bottom_up.net." in caplog.messages[-1]


def test_frozen_norms_have_the_files_statistics_and_nothing_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(
        timm.models._hub, "hf_hub_download", lambda *_, **__: pytest.fail("it is fetched")
    )
    state = random_state(whole_network("timm:tf_efficientnet_lite0"))
    write_checkpoint(state, tmp_path / "lite0.pth")
    opts = ["MODEL.TIMM.PRETRAINED", True, "MODEL.TIMM.NORM", "FrozenBN"]
    net = with_file("timm:tf_efficientnet_lite0", tmp_path / "lite0.pth", *opts)
    given = net.state_dict()
    assert len(given) == 240 and not any("num_batches" in key for key in given)
    assert all(torch.equal(value, state[key]) for key, value in given.items())


# Names that other files begin with, and what a message says of them.
OTHER_FILES = {
    "backbone.fpn_lateral2.weight": "a detector of Detectron2 or of this plugin, for MODEL.WEIGHTS",
    "backbone.body.layer1.0.conv1.weight": "a detector of torchvision, for fpn-plugin convert",
    "neck.lateral_convs.0.conv.weight": "a detector of mmdetection, for fpn-plugin convert",
    "res2.0.conv1.weight": "a ResNet of Detectron2, for MODEL.WEIGHTS",
    "_blocks.0._bn1.weight": "a network of EfficientNet-PyTorch, for MODEL.TIMM.WEIGHTS, after",
    "module.layer1.0.conv1.weight": "a ResNet of timm or torchvision, for MODEL.TIMM.WEIGHTS or",
    "features.0.0.weight": "a network of torchvision, for MODEL.TORCHVISION.WEIGHTS",
    "blocks.9.0.conv_pwl.weight": "a network of timm, for MODEL.TIMM.WEIGHTS",
    "encoder.weight": "no network of timm, torchvision or Detectron2",
}


@pytest.mark.parametrize("network", ["timm:tf_efficientnet_lite0", "torchvision:regnet_y_400mf"])
def test_a_file_that_does_not_fit_is_named_with_the_key_that_takes_it(network, tmp_path):
    key = f"MODEL.{network.partition(':')[0].upper()}.WEIGHTS"
    for name, looks in OTHER_FILES.items():
        write_checkpoint({name: torch.zeros(2)}, tmp_path / "other.pth")
        expected = (
            rf"{key}: '.*other.pth' does not fit: .* [01] of \d+ .*'{name}'.*looks like {looks}"
        )
        with pytest.raises(UserError, match=expected) as raised:
            with_file(network, tmp_path / "other.pth")
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=rf"{key}: there is no file .*gone.pth'; {key} '' builds"):
        with_file(network, tmp_path / "gone.pth")
    torch.save({"model": 3}, tmp_path / "number.pth")
    with pytest.raises(UserError, match=rf"{key}: .*number.pth' has no weights: .*type int"):
        with_file(network, tmp_path / "number.pth")


def test_a_network_of_another_size_is_refused_and_a_part_is_named(tmp_path, caplog):
    state = random_state(whole_network("torchvision:resnet50"))
    write_checkpoint(state, tmp_path / "r50.pth")
    for network in ("torchvision:resnet18", "timm:resnet18"):
        expected = r"another network: layer1.0.conv1.weight is \(64, 64, 1, 1\) .*NAME"
        with pytest.raises(UserError, match=expected):
            with_file(network, tmp_path / "r50.pth")
    state = random_state(whole_network("timm:resnet18"))
    left = {"layer1.0.bn1.bias", "layer4.1.conv2.weight"}
    write_checkpoint({k: v for k, v in state.items() if k not in left}, tmp_path / "part.pth")
    caplog.clear()
    net = with_file("timm:resnet18", tmp_path / "part.pth")
    for key, value in net.state_dict().items():
        assert torch.equal(value, state[key]) != (key in left), key
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert (
        "part.pth' for timm's resnet18: 98 of 100 tensors are loaded; not in the file, so they "
        "stay as they were: layer1.0.bn1.bias, layer4.1.conv2.weight; the network has no place "
        "for fc"
    ) in caplog.text


def test_detectron2s_swin_freezes_its_first_stages():
    cfg = config("detectron2:build_swin_t_backbone", "MODEL.BACKBONE.FREEZE_AT", 2)
    bottom_up = build_backbone(cfg).bottom_up
    sum(level.sum() for level in bottom_up(torch.randn(1, 3, 64, 64)).values()).backward()
    frozen = {n.split(".blocks")[0] for n, p in bottom_up.named_parameters() if p.grad is None}
    # Stage "p0" is layers.0 before it is merged for the next; its norm is the pyramid's to train.
    assert {name for name in frozen if "downsample" not in name} == {
        "layers.0", "patch_embed.norm.bias", "patch_embed.norm.weight", "patch_embed.proj.bias",
        "patch_embed.proj.weight",
    }  # fmt: skip


@pytest.mark.parametrize("name", DETECTRON2_NETWORKS)
def test_a_detectron2_that_lacks_a_network_says_so(name, monkeypatch):
    for module in ("regnet", "swin", "mvit"):
        monkeypatch.setitem(sys.modules, f"detectron2.modeling.backbone.{module}", None)
    cfg = config("resnet:R-18", "MODEL.FPN.BOTTOM_UP", name)
    with pytest.raises(UserError, match=r"this Detectron2 has no detectron2\S+, .* release 0.6"):
        build_backbone(cfg)


@pytest.mark.parametrize("name", ["build_swin_t_backbone", "build_mvitv2_t_backbone"])
def test_detectron2s_transformers_need_timm_and_say_so(name, monkeypatch):
    network = config(f"detectron2:{name}")
    monkeypatch.setitem(sys.modules, "timm.models.layers", None)
    with pytest.raises(UserError, match=rf"{name} needs timm.*pip install 'fpn_plugin\[timm\]'"):
        build_backbone(network)


def test_a_shorter_pyramid_leaves_no_norm_without_gradient():
    cfg = config("detectron2:build_swin_t_backbone", "MODEL.FPN.IN_FEATURES", ["p1", "p2", "p3"])
    neck = build_backbone(cfg)
    sum(level.sum() for level in neck(torch.randn(1, 3, 64, 64)).values()).backward()
    assert not [name for name, p in neck.named_parameters() if p.grad is None]


def _compiled() -> bool:
    try:
        from detectron2 import _C  # noqa: F401
    except ImportError:
        return False
    return True


@pytest.mark.skipif(not _compiled(), reason="deformable convolutions need Detectron2's _C")
def test_deformable_convolutions_carry_a_pyramid():
    opts = ["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True]]
    neck = build_backbone(config("resnet:R-101", *opts))
    deformed = {name.split(".")[1] for name in neck.state_dict() if "conv2_offset" in name}
    assert deformed == {"res3", "res4", "res5"}
    assert list(neck.output_shape()) == ["p2", "p3", "p4", "p5", "p6"]
    if torch.cuda.is_available():
        assert neck.cuda()(torch.randn(1, 3, 64, 64).cuda())["p5"].shape == (1, 8, 2, 2)


class OwnNetwork(Backbone):
    """A user's own network: two maps of strides 8 and 16."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 8, 8), nn.Conv2d(6, 10, 2, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        c3 = self.first(x)
        return {"c3": c3, "c4": self.second(c3)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"c3": ShapeSpec(channels=6, stride=8), "c4": ShapeSpec(channels=10, stride=16)}


@BACKBONE_REGISTRY.register()
def build_own_network_for_a_test(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    return OwnNetwork()


def test_a_network_of_the_users_own():
    name = build_own_network_for_a_test.__name__
    cfg = config("resnet:R-18", "MODEL.FPN.BOTTOM_UP", name, "MODEL.FPN.IN_FEATURES", ["c3", "c4"])
    sizes = {k: v.shape[2:] for k, v in build_backbone(cfg)(torch.rand(1, 3, 64, 32)).items()}
    assert sizes == {"p3": (8, 4), "p4": (4, 2), "p5": (2, 1)}

"""Networks whose padding depends on the size of each map, and exports that would never end."""

import copy
import signal
import threading
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.modeling.backbone import Backbone
from torch import nn

from fpn_plugin import UserError
from fpn_plugin.deploy import export
from fpn_plugin.deploy.export import batched, export_graph, exportable, load_exported
from fpn_plugin.deploy.same_padding import fix_padding, padded_by_size

layers = pytest.importorskip("timm.layers")


class ComputesPadding(Backbone):
    """One of each of timm's modules that compute it, of stride 32 together."""

    size_divisibility = 32

    def __init__(self):
        super().__init__()
        self._out_feature_strides = {"res5": 32}
        self.net = nn.Sequential(
            layers.StdConv2dSame(3, 8, 7, stride=2, padding="same"),
            layers.create_pool2d("max", 3, 2, padding="same"),
            layers.Conv2dSame(8, 8, (5, 4), stride=2),
            layers.Conv2dSame(8, 8, 4, dilation=3),
            layers.create_pool2d("avg", 4, 2, padding="same"),
            layers.ScaledStdConv2dSame(8, 8, 3, stride=2, padding="same"),
            layers.Conv2dSame(8, 8, 1, stride=1),
        )

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("sides", [(32, 32), (64, 96), (160, 224)])
def test_fixed_padding_is_the_computed_one(sides):
    network = ComputesPadding().eval()
    assert len(padded_by_size(network)) == 7
    fixed = copy.deepcopy(network)
    fix_padding(fixed)
    assert padded_by_size(fixed) == []
    image = torch.randn(2, 3, *sides)
    with torch.no_grad():
        torch.testing.assert_close(fixed(image), network(image))
        torch.testing.assert_close(copy.deepcopy(fixed)(image), network(image))


def test_padding_is_left_computed_where_sides_may_be_odd():
    network = ComputesPadding()
    network.size_divisibility = 16
    fix_padding(network)
    assert len(padded_by_size(network)) == 7


def with_network(cfg, name: str, *opts: object):
    cfg.merge_from_list([
        "MODEL.FPN.BOTTOM_UP", "build_timm_backbone", "MODEL.TIMM.NAME", name,
        "MODEL.TIMM.PRETRAINED", False, "MODEL.BACKBONE.FREEZE_AT", 0, *opts,
    ])  # fmt: skip
    return build_model(cfg).eval()


def test_without_padding_of_images_it_is_refused_by_name(config_of, tmp_path):
    if not hasattr(torch.export.Dim, "DYNAMIC"):
        pytest.skip("this torch.export has no dynamic sizes, which is said first")
    graph = exportable(
        with_network(
            config_of("faster"), "tf_efficientnet_lite0", "MODEL.FPN.MATCH_LATERAL_SIZE", True
        )
    )
    expected = "bottom_up.net.conv_stem does, .*MODEL.FPN.MATCH_LATERAL_SIZE. False, or export tor"
    for kind in ("torch_export", "onnx"):
        with pytest.raises(UserError, match=expected):
            export_graph(graph, kind, tmp_path / "model")


def test_an_export_that_takes_too_long_is_ended_and_says_how_far_it_was(config_of, tmp_path):
    graph = exportable(build_model(config_of("faster")))

    def ring(x):
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 300
        signal.raise_signal(signal.SIGALRM)  # what the clock does when the time is up
        return {f"res{k}": x[:, :1] for k in (2, 3, 4, 5)}

    graph.model.backbone.bottom_up.forward = ring
    with pytest.raises(
        UserError, match="was not written within 300 s: .* model.backbone.bottom_up "
    ):
        export_graph(graph, "torchscript", tmp_path / "model.ts", time_limit=300)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
    assert signal.getsignal(signal.SIGALRM) is signal.SIG_DFL


def test_a_thread_exports_without_a_limit(config_of, tmp_path, monkeypatch):
    graph = exportable(build_model(config_of("faster")))
    monkeypatch.setattr(export, "_write", lambda *given: Path(given[-1]).touch())
    path = tmp_path / "model.ts"
    thread = threading.Thread(target=export_graph, args=(graph, "torchscript", path, 1e-6))
    thread.start()
    thread.join()
    assert path.exists()


# The families of timm that are fetched most and have feature maps, each by its smallest.
FAMILIES = [
    "resnet18", "mobilenetv3_small_050", "efficientnet_b0", "convnext_atto",
    "swin_tiny_patch4_window7_224", "tf_efficientnet_lite0", "densenet121", "regnety_002",
    "mobilenetv2_050", "resnetv2_50x1_bit",
]  # fmt: skip


@pytest.mark.long
@pytest.mark.skipif(
    not hasattr(torch.export.Dim, "DYNAMIC"), reason="this torch.export has no dynamic sizes"
)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_families_of_timm_are_exported_in_a_time(name, config_of, tmp_path):
    model = with_network(config_of("faster"), name)
    graph = exportable(model)
    try:
        export_graph(graph, "torch_export", tmp_path / "model.pt2")
    except UserError as error:
        # Its windows are cut by the size of each map, which takes an exporter long.
        assert "swin" in name
        assert "was not written within 900 s" in str(error)
        return
    exported = load_exported(tmp_path / "model.pt2")
    generator = torch.Generator().manual_seed(1)
    for sides in ((96, 128), (160, 130)):
        given = batched([torch.rand(3, *sides, generator=generator) * 255])
        with torch.no_grad():
            for found, expected in zip(exported(*given), graph(*given), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)

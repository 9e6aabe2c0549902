"""Frozen norms folded in training: Detectron2's values and gradients in float64."""

import copy
from unittest import mock

import pytest
import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling import build_model
from detectron2.modeling.backbone.resnet import BasicStem, ResNet

from fpn_plugin import model_zoo
from fpn_plugin.deploy.fast_training import (
    FrozenNormConv2d,
    fold_frozen_norms,
    optimize_for_training,
)
from fpn_plugin.modeling import without_network_weights


def resnet(norm: str = "FrozenBN") -> ResNet:
    stages = ResNet.make_default_stages(18, norm=norm)
    net = ResNet(BasicStem(norm=norm), stages, out_features=["res2", "res3", "res4", "res5"])
    for module in net.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(0.5, 1.5)
            module.bias.uniform_(-0.5, 0.5)
    return net.double()


def run(net, x):
    outputs = net(x)
    sum((o.flatten() @ torch.linspace(-1, 1, o.numel()).to(o)) for o in outputs.values()).backward()
    return outputs, {name: p.grad for name, p in net.named_parameters()}


def test_values_and_gradients_are_those_of_convolution_and_norm():
    theirs = resnet().train()
    ours = copy.deepcopy(theirs)
    assert fold_frozen_norms(ours) == 20
    assert list(ours.state_dict()) == list(theirs.state_dict())
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    (mine, my_grads), (other, their_grads) = run(ours, x), run(theirs, x)
    for name, value in other.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-10, atol=1e-10)
    for name, grad in their_grads.items():
        assert grad.abs().sum() > 0
        torch.testing.assert_close(my_grads[name], grad, rtol=1e-8, atol=1e-8)


def test_in_evaluation_it_is_detectron2s_to_the_bit():
    theirs = resnet().float().eval()
    ours = copy.deepcopy(theirs)
    fold_frozen_norms(ours)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert all(torch.equal(ours(x)[name], value) for name, value in theirs(x).items())


def test_a_bias_and_an_activation_are_kept():
    norm = FrozenBatchNorm2d(4)
    norm.running_mean.uniform_(-1, 1)
    conv = Conv2d(3, 4, 3, bias=True, norm=norm, activation=torch.relu).train()
    folded = copy.deepcopy(conv)
    fold_frozen_norms(torch.nn.Sequential(folded))
    assert type(folded) is FrozenNormConv2d
    x = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(folded(x), conv(x), rtol=1e-5, atol=1e-6)


def test_a_norm_that_changes_is_folded_anew():
    conv = Conv2d(3, 4, 3, norm=FrozenBatchNorm2d(4)).train()
    folded = copy.deepcopy(conv)
    fold_frozen_norms(torch.nn.Sequential(folded))
    x = torch.randn(2, 3, 8, 8)
    for change in (
        lambda c: None,
        lambda c: c.norm.running_var.fill_(3),
        lambda c: c.load_state_dict({**c.state_dict(), "norm.bias": torch.arange(4.0)}),
        lambda c: setattr(c.norm, "weight", torch.full((4,), 2.0)),
        lambda c: c.double(),
    ):
        change(conv)
        change(folded)
        x = x.to(conv.weight.dtype)
        torch.testing.assert_close(folded(x), conv(x), rtol=1e-5, atol=1e-6)
    assert folded._affine_map(x.dtype)[0] is folded._affine_map(x.dtype)[0]


@pytest.mark.parametrize("network", ["detectron2", "timm", "torchvision"])
def test_a_model_trains_channels_last_and_evaluates_as_before(network):
    cfg = model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    if network != "detectron2":  # of their norms only Detectron2's are folded
        cfg.MODEL.FPN.BOTTOM_UP = f"build_{network}_backbone"
        cfg.MODEL.TIMM.NAME = "tf_efficientnet_lite0"
    cfg.MODEL.DEVICE = "cpu"
    model, other = (build_model(without_network_weights(cfg)) for _ in range(2))
    other.load_state_dict(model.state_dict())
    optimize_for_training(model)
    assert list(model.state_dict()) == list(other.state_dict())
    x = torch.randn(1, 3, 64, 64)
    trained, expected = model.backbone.train()(x), other.backbone.train()(x)
    for name, level in trained.items():
        assert level.is_contiguous(memory_format=torch.channels_last)
        scale = expected[name].abs().max()
        torch.testing.assert_close(level / scale, expected[name] / scale, rtol=0, atol=1e-5)
    with torch.no_grad():
        evaluated, expected = model.backbone.eval()(x), other.backbone.eval()(x)
    assert all(torch.equal(evaluated[name], level) for name, level in expected.items())


def test_norms_that_train_are_left_alone():
    assert fold_frozen_norms(resnet("BN")) == 0


def test_the_bottom_up_pathway_is_compiled_and_hooks_still_see_the_maps():
    compiled, seen = [], []

    class Pyramid(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bottom_up = torch.nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.bottom_up(x)

    model = torch.nn.Module()
    model.backbone = Pyramid()
    model.backbone.bottom_up.compile = lambda **options: compiled.append(options)
    with mock.patch.object(torch, "compile", lambda function: function):
        optimize_for_training(model, compile=True)
    assert compiled == [{"dynamic": True}]
    model.backbone.register_forward_hook(lambda *_: seen.append(1))
    model.backbone(torch.zeros(1, 3, 2, 2))
    assert seen


def test_without_a_compiler_training_goes_on_and_says_so():
    def fails(*_, **__):
        raise RuntimeError("no C++ compiler\nand a long story")

    model = torch.nn.Module()
    model.backbone = torch.nn.Conv2d(3, 4, 1)
    model.backbone.compile = fails
    told = r"on cpu, training goes on uncompiled \(RuntimeError: no C\+\+ compiler and a long"
    with mock.patch.object(torch, "compile", fails), pytest.warns(UserWarning, match=told):
        optimize_for_training(model, compile=True)

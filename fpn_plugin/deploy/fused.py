"""Detectron2's and the plugin's modules with fused convolutions: same values, fewer passes."""

from __future__ import annotations

import torch
from detectron2.modeling import FPN
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from detectron2.modeling.proposal_generator.rpn import (
    RPN,
    StandardRPNHead,
    find_top_rpn_proposals,
)
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.nn import functional as F

from fpn_plugin.modeling import FeaturePyramidNetwork

from .batched_parts import decoded_best
from .convolution import FusedConv2d

__all__ = [
    "FusedNeck",
    "SelectingRPN",
    "as_plugin_pyramid",
    "fuse_resnets",
    "fuse_rpn_heads",
    "select_first",
]


class FusedBlock(nn.Module):
    """A ResNet block whose convolutions include each ReLU and the sum with the shortcut."""

    def __init__(self, block: BasicBlock | BottleneckBlock, dtype: torch.dtype, first: bool):
        super().__init__()
        convs = [getattr(block, f"conv{i}", None) for i in (1, 2, 3)]  # BasicBlock has two
        self.convs = nn.ModuleList(FusedConv2d(c, dtype, relu=True) for c in convs if c is not None)
        self.shortcut = None if block.shortcut is None else FusedConv2d(block.shortcut, dtype)
        last = self.convs[-1]
        if self.shortcut is not None and None not in (last.bias, self.shortcut.bias):
            # One bias for both: where a convolution does not add it, this saves a pass.
            both = last.bias.float() + self.shortcut.bias.float()
            last.bias = nn.Parameter(both.to(dtype), requires_grad=False)
            self.shortcut.bias = None
        self.stride = block.stride
        # Other modules may read the input of a stage's first block, so it is not overwritten.
        self._first = first

    def forward(self, x: Tensor) -> Tensor:
        out = x
        for conv in self.convs[:-1]:
            out = conv(out)
        if self.shortcut is not None:
            x = self.shortcut(x)
        elif self._first:
            x = x.clone()
        return self.convs[-1].add_to(x, out)


class FusedStem(nn.Module):
    """BasicStem whose convolution includes the ReLU."""

    def __init__(self, stem: BasicStem, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv1 = FusedConv2d(stem.conv1, dtype, relu=True)
        self.stride = stem.stride

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.conv1(x), kernel_size=3, stride=2, padding=1)


def fuse_resnets(model: nn.Module, dtype: torch.dtype) -> int:
    """Replaces stems and blocks without a norm in Detectron2's ResNets, in place.

    Returns:
        How many blocks were replaced.
    """
    count = 0
    for resnet in [module for module in model.modules() if isinstance(module, ResNet)]:
        if type(resnet.stem) is BasicStem and _without_norm(resnet.stem):
            resnet.stem = FusedStem(resnet.stem, dtype)
        for stage in resnet.stages:
            for i, block in enumerate(stage):
                if type(block) in (BasicBlock, BottleneckBlock) and _without_norm(block):
                    stage[i] = FusedBlock(block, dtype, first=i == 0)
                    count += 1
    return count


def _without_norm(module: nn.Module) -> bool:
    return all(getattr(m, "norm", None) is None for m in module.modules())


def as_plugin_pyramid(fpn: FPN) -> FeaturePyramidNetwork | None:
    """The plugin's pyramid with the modules of a stock one; None if that pads to squares."""
    if fpn.padding_constraints.get("square_size"):
        return None
    neck = FeaturePyramidNetwork(
        fpn.bottom_up,
        fpn.in_features,
        fpn._out_feature_channels[fpn._out_features[0]],
        top_block=fpn.top_block,
        fuse_type=fpn._fuse_type,
        coarsest_output_conv=True,
    )
    for name, module in fpn.named_children():
        if name.startswith("fpn_"):
            setattr(neck, name, module)
    return neck.eval()


class FusedNeck(FeaturePyramidNetwork):
    """The pyramid whose lateral convolutions include the sum of section 3."""

    def __init__(self, neck: FeaturePyramidNetwork) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(neck.__dict__)

    def _merge(self, stage: Tensor, level: int, coarser: Tensor | None) -> Tensor:
        lateral = getattr(self, f"fpn_lateral{level}", None)
        plain = coarser is None or not self._top_down or self._match_lateral_size
        if plain or not isinstance(lateral, FusedConv2d):
            return super()._merge(stage, level, coarser)
        if stage.is_cuda:
            merged = _plus_upsampled(lateral(stage), coarser)
        else:
            upsampled = F.interpolate(coarser, scale_factor=2.0, mode="nearest")
            merged = lateral.add_to(self._fitting(upsampled, stage), stage)
        return merged.div_(2) if self._fuse_type == "avg" else merged


def _plus_upsampled(finer: Tensor, coarser: Tensor) -> Tensor:
    """Adds a map of half the size, in place: each of its cells is added to four cells."""
    images, channels, height, width = coarser.shape
    # A view where maps are channels last.
    cells = finer.permute(0, 2, 3, 1).view(images, height, 2, width, 2, channels)
    cells += coarser.permute(0, 2, 3, 1)[:, :, None, :, None]
    return finer


class FusedRPNHead(nn.Module):
    """StandardRPNHead whose two predictors are one convolution. Its output is float32."""

    def __init__(self, head: StandardRPNHead, dtype: torch.dtype) -> None:
        super().__init__()
        hidden = list(head.conv) if isinstance(head.conv, nn.Sequential) else [head.conv]
        self.conv = nn.Sequential(*(FusedConv2d(conv, dtype, relu=True) for conv in hidden))
        both = (head.objectness_logits, head.anchor_deltas)
        self._split = [predictor.out_channels for predictor in both]
        # A multiple of 8 channels: matrix products in half precision are then faster on a GPU.
        self._split.append(-sum(self._split) % 8)
        predictor = nn.Conv2d(both[0].in_channels, sum(self._split), 1)
        rest = (0, self._split[-1])
        weight = torch.cat([p.weight.detach() for p in both])
        predictor.weight.data = F.pad(weight, (0, 0, 0, 0, 0, 0, *rest))
        predictor.bias.data = F.pad(torch.cat([p.bias.detach() for p in both]), rest)
        self.predictor = FusedConv2d(predictor, dtype)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        maps = [self.predictor(self.conv(level)).float() for level in features]
        logits, deltas, _ = zip(*(both.split(self._split, dim=1) for both in maps), strict=True)
        return list(logits), list(deltas)


def fuse_rpn_heads(model: nn.Module, dtype: torch.dtype) -> int:
    """Replaces StandardRPNHeads, also those within a PerLevelRPNHead, in place."""
    count = 0
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if type(child) is StandardRPNHead:
                module._modules[name] = FusedRPNHead(child, dtype)
                count += 1
    return count


class SelectingRPN(RPN):
    """An RPN that decodes only the candidates that it selects. Detectron2's decodes all of them.

    The selection depends only on logits, so proposals are the same.
    """

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """See the base class."""
        boxes, logits = decoded_best(self, anchors, pred_objectness_logits, pred_anchor_deltas)
        return find_top_rpn_proposals(
            boxes,
            logits,
            image_sizes,
            self.nms_thresh,
            self.pre_nms_topk[self.training],
            self.post_nms_topk[self.training],
            self.min_box_size,
            self.training,
        )


def select_first(rpn: RPN) -> None:
    """Makes an RPN decode only what it selects, in place."""
    # A new class instead of a new method: copies are independent and can be saved.
    rpn.__class__ = SelectingRPN

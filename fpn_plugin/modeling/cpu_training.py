"""Training on a CPU: frozen norms inside the weights, and maps in the layout it is fastest in."""

from __future__ import annotations

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["FrozenNormConv2d", "fold_frozen_norms", "optimize_for_cpu_training"]


def optimize_for_cpu_training(model: nn.Module) -> None:
    """Makes a model train faster on a CPU, in place; parameters and state dict stay as they are.

    Frozen batch norms are folded, see :class:`FrozenNormConv2d`, and the backbone's maps are
    channels last, which convolutions and RoIAlign are faster with. Values are the same up to
    rounding. Batch norms that train are slower so: a model without frozen ones is left as it is,
    and nothing changes in evaluation.

    Args:
        model: any of Detectron2's architectures.
    """
    backbone = getattr(model, "backbone", None)
    if backbone is not None and fold_frozen_norms(backbone):
        backbone.register_forward_pre_hook(_channels_last)


def _channels_last(backbone: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if not backbone.training:
        return inputs
    return (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])


class FrozenNormConv2d(Conv2d):
    """Detectron2's convolution with a FrozenBatchNorm2d, as one convolution in training.

    A frozen norm is an affine map: s (w * x) + b = (s w) * x + b. Where gradients are needed
    Detectron2 computes the left side, which reads and writes each map twice more, forward and
    backward; this computes the right one on a CPU, where that costs most. Parameters, state dict
    and, up to rounding, values and gradients are the same. In evaluation it is Detectron2's.
    """

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C', H', W')``."""
        if not self.training or self.norm is None or x.device.type != "cpu" or x.numel() == 0:
            return super().forward(x)
        norm = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        shift = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            shift = shift + self.bias * scale
        weight = self.weight * scale[:, None, None, None]
        x = F.conv2d(x, weight, shift, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)


def fold_frozen_norms(module: nn.Module) -> int:
    """Makes a FrozenNormConv2d of each Detectron2 convolution with a frozen norm, in place.

    Returns:
        How many were made.
    """
    count = 0
    for conv in module.modules():
        if type(conv) is Conv2d and type(conv.norm) is FrozenBatchNorm2d:
            conv.__class__ = FrozenNormConv2d  # has no state of its own
            count += 1
    return count

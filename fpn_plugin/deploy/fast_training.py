"""Faster training: frozen norms folded into weights, channels last, and few waits for a GPU."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNOutputLayers
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.nn import functional as F

from fpn_plugin.errors import one_line

from .batched_parts import (
    BatchedFastRCNNOutputLayers,
    BatchedRPN,
    KeptAnchorGenerator,
    PatientMatcher,
)

__all__ = ["FrozenNormConv2d", "fold_frozen_norms", "optimize_for_training", "use_batched_parts"]


def optimize_for_training(model: nn.Module, compile: bool = False) -> None:
    """Makes a model train faster, in place. Parameters and state dict stay as they are.

    Frozen batch norms of Detectron2's convolutions are folded, see :class:`FrozenNormConv2d`. The
    backbone's maps are channels last: convolutions and RoIAlign are then faster. Batch norms that
    train are slower on a CPU, so a model without frozen ones keeps its layout. On a GPU, weights
    are channels last too, a batch is sent without a wait, and :func:`use_batched_parts` applies.
    Values are the same up to rounding. Random numbers are the same. Evaluation on a CPU does not
    change.

    Args:
        model: any of Detectron2's architectures, on the device that it is trained on.
        compile: compile the bottom-up pathway, or a backbone without one, with torch.compile, for
            all image sizes at once.
    """
    backbone = getattr(model, "backbone", None)
    on_gpu = next(model.parameters()).is_cuda
    if backbone is not None and _has_frozen_norms(backbone):
        fold_frozen_norms(backbone)
        backbone.register_forward_pre_hook(_channels_last)
        if on_gpu:
            model.to(memory_format=torch.channels_last)
    if on_gpu:
        use_batched_parts(model)
        model.register_forward_pre_hook(_upload)
    if compile and backbone is not None and _compiles(next(model.parameters()).device):
        # Not the whole pyramid: hooks read its maps, and compiled modules call no hooks.
        getattr(backbone, "bottom_up", backbone).compile(dynamic=True)


def use_batched_parts(model: nn.Module) -> None:
    """Changes the classes of Detectron2's anchor generators, RPN, matchers and box predictors, in
    place, to ones that handle all images of a batch at once. State and values are the same.
    """
    for part in model.modules():
        if type(part) is DefaultAnchorGenerator:
            part.__class__ = KeptAnchorGenerator
        elif type(part) is RPN:
            part.__class__ = BatchedRPN
        elif type(part) is FastRCNNOutputLayers:
            part.__class__ = BatchedFastRCNNOutputLayers
        names = ("anchor_matcher", "proposal_matcher")
        matchers = [getattr(part, name, None) for name in names]
        for matcher in (*matchers, *getattr(part, "proposal_matchers", ())):  # of a cascade
            if type(matcher) is Matcher:
                matcher.__class__ = PatientMatcher


def _compiles(device: torch.device) -> bool:
    """Whether torch.compile works on a device. If not, a warning says why."""
    try:
        torch.compile(lambda x: x + 1)(torch.zeros(2, device=device))
    except Exception as error:  # without a compiler, Triton or enough memory: many kinds
        warnings.warn(
            f"torch.compile does not work on {device}, training goes on uncompiled "
            f"({type(error).__name__}: {one_line(error)})",
            stacklevel=3,
        )
        return False
    return True


def _has_frozen_norms(backbone: nn.Module) -> bool:
    # Detectron2's and timm's have no common base.
    return any(type(part).__name__.startswith("FrozenBatchNorm") for part in backbone.modules())


def _channels_last(backbone: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if not backbone.training:
        return inputs
    return (inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:])


def _upload(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """In training, moves a batch for Detectron2's architectures to the model's device."""
    if not model.training or not isinstance(inputs[0], list):
        return inputs
    device = next(model.parameters()).device
    return ([{key: _sent(value, device) for key, value in of.items()} for of in inputs[0]],)


def _sent(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        if value.device.type == "cpu" and value.numel():
            value = value.pin_memory()
        return value.to(device, non_blocking=True)
    if isinstance(value, Boxes):
        return Boxes(_sent(value.tensor, device))
    if isinstance(value, Instances):
        fields = {name: _sent(field, device) for name, field in value.get_fields().items()}
        return Instances(value.image_size, **fields)
    return value  # Detectron2 moves masks and keypoints


class FrozenNormConv2d(Conv2d):
    """Detectron2's convolution with a FrozenBatchNorm2d, as one convolution in training.

    A frozen norm is an affine map: s (w * x) + b = (s w) * x + b. If gradients are needed,
    Detectron2 computes the left side, and reads and writes each map twice more, forward and
    backward. This class computes the right side. Parameters and state dict are the same, and so are
    values and gradients up to rounding. In evaluation it does what Detectron2's does.
    """

    _kept: tuple[list[object], Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` to ``(N, C', H', W')``."""
        if not self.training or self.norm is None or x.numel() == 0:
            return super().forward(x)
        scale, shift = self._affine_map(x.dtype)
        if self.bias is not None:
            shift = shift + self.bias * scale.flatten()
        weight = self.weight * scale
        x = F.conv2d(x, weight, shift, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)

    def _affine_map(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The s ``(C', 1, 1, 1)`` and b ``(C',)`` of the norm; kept until it changes."""
        norm = self.norm
        compiled = torch.compiler.is_compiling()
        if not compiled:
            buffers = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
            state = [dtype, *((id(each), each.data_ptr(), each._version) for each in buffers)]
            if self._kept is not None and self._kept[0] == state:
                return self._kept[1:]
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        affine = scale[:, None, None, None], (norm.bias - norm.running_mean * scale).to(dtype)
        if not compiled:
            self._kept = state, *affine
        return affine


def fold_frozen_norms(module: nn.Module) -> int:
    """Changes each Detectron2 convolution with a frozen norm into a FrozenNormConv2d, in place.

    Returns:
        How many were changed.
    """
    count = 0
    for conv in module.modules():
        if type(conv) is Conv2d and type(conv.norm) is FrozenBatchNorm2d:
            conv.__class__ = FrozenNormConv2d  # has no state of its own
            count += 1
    return count

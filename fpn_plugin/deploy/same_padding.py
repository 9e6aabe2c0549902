"""Fixed padding for timm's networks that compute it from the size of each map, as TensorFlow does.

An exporter with dynamic sizes carries that computation through every later layer, which takes too
long.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.utils import _pair as pair

__all__ = ["fix_padding", "padded_by_size"]

_PLAIN: dict[str, type[nn.Module]] = {
    "Conv2dSame": nn.Conv2d,
    "AvgPool2dSame": nn.AvgPool2d,
    "MaxPool2dSame": nn.MaxPool2d,
}


def padded_by_size(model: nn.Module) -> list[str]:
    """Names of the modules that compute their padding from the size of their input."""
    return [name for name, module in model.named_modules() if _is_padded_by_size(module)]


def fix_padding(backbone: nn.Module) -> None:
    """Fixes computed padding to its value for maps whose sides are multiples of the stride.

    All maps are such if images are padded to the stride of the network's coarsest map. Otherwise
    the backbone is left as it is.

    Args:
        backbone: a pyramid; changed in place.
    """
    network = getattr(backbone, "bottom_up", backbone)
    strides = getattr(network, "_out_feature_strides", {})
    if not strides or max(strides.values()) > backbone.size_divisibility:
        return
    for module in [m for m in backbone.modules() if _is_padded_by_size(m)]:
        sides: list[int] = []
        # F.pad starts with the last dimension.
        for axis in (1, 0):
            kernel, stride, dilation = (
                pair(getattr(module, name, 1))[axis]
                for name in ("kernel_size", "stride", "dilation")
            )
            total = max(dilation * (kernel - 1) + 1 - stride, 0)
            sides += [total // 2, total - total // 2]
        value = float("-inf") if isinstance(module, nn.MaxPool2d) else 0.0
        module.register_forward_pre_hook(partial(_padded, sides=sides, value=value))
        module.same_pad = False  # of convolutions with standardised weights
        module.__class__ = _PLAIN.get(type(module).__name__, type(module))


def _is_padded_by_size(module: nn.Module) -> bool:
    return type(module).__name__ in _PLAIN or getattr(module, "same_pad", False) is True


def _padded(
    _: nn.Module, inputs: tuple[Tensor], *, sides: list[int], value: float
) -> tuple[Tensor, ...]:
    return (F.pad(inputs[0], sides, value=value), *inputs[1:])

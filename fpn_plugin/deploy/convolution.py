"""Convolutions and linear layers that include the ReLU or the sum after them."""

from __future__ import annotations

import itertools

import torch
from detectron2.layers import Conv2d
from torch import Tensor, nn
from torch.nn import functional as F

from .fast_training import FrozenNormConv2d

__all__ = ["FusedConv2d", "can_fuse", "fuse_convolutions", "fuse_linears"]


def can_fuse(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether torch has the operators that :class:`FusedConv2d` calls on this device."""
    if device.type == "cuda":
        return torch.backends.cudnn.is_available() and torch.backends.cudnn.enabled
    supported = {
        torch.bfloat16: "_is_mkldnn_bf16_supported",
        torch.float16: "_is_mkldnn_fp16_supported",
    }
    try:
        if dtype in supported and not getattr(torch.ops.mkldnn, supported[dtype])():
            return False
        conv = FusedConv2d(nn.Conv2d(3, 8, 3), dtype, relu=True)
        x = torch.rand(1, 3, 9, 9)
        with torch.no_grad():
            conv(x)
            conv.add_to(torch.zeros(1, 8, 7, 7, dtype=dtype), x)
    except (AttributeError, RuntimeError, TypeError):
        return False
    return True


class FusedConv2d(nn.Module):
    """A convolution for inference, by oneDNN on a CPU and cuDNN on a GPU, channels last.

    A separate ReLU or sum reads and writes the whole map again. Here it is computed while an
    output is still in a register. Input sizes may vary from call to call.

    Args:
        conv: without a norm. It is not changed.
        dtype: of weights and output.
        relu: whether a ReLU follows.
    """

    def __init__(self, conv: nn.Conv2d, dtype: torch.dtype, *, relu: bool = False) -> None:
        super().__init__()
        weight = conv.weight.detach().to(dtype, memory_format=torch.channels_last)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None
        if conv.bias is not None:
            self.bias = nn.Parameter(conv.bias.detach().to(dtype), requires_grad=False)
        self.relu = relu
        self.kernel_size, self.stride, self.padding = conv.kernel_size, conv.stride, conv.padding
        self.dilation, self.groups = conv.dilation, conv.groups

    def forward(self, x: Tensor) -> Tensor:
        """``(N, C, H, W)`` of any dtype to ``(N, C', H', W')``, channels last."""
        weight, bias, padding, stride, dilation, groups = self._what()
        if x.numel() == 0:  # no detections
            return F.conv2d(x.to(weight.dtype), weight, bias, stride, padding, dilation, groups)
        if weight.is_cuda:
            return self._on_gpu(x, self.relu)
        then = "relu" if self.relu else "none"
        return torch.ops.mkldnn._convolution_pointwise(self._input(x), *self._what(), then, [], "")

    def add_to(self, other: Tensor, x: Tensor) -> Tensor:
        """Adds the convolution of ``x`` to ``other``, in place, then applies the ReLU, if any.

        Args:
            other: of the output's shape and dtype. It is overwritten if it is channels last.
            x: the input.
        """
        other = other.contiguous(memory_format=torch.channels_last)
        if self.weight.is_cuda:
            return self._added_on_gpu(other, x)
        relu = "relu" if self.relu else None
        return torch.ops.mkldnn._convolution_pointwise_.binary(
            other, self._input(x), *self._what(), "add", 1.0, relu, [], None
        )

    def _on_gpu(self, x: Tensor, relu: bool) -> Tensor:
        weight, bias, padding, stride, dilation, groups = self._what()
        x = self._input(x)
        if relu:
            return torch.cudnn_convolution_relu(x, weight, bias, stride, padding, dilation, groups)
        if self._is_product():  # cuBLAS adds the bias in the same pass, cuDNN's convolution not
            cells = F.linear(x.permute(0, 2, 3, 1), weight[:, :, 0, 0], bias)
            return cells.permute(0, 3, 1, 2)
        return F.conv2d(x, weight, bias, stride, padding, dilation, groups)

    def _added_on_gpu(self, other: Tensor, x: Tensor) -> Tensor:
        if self.relu:
            weight, bias, padding, stride, dilation, groups = self._what()
            return torch.cudnn_convolution_add_relu(
                self._input(x), weight, other, 1.0, bias, stride, padding, dilation, groups
            )
        return self._on_gpu(x, relu=False).add_(other)

    def _is_product(self) -> bool:
        """Whether it is a matrix product in half precision. In float32 the rounding differs."""
        return (
            self.weight.dtype != torch.float32
            and self.kernel_size == self.stride == (1, 1)
            and self.padding == (0, 0)
            and self.groups == 1
        )

    def _what(self) -> tuple[Tensor, Tensor | None, list[int], list[int], list[int], int]:
        geometry = (list(self.padding), list(self.stride), list(self.dilation), self.groups)
        return self.weight, self.bias, *geometry

    def _input(self, x: Tensor) -> Tensor:
        return x.to(self.weight.dtype).contiguous(memory_format=torch.channels_last)

    def extra_repr(self) -> str:
        """What print() shows of it."""
        out_channels, in_channels = self.weight.shape[0], self.weight.shape[1] * self.groups
        return (
            f"{in_channels}, {out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}, padding={self.padding}, relu={self.relu}"
        )


class _FusedLinear(nn.Module):
    """A linear layer as a 1x1 convolution, which is faster in oneDNN than in the BLAS."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, relu: bool) -> None:
        super().__init__()
        conv = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=linear.bias is not None)
        conv.weight = nn.Parameter(linear.weight.detach()[:, :, None, None], requires_grad=False)
        conv.bias = linear.bias
        self.conv = FusedConv2d(conv, dtype, relu=relu)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 0:
            return x.new_zeros(0, len(self.conv.weight), dtype=self.conv.weight.dtype)
        rows = x.contiguous()[None, :, None, :].permute(0, 3, 1, 2)  # channels last, not copied
        return self.conv(rows)[0, :, :, 0].t()


def fuse_linears(head: nn.Sequential, dtype: torch.dtype) -> int:
    """Replaces the linear layers of a head, and the ReLUs after them, in place."""
    count = 0
    for name, after in itertools.pairwise([*head._modules, None]):
        linear = head._modules[name]
        if type(linear) is nn.Linear:
            relu = after is not None and type(head._modules[after]) is nn.ReLU
            head._modules[name] = _FusedLinear(linear, dtype, relu)
            if relu:
                head._modules[after] = nn.Identity()
            count += 1
    return count


def fuse_convolutions(module: nn.Module, dtype: torch.dtype) -> int:
    """Replaces the convolutions in a module, and the ReLUs after them, in place.

    Subclasses of other libraries, which may pad by themselves, are not replaced; nor are
    convolutions with a norm or an activation other than ReLU.

    Returns:
        How many were replaced.
    """
    count = 0
    for name, child in list(module._modules.items()):
        if child is not None and _is_plain(child):
            relu = getattr(child, "activation", None) is not None
            module._modules[name] = FusedConv2d(child, dtype, relu=relu)
            count += 1
        elif child is not None:
            count += fuse_convolutions(child, dtype)
    if type(module) is nn.Sequential:
        for name, after in itertools.pairwise(list(module._modules)):
            conv = module._modules[name]
            if isinstance(conv, FusedConv2d) and type(module._modules[after]) is nn.ReLU:
                conv.relu = True
                module._modules[after] = nn.Identity()
    return count


def _is_plain(module: nn.Module) -> bool:
    if type(module) not in (nn.Conv2d, Conv2d, FrozenNormConv2d) or isinstance(module.padding, str):
        return False
    if module.padding_mode != "zeros" or getattr(module, "norm", None) is not None:
        return False
    activation = getattr(module, "activation", None)
    return activation in (None, F.relu) or isinstance(activation, nn.ReLU)

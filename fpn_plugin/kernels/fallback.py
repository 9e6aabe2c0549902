"""Triton if it runs; otherwise plain torch, with one line that says why."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from fpn_plugin.errors import one_line

__all__ = ["triton_or_plain", "triton_runs"]

Result = TypeVar("Result")
_OLDEST = (8, 0)  # compute capability; the oldest that Triton supports
_failed: set[str] = set()


def triton_runs(tensor: Tensor) -> bool:
    """Whether kernels run on a tensor's device: a GPU on which none has failed yet."""
    return tensor.is_cuda and str(tensor.device) not in _failed


def triton_or_plain(
    tensor: Tensor, kernel: Callable[[], Result], plain: Callable[[], Result]
) -> Result:
    """Runs a Triton kernel, or plain torch that computes the same.

    A kernel that cannot run (no Triton, no compiler, a GPU too old) gives one warning of one line,
    and no other is tried on that device. Other errors pass: too little memory, and any error while
    a CUDA graph is captured.

    Args:
        tensor: on the device.
        kernel: imports and launches the kernel.
        plain: computes the same without Triton.
    """
    if not triton_runs(tensor):
        return plain()
    try:
        if torch.cuda.get_device_capability(tensor.device) < _OLDEST:
            raise RuntimeError(f"{torch.cuda.get_device_name(tensor.device)} is too old")
        with torch.cuda.device(tensor.device):
            return kernel()
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many ways
        if torch.cuda.is_current_stream_capturing():
            raise  # the capture may be what fails
        _failed.add(str(tensor.device))
        warnings.warn(
            f"Triton kernels do not run on {tensor.device}, plain torch is used, which is slower "
            f"({type(error).__name__}: {one_line(error)})",
            stacklevel=2,
        )
        return plain()

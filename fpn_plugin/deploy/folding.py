"""Batch norms with fixed statistics, folded into the convolutions before them."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

__all__ = ["fold_batch_norms"]

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d, TorchvisionFrozenBatchNorm2d)


def fold_batch_norms(model: nn.Module, *, example: Tensor | None = None) -> tuple[int, int]:
    """Folds each batch norm into its convolution, in place: w' = w s, b' = (b - mean) s + shift.

    Norms of Detectron2's convolutions, and those that follow a convolution in an nn.Sequential,
    are known to belong to it. Where an example is given, a pass shows which others read just
    what one convolution wrote.

    Args:
        model: in evaluation mode, on any device.
        example: what ``model`` takes, for that pass.

    Returns:
        How many were folded, and how many are left.
    """
    folded = 0
    for module in list(model.modules()):
        norm = getattr(module, "norm", None)
        if isinstance(module, nn.Conv2d) and _is_fixed(norm):
            _fold(module, norm)
            module.norm = None
            folded += 1
        elif type(module) is nn.Sequential:
            names = list(module._modules)
            for name, after in itertools.pairwise(names):
                conv, norm = module._modules[name], module._modules[after]
                if type(conv) is nn.Conv2d and _is_fixed(norm):
                    _fold(conv, norm)
                    module._modules[after] = _what_is_left(norm)
                    folded += 1
    if example is not None:
        folded += _fold_observed(model, example)
    return folded, sum(_is_fixed(module) for module in model.modules())


def _is_fixed(norm: nn.Module | None) -> bool:
    # timm's norms that hold an activation too are subclasses of these, or say so by their "act".
    is_norm = isinstance(norm, _NORMS) or type(norm).__name__ == "FrozenBatchNormAct2d"
    return is_norm and not norm.training and norm.running_mean is not None


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: nn.Module) -> None:
    # In double precision: the folded weight is then the nearest float to the exact one.
    variance, mean = norm.running_var.double(), norm.running_mean.double()
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    bias = 0 if conv.bias is None else conv.bias.double()
    shift = 0 if norm.bias is None else norm.bias.double()
    dtype = conv.weight.dtype
    weight = (conv.weight.double() * scale[:, None, None, None]).to(dtype)
    conv.weight = nn.Parameter(weight, requires_grad=False)
    conv.bias = nn.Parameter(((bias - mean) * scale + shift).to(dtype), requires_grad=False)


def _what_is_left(norm: nn.Module) -> nn.Module:
    if hasattr(norm, "act"):  # of timm's
        return nn.Sequential(norm.drop, norm.act)
    return nn.Identity()


def _fold_observed(model: nn.Module, example: Tensor) -> int:
    writers: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    readers: dict[int, list[nn.Module]] = {}
    pairs: dict[nn.Module, set[nn.Conv2d | None]] = {}
    calls: dict[nn.Conv2d, int] = {}

    def before(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = [each for each in (*inputs, *keywords.values()) if isinstance(each, Tensor)]
        for tensor in given:
            readers.setdefault(id(tensor), []).append(module)
        if _is_fixed(module):
            writer = writers.get(id(given[0])) if given else None
            pairs.setdefault(module, set()).add(writer[0] if writer else None)

    def after(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            calls[module] = calls.get(module, 0) + 1
            writers[id(output)] = (module, output)  # kept, so that no other takes its id

    leaves = [m for m in model.modules() if not any(m.children()) or isinstance(m, _NORMS)]
    leaves += [m for m in model.modules() if _is_fixed(m) and m not in leaves]
    handles = [m.register_forward_pre_hook(before, with_kwargs=True) for m in leaves]
    handles += [m.register_forward_hook(after) for m in leaves]
    try:
        with torch.no_grad():
            expected = model(example)
            outputs = dict(writers.values())
    finally:
        for handle in handles:
            handle.remove()
    found = []
    for norm, convs in pairs.items():
        conv = next(iter(convs))
        alone = conv is not None and len(convs) == 1 and calls[conv] == 1
        if alone and readers[id(outputs[conv])] == [norm]:
            found.append((conv, norm))
    if not found:
        return 0
    before_folding = [
        (conv, conv.weight, conv.bias, norm, *_place_of(model, norm)) for conv, norm in found
    ]
    same = False
    try:
        for conv, _, _, norm, parent, name in before_folding:
            _fold(conv, norm)
            setattr(parent, name, _what_is_left(norm))
        # An addition reads a tensor without being a module: the values show it.
        with torch.no_grad():
            same = _alike(model(example), expected)
    finally:
        if not same:
            for conv, weight, bias, norm, parent, name in before_folding:
                conv.weight, conv.bias = weight, bias
                setattr(parent, name, norm)
    return len(found) if same else 0


def _place_of(model: nn.Module, module: nn.Module) -> tuple[nn.Module, str]:
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is module:
                return parent, name
    raise ValueError("the module is not part of the model")


def _alike(ours: object, theirs: object) -> bool:
    if isinstance(theirs, Tensor):
        return bool((ours - theirs).abs().max() <= 1e-3 * theirs.abs().max().clamp(min=1e-6))
    values = theirs.keys() if isinstance(theirs, dict) else range(len(theirs))
    return all(_alike(ours[key], theirs[key]) for key in values)

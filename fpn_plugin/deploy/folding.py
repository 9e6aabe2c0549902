"""Batch norms with fixed statistics, folded into the convolutions before them."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import torch
from detectron2.layers import FrozenBatchNorm2d
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d as TorchvisionFrozenBatchNorm2d

__all__ = ["fold_batch_norms"]

_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, FrozenBatchNorm2d, TorchvisionFrozenBatchNorm2d)


def fold_batch_norms(model: nn.Module, *, example: Tensor | None = None) -> tuple[int, int]:
    """Folds each batch norm into its convolution, in place: w' = w s, b' = (b - mean) s + shift.

    A norm belongs to a convolution if it is the ``norm`` of Detectron2's class, or follows it in an
    nn.Sequential. With an example, a forward pass finds other norms that read only what one
    convolution wrote.

    Args:
        model: in evaluation mode, on any device.
        example: an input of ``model`` for that pass.

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
                    module._modules[after] = _activation_of(norm)
                    folded += 1
    if example is not None:
        folded += _fold_observed(model, example)
    return folded, sum(_is_fixed(module) for module in model.modules())


def _is_fixed(norm: nn.Module | None) -> bool:
    # timm's norms with an activation are subclasses of these, or of this name.
    is_norm = isinstance(norm, _NORMS) or type(norm).__name__ == "FrozenBatchNormAct2d"
    return is_norm and not norm.training and norm.running_mean is not None


@torch.no_grad()
def _fold(conv: nn.Conv2d, norm: nn.Module) -> None:
    # In double precision, so that the folded weight is the float nearest to the exact one.
    tensors = (conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    weight, bias, mean, variance, *affine = (None if t is None else t.double() for t in tensors)
    folded = fuse_conv_bn_weights(weight, bias, mean, variance, norm.eps, *affine)
    conv.weight, conv.bias = (
        nn.Parameter(each.to(conv.weight.dtype), requires_grad=False) for each in folded
    )


def _activation_of(norm: nn.Module) -> nn.Module:
    if hasattr(norm, "act"):  # of timm's
        return nn.Sequential(norm.drop, norm.act)
    return nn.Identity()


def _fold_observed(model: nn.Module, example: Tensor) -> int:
    """Folds norms that read only what one convolution wrote in a forward pass."""
    writers: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    readers: dict[int, list[nn.Module]] = {}
    pairs: dict[nn.Module, set[nn.Conv2d | None]] = {}

    def before(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        given = [each for each in (*inputs, *keywords.values()) if isinstance(each, Tensor)]
        for tensor in given:
            readers.setdefault(id(tensor), []).append(module)
        if _is_fixed(module):
            writer = writers.get(id(given[0])) if given else None
            pairs.setdefault(module, set()).add(writer[0] if writer else None)

    def after(module: nn.Module, _: tuple[Tensor, ...], output: Tensor) -> None:
        if isinstance(module, nn.Conv2d):
            writers[id(output)] = (module, output)  # kept, so that no other tensor gets its id
            readers[id(output)] = []  # what an earlier tensor of this id was read by

    leaves = [m for m in model.modules() if not any(m.children()) or isinstance(m, _NORMS)]
    leaves += [m for m in model.modules() if _is_fixed(m) and m not in leaves]
    handles = [m.register_forward_pre_hook(before, with_kwargs=True) for m in leaves]
    handles += [m.register_forward_hook(after) for m in leaves]
    try:
        with torch.no_grad():
            expected = model(example)
    finally:
        for handle in handles:
            handle.remove()
    calls = Counter(conv for conv, _ in writers.values())
    outputs = dict(writers.values())
    paths = {module: path for path, module in model.named_modules()}
    before_folding = []
    for norm, (conv, *others) in pairs.items():
        alone = conv is not None and not others and calls[conv] == 1
        if alone and readers[id(outputs[conv])] == [norm]:
            parent, _, name = paths[norm].rpartition(".")
            place = model.get_submodule(parent), name
            before_folding.append((conv, conv.weight, conv.bias, norm, *place))
    if not before_folding:
        return 0
    same = False
    try:
        for conv, _, _, norm, parent, name in before_folding:
            _fold(conv, norm)
            setattr(parent, name, _activation_of(norm))
        # An addition reads a tensor and is no module: then the values differ.
        with torch.no_grad():
            same = _alike(model(example), expected)
    finally:
        if not same:
            for conv, weight, bias, norm, parent, name in before_folding:
                conv.weight, conv.bias = weight, bias
                setattr(parent, name, norm)
    return len(before_folding) if same else 0


def _alike(ours: object, theirs: object) -> bool:
    if isinstance(theirs, Tensor):
        return bool((ours - theirs).abs().max() <= 1e-3 * theirs.abs().max().clamp(min=1e-6))
    values = theirs.keys() if isinstance(theirs, dict) else range(len(theirs))
    return all(_alike(ours[key], theirs[key]) for key in values)

"""A trained detector made fast: folded, fused, in half precision or compiled on request."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from detectron2.modeling import FPN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from torch import Tensor, nn

from fpn_plugin.errors import UserError
from fpn_plugin.modeling import FeaturePyramidNetwork, PyramidROIPooler

from .convolution import can_fuse, fuse_convolutions, fuse_linears
from .folding import fold_batch_norms
from .fused import (
    FusedNeck,
    as_plugin_pyramid,
    fuse_resnets,
    fuse_rpn_heads,
    select_first,
)

__all__ = ["Step", "optimize_for_inference", "steps_of"]

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Step:
    """One thing that was done to a model, or not."""

    name: str
    taken: bool
    detail: str

    def __str__(self) -> str:
        return (
            f"{self.name}: {self.detail}" if self.taken else f"skipped {self.name}: {self.detail}"
        )


def optimize_for_inference(
    model: nn.Module,
    *,
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
    example: Tensor | None = None,
) -> nn.Module:
    """Makes a fast copy of a trained detector, which gives the original's detections.

    Batch norms are folded into convolutions; maps are channels last; on a CPU, convolutions take
    ReLUs and sums into themselves; boxes are pooled by :class:`PyramidROIPooler`; the RPN decodes
    what it selects. A step that cannot be taken is skipped, with a line in the log, and the model
    still runs. Image sizes may vary from call to call.

    Args:
        model: one of Detectron2's architectures with a ``backbone``, built by the plugin or not;
            left untouched.
        dtype: of backbone and heads: float32, which gives the same detections, or bfloat16 or
            float16, which halve memory traffic and round. Box arithmetic stays float32.
        compile: compile the backbone with torch.compile, for any input size. On a CPU this
            replaces fusing.
        example: an image, ``(3, H, W)`` in the model's channel order, values 0 to 255, for a
            first call, which takes longer than later ones; its time is logged.

    Returns:
        The copy, in evaluation mode, without gradients. It is called as the original; checkpoints
        are the original's.

    Raises:
        UserError: a model without a backbone, or a dtype that is none of the three.

    Example::

        >>> predictor = DefaultPredictor(cfg)
        >>> predictor.model = optimize_for_inference(predictor.model, dtype=torch.bfloat16)
    """
    if not isinstance(getattr(model, "backbone", None), nn.Module):
        raise UserError(
            f"{type(model).__name__} has no backbone: optimize_for_inference() takes a whole "
            "Detectron2 model, for example fpn_plugin.model_zoo.get(...) or DefaultPredictor's"
        )
    if dtype not in _DTYPES:
        raise UserError(f"dtype {dtype} is none of float32, bfloat16 and float16")
    steps: list[Step] = []

    def step(name: str, detail: str, *, taken: bool = True) -> None:
        steps.append(Step(name, taken, detail))
        logger.info("%s", steps[-1])

    model = copy.deepcopy(model).eval().requires_grad_(False)
    device = next(model.parameters()).device
    fold(model, step)
    use_plugin_modules(model, step)
    on_cpu = device.type == "cpu"
    if on_cpu and dtype != torch.float32 and not can_fuse(dtype):
        step(str(dtype), "this CPU or this torch has no convolutions in it; float32", taken=False)
        dtype = torch.float32
    fused = False
    if on_cpu and can_fuse(dtype):
        fused = True
        fuse_heads_and_backbone(model, dtype, fuse_backbone=not compile, step=step)
    elif on_cpu:
        step("fusing", "this torch lacks oneDNN's fused convolutions", taken=False)
    if not fused or compile:
        model.backbone.to(memory_format=torch.channels_last)
        step("channels last", "convolutions of the backbone")
    _set_dtypes(model, dtype)
    if dtype != torch.float32:
        step(str(dtype).removeprefix("torch."), "backbone and heads; box arithmetic in float32")
    if compile:
        _compile(model, device, dtype, step)
    model.optimization_steps = steps
    if example is not None:
        started = time.perf_counter()
        with torch.no_grad():
            model([{"image": example}])
        seconds = time.perf_counter() - started
        step("first call", f"{seconds:.1f} s on {example.shape[2]} x {example.shape[1]} px")
    return model


def steps_of(model: nn.Module) -> list[Step]:
    """What :func:`optimize_for_inference` did to a model; nothing for any other."""
    return list(getattr(model, "optimization_steps", ()))


def fold(model: nn.Module, step: Callable[..., None]) -> None:
    """Folds batch norms of all of a model, in place."""
    folded, left = fold_batch_norms(model)
    bottom_up = getattr(model.backbone, "bottom_up", model.backbone)
    if left:
        generator = torch.Generator().manual_seed(0)
        example = torch.randn(1, 3, 128, 128, generator=generator)
        example = example.to(next(model.parameters()).device)
        try:
            more, left = fold_batch_norms(bottom_up, example=example)
            folded += more
        except (RuntimeError, TypeError, ValueError) as error:
            step("folding what no module order shows", str(error).split("\n")[0], taken=False)
    step("folding", f"{folded} batch norms into their convolutions, {left} left")


def use_plugin_modules(model: nn.Module, step: Callable[..., None]) -> None:
    """Puts in the plugin's pyramid and poolers, and an RPN that selects first, in place."""
    if type(model.backbone) is FPN:
        neck = as_plugin_pyramid(model.backbone)
        if neck is None:
            step("fused pyramid", "this FPN pads to squares", taken=False)
        else:
            model.backbone = neck
    poolers = 0
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if type(child) is ROIPooler:
                module._modules[name] = _plugin_pooler(child)
                poolers += 1
        if type(module) is RPN:
            select_first(module)
            step("proposals", "selected before they are decoded")
    if poolers:
        step("pooling", f"{poolers} poolers replaced by PyramidROIPooler")


def _plugin_pooler(pooler: ROIPooler) -> PyramidROIPooler:
    first = pooler.level_poolers[0]
    name = {"ROIAlign": "ROIAlign", "RoIPool": "ROIPool", "ROIAlignRotated": "ROIAlignRotated"}
    kind = name[type(first).__name__]
    if kind == "ROIAlign" and first.aligned:
        kind = "ROIAlignV2"
    return PyramidROIPooler(
        pooler.output_size,
        [level.spatial_scale for level in pooler.level_poolers],
        getattr(first, "sampling_ratio", 0),
        kind,
        pooler.canonical_box_size,
        pooler.canonical_level,
    )


def fuse_heads_and_backbone(
    model: nn.Module, dtype: torch.dtype, *, fuse_backbone: bool, step: Callable[..., None]
) -> None:
    """Fuses what runs on a CPU, in place."""
    heads = fuse_rpn_heads(model, dtype)
    blocks = convs = 0
    backbone = model.backbone
    if fuse_backbone:
        blocks = fuse_resnets(model, dtype)
        convs = fuse_convolutions(backbone, dtype)
        if type(backbone) is FeaturePyramidNetwork:
            model.backbone = FusedNeck(backbone)
    for name, child in model.named_children():
        if name != "backbone":
            convs += fuse_convolutions(child, dtype)
    linears = sum(
        fuse_linears(module, dtype)
        for module in list(model.modules())
        if isinstance(module, FastRCNNConvFCHead)
    )
    others = f"{convs} other convolutions, {linears} linear layers"
    step("fusing", f"{blocks} residual blocks, {heads} RPN heads, {others}")


def _set_dtypes(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts the input of backbone and heads to a dtype, and the output of heads to float32."""
    model.backbone.to(dtype)
    model.backbone.register_forward_pre_hook(
        lambda _, inputs: (
            inputs[0].to(dtype).contiguous(memory_format=torch.channels_last),
            *inputs[1:],
        )
    )
    if dtype == torch.float32:
        return
    heads = getattr(model, "roi_heads", None)
    box_heads = getattr(heads, "box_head", None)
    whole = [
        getattr(getattr(model, "proposal_generator", None), "rpn_head", None),
        getattr(model, "head", None),
        getattr(heads, "res5", None),
        *(box_heads if isinstance(box_heads, nn.ModuleList) else [box_heads]),
    ]
    for head in whole:
        if isinstance(head, nn.Module):
            head.to(dtype)
            head.register_forward_pre_hook(lambda _, inputs: _cast(inputs, dtype))
            head.register_forward_hook(lambda _, __, output: _cast(output, torch.float32))
    # These compute losses or detections after their layers, in float32.
    for owner, name in ((heads, "mask_head"), (heads, "keypoint_head"), (model, "sem_seg_head")):
        head = getattr(owner, name, None)
        if isinstance(head, nn.Module) and callable(getattr(head, "layers", None)):
            head.to(dtype)
            head.layers = _casting(head.layers, dtype)


def _casting(layers: Callable[[Any], Tensor], dtype: torch.dtype) -> Callable[[Any], Tensor]:
    return lambda x: layers(_cast(x, dtype)).float()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _cast(each, dtype) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cast(each, dtype) for each in value)
    return value


def _compile(
    model: nn.Module, device: torch.device, dtype: torch.dtype, step: Callable[..., None]
) -> None:
    backbone = model.backbone
    original = backbone.forward
    # Frozen weights may be laid out anew and folded further.
    options = {"freezing": True} if device.type == "cpu" else None
    side = max(256, 4 * backbone.size_divisibility)
    sizes = [(side, side), (side, 2 * side)]
    started = time.perf_counter()
    try:
        backbone.forward = torch.compile(original, dynamic=True, options=options)
        with torch.no_grad():
            for height, width in sizes:
                backbone(torch.zeros(1, 3, height, width, device=device, dtype=dtype))
    except Exception as error:  # whatever a missing compiler or an unsupported operator raises
        backbone.forward = original
        reason = str(error).strip().split("\n")[0]
        step("compiling", f"{type(error).__name__}: {reason}", taken=False)
        return
    step("compiling", f"the backbone, in {time.perf_counter() - started:.0f} s")

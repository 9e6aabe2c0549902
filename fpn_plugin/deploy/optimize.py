"""A fast copy of a trained detector: folded, fused, on request compiled or in half precision."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from detectron2.modeling import FPN, GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.roi_heads import FastRCNNConvFCHead
from torch import Tensor, nn

from fpn_plugin.errors import UserError, one_line
from fpn_plugin.modeling import FeaturePyramidNetwork, PyramidROIPooler, image_channels

from .convolution import can_fuse, fuse_convolutions, fuse_linears
from .folding import fold_batch_norms
from .fused import FusedNeck, as_plugin_pyramid, fuse_resnets, fuse_rpn_heads, select_first
from .graphs import GraphLimits, use_graphs

__all__ = ["Step", "dtype_name", "dtype_of", "optimize_for_inference", "print_steps", "steps_of"]

logger = logging.getLogger(__name__)

_Note = Callable[..., None]
"""``note(name, detail, taken=True)`` records a step."""


@dataclass(frozen=True)
class Step:
    """A step of the optimizer, taken or skipped. ``detail`` says what was done, or why not."""

    name: str
    taken: bool
    detail: str

    def __str__(self) -> str:
        return f"{'' if self.taken else 'skipped '}{self.name}: {self.detail}"


def optimize_for_inference(
    model: nn.Module,
    *,
    dtype: torch.dtype = torch.float32,
    compile: bool = False,
    example: Tensor | None = None,
    graphs: GraphLimits | None = GraphLimits(),  # noqa: B008  # frozen
    tf32: bool | None = None,
) -> nn.Module:
    """Makes a fast copy of a trained detector, which gives the original's detections.

    Batch norms are folded into convolutions. Maps are channels last. Convolutions include the ReLU
    or sum that follows them. Boxes are pooled by :class:`PyramidROIPooler`. The RPN decodes only
    what it selects. A step that fails is skipped, with a warning in the log, and the model still
    runs. Image sizes may vary from call to call.

    Args:
        model: one of Detectron2's architectures with a ``backbone``, built by the plugin or not.
            It is not changed. It must not be an optimised copy.
        dtype: of backbone and heads. float32 gives the same detections. bfloat16 and float16
            halve memory traffic and round. Box arithmetic stays float32.
        compile: compile the backbone with torch.compile, for any number and size of images. On a
            CPU this replaces fusing it. A deep or saved copy of the model runs uncompiled. See
            docs/performance.md for what is compiled again.
        example: an image, ``(C, H, W)`` in the model's channel order, values 0 to 255, for a
            first call, which takes longer than later ones. Its time is logged.
        graphs: on a GPU, the limits of CUDA graphs; None for no graphs. A graph holds the model
            from image to detections for one padded size and number of images. It is captured on
            first use. ``model.graphs.counts`` says how often graphs were used.
        tf32: on a GPU, whether convolutions and products may round float32 to TF32. None keeps
            torch's settings, which allow it in convolutions. See docs/performance.md for its
            effect on detections.

    Returns:
        The copy, in evaluation mode, without gradients. It is called as the original. It may be
        copied, and saved whole. Checkpoints are the original's.

    Raises:
        UserError: the model has no backbone or is optimised already, the dtype is none of the
            three, or the example does not fit the model.

    Example::

        >>> predictor = DefaultPredictor(cfg)
        >>> predictor.model = optimize_for_inference(predictor.model, dtype=torch.bfloat16)
    """
    _check(model, dtype, example)
    device = next(model.parameters()).device
    on_cpu = device.type == "cpu"
    work = _Work(copy.deepcopy(model).eval().requires_grad_(False))
    work.attempt("folding", fold)
    work.attempt("folding what no module order shows", fold_observed)
    for name, action in PLUGIN_STEPS.items():
        work.attempt(name, action)
    if on_cpu and dtype != torch.float32 and not can_fuse(dtype, device):
        work.note(str(dtype), "this CPU or this torch has no convolutions in it; float32", False)
        dtype = torch.float32
    if dtype != torch.float32:
        work.attempt(_name(dtype), partial(_set_dtypes, dtype=dtype))
        dtype = dtype_of(work.model)
    fusable = can_fuse(dtype, device)
    if fusable:
        work.attempt("fusing heads", partial(fuse_heads, dtype=dtype))
    elif on_cpu:
        work.note("fusing", "this torch lacks oneDNN's fused convolutions", False)
    # A compiled backbone is not fused. If compiling fails, it is.
    if not (compile and work.attempt("compiling", _compile)):
        if fusable:
            work.attempt("fusing the backbone", partial(fuse_backbone, dtype=dtype))
        work.attempt("channels last", _set_layout)
    if not on_cpu and graphs is not None:
        work.attempt("CUDA graphs", partial(_use_graphs, limits=graphs, tf32=tf32))
    model = work.model
    model.optimization_steps = work.steps
    if example is not None:
        started = time.perf_counter()
        with torch.no_grad():
            model([{"image": example}])
        seconds = time.perf_counter() - started
        work.note("first call", f"{seconds:.1f} s on {example.shape[2]} x {example.shape[1]} px")
    return model


def steps_of(model: nn.Module) -> list[Step]:
    """The steps of :func:`optimize_for_inference`; empty if the model is not optimised."""
    return list(getattr(model, "optimization_steps", ()))


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that a model's backbone runs in. It may differ from the requested one."""
    return next(model.backbone.parameters()).dtype


def dtype_name(model: nn.Module) -> str:
    """The dtype that a model's backbone runs in, as "bfloat16"."""
    return _name(dtype_of(model))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def print_steps(model: nn.Module) -> None:
    """Prints the steps of an optimised model; prints nothing for another model."""
    if steps_of(model):
        print(f"optimised, {dtype_name(model)}:", *steps_of(model), sep="\n  ")


def _check(model: nn.Module, dtype: torch.dtype, example: Tensor | None) -> None:
    kind = type(model).__name__
    if not isinstance(getattr(model, "backbone", None), nn.Module):
        raise UserError(
            f"{kind} has no backbone: optimize_for_inference() takes a whole "
            "Detectron2 model, for example fpn_plugin.model_zoo.get(...) or DefaultPredictor's"
        )
    if steps_of(model):
        raise UserError(
            f"this {kind} is an optimised copy already, in {dtype_name(model)}: give the model it "
            "was made of"
        )
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"dtype {dtype} is none of float32, bfloat16 and float16")
    if example is None:
        return
    channels = image_channels(model)
    if not isinstance(example, Tensor) or example.ndim != 3 or example.shape[0] != channels:
        what = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise UserError(
            f"example is {what}; it must be one image, a tensor ({channels}, H, W) of values 0 to "
            "255"
        )
    if isinstance(model, GeneralizedRCNN) and model.proposal_generator is None:
        raise UserError(
            "example is an image, but this Fast R-CNN reads proposals as well: leave example out"
        )


class _Work:
    """A model and the steps done to it. A step that fails leaves the model as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.steps: list[Step] = []

    def note(self, name: str, detail: str, taken: bool = True) -> None:
        """Records and logs a step. A skipped step is a warning."""
        self.steps.append(Step(name, taken, detail))
        logger.log(logging.INFO if taken else logging.WARNING, "%s", self.steps[-1])

    def attempt(self, name: str, action: Callable[[nn.Module, _Note], None]) -> bool:
        """Takes a step. If it raises, the model stays as before, and the step is skipped."""
        # A copy that shares the weights: steps replace tensors and never write into one.
        memo: dict[int, Any] = {id(each): each.detach() for each in self.model.buffers()}
        for each in self.model.parameters():
            memo[id(each)] = nn.Parameter(each.detach(), requires_grad=False)
        before = copy.deepcopy(self.model, memo)
        noted: list[tuple[str, str, bool]] = []
        try:
            action(self.model, lambda *what, taken=True: noted.append((*what, taken)))
        except Exception as error:  # a model of other libraries may raise anything
            self.model = before
            noted = [(name, f"{type(error).__name__}: {one_line(error)}", False)]
        for what in noted:
            self.note(*what)
        return all(taken for *_, taken in noted)


def fold(model: nn.Module, note: _Note) -> None:
    """Folds the batch norms that stand next to their convolution among the modules, in place."""
    folded, left = fold_batch_norms(model)
    note("folding", f"{folded} batch norms into their convolutions, {left} left")


def fold_observed(model: nn.Module, note: _Note) -> None:
    """Folds other batch norms of the bottom-up network, found by a forward pass, in place."""
    bottom_up = getattr(model.backbone, "bottom_up", model.backbone)
    if not fold_batch_norms(bottom_up)[1]:
        return
    generator = torch.Generator().manual_seed(0)
    example = torch.randn(1, image_channels(model), 128, 128, generator=generator)
    folded, _ = fold_batch_norms(bottom_up, example=example.to(next(model.parameters()).device))
    _, left = fold_batch_norms(model)
    note("folding what a pass shows", f"{folded} batch norms more, {left} left")


def use_plugin_pyramid(model: nn.Module, note: _Note) -> None:
    """Replaces a stock pyramid by the plugin's, in place."""
    if type(model.backbone) is FPN:
        neck = as_plugin_pyramid(model.backbone)
        if neck is None:
            note("fused pyramid", "this FPN pads to squares", taken=False)
        else:
            model.backbone = neck


def use_plugin_poolers(model: nn.Module, note: _Note) -> None:
    """Replaces stock poolers by the plugin's, in place."""
    poolers = 0
    for module in list(model.modules()):
        for name, child in list(module._modules.items()):
            if type(child) is ROIPooler:
                module._modules[name] = _plugin_pooler(child)
                poolers += 1
    if poolers:
        note("pooling", f"{poolers} poolers replaced by PyramidROIPooler")


def select_before_decoding(model: nn.Module, note: _Note) -> None:
    """Makes RPNs decode only what they select, in place."""
    for module in model.modules():
        if type(module) is RPN:
            select_first(module)
            note("proposals", "selected before they are decoded")


PLUGIN_STEPS: dict[str, Callable[[nn.Module, _Note], None]] = {
    "fused pyramid": use_plugin_pyramid,
    "pooling": use_plugin_poolers,
    "proposals": select_before_decoding,
}
"""The steps that put the plugin's modules into a model, by name."""


def _plugin_pooler(pooler: ROIPooler) -> PyramidROIPooler:
    first = pooler.level_poolers[0]
    kind = type(first).__name__.replace("RoIPool", "ROIPool")  # torchvision's spelling
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


def fuse_heads(model: nn.Module, note: _Note, *, dtype: torch.dtype) -> None:
    """Fuses the layers outside the backbone, in place."""
    heads = fuse_rpn_heads(model, dtype)
    convs = sum(
        fuse_convolutions(child, dtype)
        for name, child in model.named_children()
        if name != "backbone"
    )
    linears = sum(
        fuse_linears(module, dtype)
        for module in list(model.modules())
        if isinstance(module, FastRCNNConvFCHead) and not next(module.parameters()).is_cuda
    )
    others = f"{convs} other convolutions, {linears} linear layers"
    note("fusing heads", f"{heads} RPN heads, {others}")


def fuse_backbone(model: nn.Module, note: _Note, *, dtype: torch.dtype) -> None:
    """Fuses the layers of the backbone, in place."""
    blocks = fuse_resnets(model, dtype)
    convs = fuse_convolutions(model.backbone, dtype)
    if type(model.backbone) is FeaturePyramidNetwork:
        model.backbone = FusedNeck(model.backbone)
    note("fusing the backbone", f"{blocks} residual blocks, {convs} other convolutions")


def _set_layout(model: nn.Module, note: _Note) -> None:
    """Makes the backbone's weights and input channels last, in place."""
    model.backbone.to(memory_format=torch.channels_last)
    model.backbone.register_forward_pre_hook(_first_channels_last)
    note("channels last", "convolutions of the backbone")


def _set_dtypes(model: nn.Module, note: _Note, *, dtype: torch.dtype) -> None:
    """Casts the input of backbone and heads to a dtype, and the output of heads to float32."""
    # Hooks are module-level functions, so that copies of the model do not call this one's.
    model.backbone.to(dtype).register_forward_pre_hook(partial(_cast_inputs, dtype=dtype))
    heads = getattr(model, "roi_heads", None)
    box_heads = getattr(heads, "box_head", None)
    generator = getattr(model, "proposal_generator", None)
    whole = [
        getattr(generator, "rpn_head", None),
        *getattr(generator, "heads", ()),  # of SegmentProposals
        getattr(model, "head", None),
        getattr(heads, "res5", None),
        *(box_heads if isinstance(box_heads, nn.ModuleList) else [box_heads]),
    ]
    for head in whole:
        if isinstance(head, nn.Module):
            head.to(dtype)
            head.register_forward_pre_hook(partial(_cast_inputs, dtype=dtype))
            head.register_forward_hook(_float_output)
    # After their layers, these compute losses or detections, in float32.
    for owner, name in ((heads, "mask_head"), (heads, "keypoint_head"), (model, "sem_seg_head")):
        head = getattr(owner, name, None)
        if isinstance(head, nn.Module) and callable(getattr(head, "layers", None)):
            head.to(dtype)
            head.layers = partial(_layers_in, type(head).layers, head, dtype)
    note(_name(dtype), "backbone and heads; box arithmetic in float32")


def _use_graphs(model: nn.Module, note: _Note, *, limits: GraphLimits, tf32: bool | None) -> None:
    """Makes the model run as CUDA graphs, in place."""
    use_graphs(model, limits, tf32)
    note("CUDA graphs", f"of up to {limits.graphs} sizes and {limits.gigabytes:g} GiB")


def _first_channels_last(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return inputs[0].contiguous(memory_format=torch.channels_last), *inputs[1:]


def _cast_inputs(_: nn.Module, inputs: Any, *, dtype: torch.dtype) -> Any:
    return _cast(inputs, dtype)


def _float_output(_: nn.Module, __: Any, output: Any) -> Any:
    return _cast(output, torch.float32)


def _layers_in(
    layers: Callable[[nn.Module, Any], Tensor], head: nn.Module, dtype: torch.dtype, x: Any
) -> Tensor:
    return layers(head, _cast(x, dtype)).float()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {key: _cast(each, dtype) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_cast(each, dtype) for each in value)
    return value


def _compile(model: nn.Module, note: _Note) -> None:
    """Compiles the backbone, in place, for every size of images."""
    started = time.perf_counter()
    _set_layout(model, lambda *_: None)
    backbone = model.backbone
    weight = next(backbone.parameters())
    # The compiler may fold frozen weights and change their layout.
    options = {"freezing": True} if weight.device.type == "cpu" else None
    backbone.compile(dynamic=True, options=options)
    # The compiler takes equal sizes, and sizes of 1, as fixed until it gets others.
    side = max(256, 4 * backbone.size_divisibility)
    sizes = [(1, side, 2 * side), (1, 3 * side, 2 * side), (2, side, 2 * side)]
    with torch.no_grad():
        for images, height, width in sizes:
            backbone(weight.new_zeros(images, image_channels(model), height, width))
    note("compiling", f"the backbone, in {time.perf_counter() - started:.0f} s")

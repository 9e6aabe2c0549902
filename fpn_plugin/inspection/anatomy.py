"""The levels, anchors and box sizes of a model, and its parts' parameters and multiply-adds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fpn_plugin.modeling import SegmentProposals, image_channels

from .level_observer import box_pooling

__all__ = ["Anatomy", "Level", "Part", "SizeRange", "anatomy"]

_DEFAULT_ROIS = 1000  # of a box head without an RPN


@dataclass(frozen=True)
class Level:
    """A map of the backbone at a given input size.

    Attributes:
        name: "p2", or "res4".
        stride: in pixels of the network's input.
        channels: of its features.
        height, width: in cells.
        anchors_per_cell: 0 on a level without anchors.
        anchor_sizes: square roots of the anchors' areas, in pixels of the network's input.
        anchor_ratios: height / width of the anchors.
        pooled: whether the box head pools regions from it.
    """

    name: str
    stride: int
    channels: int
    height: int
    width: int
    anchors_per_cell: int
    anchor_sizes: tuple[float, ...]
    anchor_ratios: tuple[float, ...]
    pooled: bool

    @property
    def anchors(self) -> int:
        """How many anchors an image has on it."""
        return self.height * self.width * self.anchors_per_cell


@dataclass(frozen=True)
class Part:
    """A part of a model.

    Attributes:
        name: for example "bottom-up".
        parameters: numbers, frozen ones too, without buffers.
        trained: parameters that have a gradient.
        multiply_adds: of convolutions and matrix products, for one image; each is two FLOPs.
    """

    name: str
    parameters: int
    trained: int
    multiply_adds: int


@dataclass(frozen=True)
class SizeRange:
    """Boxes that Eq. (1) sends to a level: ``low <= sqrt(w h) < high``, in pixels of the input."""

    level: str
    stride: int
    low: float
    high: float


@dataclass(frozen=True)
class Anatomy:
    """Levels, parts and box sizes of a model at an input size.

    Attributes:
        input_size: height and width, in pixels, as given.
        padded_size: of the network's input, padded to the coarsest stride.
        rois: number of regions in the box head's multiply-adds.
        detections: number of regions in those of the mask and keypoint heads.
        levels: finest first.
        parts: in the order of the forward pass; together the whole model.
        sizes: by level, finest first; empty for models that pool no regions.
        canonical: k0 and s0 of Eq. (1); None for models that do not use it.
    """

    input_size: tuple[int, int]
    padded_size: tuple[int, int]
    rois: int
    detections: int
    levels: tuple[Level, ...]
    parts: tuple[Part, ...]
    sizes: tuple[SizeRange, ...]
    canonical: tuple[int, float] | None


def anatomy(
    model: nn.Module,
    input_size: tuple[int, int],
    rois: int | None = None,
    detections: int | None = None,
) -> Anatomy:
    """Lists the levels and parts of a model, and sets the model to evaluation mode.

    Args:
        model: any of Detectron2's architectures; weights do not matter.
        input_size: height and width of an image after resizing.
        rois: regions of the box head; by default, the RPN's largest number of proposals.
        detections: regions of mask and keypoint heads; by default, the largest number of
            detections.
    """
    model.eval()
    heads = getattr(model, "roi_heads", None)
    rpn = getattr(model, "proposal_generator", None)
    if rois is None:
        rois = rpn.post_nms_topk[False] if hasattr(rpn, "post_nms_topk") else _DEFAULT_ROIS
    if detections is None:
        detections = _most_detections(model)
    divisor = max(model.backbone.size_divisibility, 1)
    padded = tuple(math.ceil(side / divisor) * divisor for side in input_size)
    device = next(model.parameters()).device
    image = torch.zeros(1, image_channels(model), *padded, device=device)
    with torch.no_grad():
        maps = model.backbone(image)
    pooled, pooler = box_pooling(heads) if heads is not None else ([], None)
    many = len(pooled) > 1
    return Anatomy(
        input_size=input_size,
        padded_size=padded,
        rois=rois if heads is not None else 0,
        detections=detections,
        levels=tuple(_levels(model, maps, pooled)),
        parts=tuple(_parts(model, image, maps, rois, detections)),
        sizes=tuple(_size_ranges(pooled, pooler)) if many else (),
        canonical=(pooler.canonical_level, pooler.canonical_box_size) if many else None,
    )


def _most_detections(model: nn.Module) -> int:
    predictor = getattr(getattr(model, "roi_heads", None), "box_predictor", None)
    if isinstance(predictor, nn.ModuleList):
        predictor = predictor[-1]
    most = getattr(predictor, "test_topk_per_image", None)
    return most if most is not None else getattr(model, "max_detections_per_image", 0)


def _levels(model: nn.Module, maps: dict[str, Tensor], pooled: Sequence[str]) -> Iterable[Level]:
    shapes = model.backbone.output_shape()
    rpn = getattr(model, "proposal_generator", None)
    generator = getattr(rpn, "anchor_generator", getattr(model, "anchor_generator", None))
    readers = list(getattr(rpn, "in_features", getattr(model, "head_in_features", [])))
    for name, features in sorted(maps.items(), key=lambda item: shapes[item[0]].stride):
        cell = torch.zeros(0, 4)
        if generator is not None and name in readers:
            anchors = list(generator.cell_anchors)
            cell = anchors[readers.index(name)].cpu() if anchors else cell
        width, height = (cell[:, 2] - cell[:, 0]).double(), (cell[:, 3] - cell[:, 1]).double()
        yield Level(
            name=name,
            stride=shapes[name].stride,
            channels=features.shape[1],
            height=features.shape[2],
            width=features.shape[3],
            anchors_per_cell=len(cell),
            anchor_sizes=tuple(sorted({round(v, 1) for v in (width * height).sqrt().tolist()})),
            anchor_ratios=tuple(sorted({round(v, 2) for v in (height / width).tolist()})),
            pooled=name in pooled,
        )


def _size_ranges(names: Sequence[str], pooler: nn.Module) -> Iterable[SizeRange]:
    for level, name in enumerate(names, start=pooler.min_level):
        low = pooler.canonical_box_size * 2.0 ** (level - pooler.canonical_level)
        high = math.inf if name == names[-1] else 2 * low
        yield SizeRange(name, 2**level, 0.0 if name == names[0] else low, high)


def _parts(
    model: nn.Module, image: Tensor, maps: dict[str, Tensor], rois: int, detections: int
) -> Iterable[Part]:
    backbone = model.backbone
    bottom_up = getattr(backbone, "bottom_up", None)
    if bottom_up is None:
        named = [("backbone", [backbone], _multiply_adds(backbone, image))]
    else:
        runs: list[Tensor] = []  # an image pyramid runs its network several times
        hook = bottom_up.register_forward_pre_hook(lambda _, inputs: runs.append(inputs[0]))
        whole = _multiply_adds(backbone, image)
        hook.remove()
        below = sum(_multiply_adds(bottom_up, run) for run in runs)
        neck = [child for child in backbone.children() if child is not bottom_up]
        named = [("bottom-up", [bottom_up], below), ("neck", neck, whole - below)]
    rpn = getattr(model, "proposal_generator", None)
    if isinstance(rpn, SegmentProposals):
        inputs = [maps[name] for name in rpn.in_features]
        work = sum(_multiply_adds(head, level) for head in rpn.heads for level in inputs)
        # Masks are computed for the proposals only.
        work += rpn.topk_test * rpn.heads[0].mask.weight.numel()
        named.append(("segment heads", [rpn], work))
    elif rpn is not None:
        inputs = [maps[name] for name in rpn.in_features]
        named.append(("RPN", [rpn], _multiply_adds(rpn.rpn_head, inputs)))
    if hasattr(model, "head_in_features"):  # RetinaNet and its like
        inputs = [maps[name] for name in model.head_in_features]
        named.append(("dense head", [model.head], _multiply_adds(model.head, inputs)))
    if hasattr(model, "sem_seg_head"):
        head = model.sem_seg_head
        named.append(("semantic head", [head], _multiply_adds(head.layers, maps)))
    if getattr(model, "roi_heads", None) is not None:
        named += _head_parts(model.roi_heads, maps, rois, detections)
    seen: set[int] = set()
    for name, modules, work in named:
        parameters = [p for module in modules for p in module.parameters() if id(p) not in seen]
        seen.update(map(id, parameters))
        yield _part(name, parameters, work)
    rest = [p for p in model.parameters() if id(p) not in seen]
    if rest:
        yield _part("rest", rest, 0)


def _part(name: str, parameters: Sequence[nn.Parameter], multiply_adds: int) -> Part:
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    return Part(name, sum(p.numel() for p in parameters), trained, multiply_adds)


def _head_parts(
    heads: nn.Module, maps: dict[str, Tensor], rois: int, detections: int
) -> list[tuple[str, list[nn.Module], int]]:
    names, pooler = box_pooling(heads)
    features = maps[names[0]]

    def regions(count: int, pooler: nn.Module) -> Tensor:
        return features.new_zeros(count, features.shape[1], *pooler.output_size)

    if hasattr(heads, "res5"):  # Res5ROIHeads: conv5 for boxes, and again for masks
        modules = [heads.res5, heads.box_predictor]
        work = _multiply_adds(
            lambda x: heads.box_predictor(heads.res5(x).mean(dim=[2, 3])), regions(rois, pooler)
        )
    else:
        stages = list(zip(_as_list(heads.box_head), _as_list(heads.box_predictor), strict=True))
        modules = [module for stage in stages for module in stage]
        work = sum(_multiply_adds(nn.Sequential(*each), regions(rois, pooler)) for each in stages)
    parts = [("box head", modules, work)]
    for kind in ("mask", "keypoint"):
        head = getattr(heads, f"{kind}_head", None)
        if not getattr(heads, f"{kind}_on", False) or head is None:
            continue
        given = regions(detections, getattr(heads, f"{kind}_pooler", None) or pooler)
        shared = getattr(heads, "res5", nn.Identity())
        work = _multiply_adds(lambda x, h=head, shared=shared: h.layers(shared(x)), given)
        parts.append((f"{kind} head", [head], work))
    return parts


def _as_list(module: nn.Module) -> list[nn.Module]:
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def _multiply_adds(function: Callable[[Any], Any], inputs: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        function(inputs)
    return counter.get_total_flops() // 2  # torch counts each as two FLOPs

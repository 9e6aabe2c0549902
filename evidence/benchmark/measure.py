"""The measurements on a CPU."""

from __future__ import annotations

import copy
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity

from fpn_plugin.deploy import optimize_for_inference, steps_of
from fpn_plugin.deploy.comparison import Agreement
from fpn_plugin.deploy.convolution import FusedConv2d
from fpn_plugin.deploy.optimize import PLUGIN_STEPS, fold
from fpn_plugin.errors import UserError
from fpn_plugin.modeling import PyramidROIPooler

from .models import (
    photograph,
    plugin_model,
    proposals_of,
    spread_boxes,
    stock_model,
    torchvision_model,
    training_batch,
)
from .timing import Comparison, compare, seconds_of

__all__ = ["MIB", "SCALINGS", "Bench", "memory", "peak", "scaling"]

MIB = 2**20  # bytes
_PROPOSALS = 1000
_MOST_OPERATORS = 15  # of a profile, by name
_LEVELS = ("p2", "p3", "p4", "p5")


class Bench:
    """Comparisons at one image size, on one device.

    Args:
        device: "cpu" or "cuda".
        image: as :func:`photograph` returns it.
        pairs: timed pairs of each comparison.
        proposals: the least number that must be pooled.
        opts: config keys of the models, dots written as two underscores.

    Raises:
        UserError: fewer proposals are pooled.
    """

    def __init__(
        self, device: str, image: Tensor, pairs: int, *, proposals: int = _PROPOSALS, **opts: Any
    ) -> None:
        self.device, self.image, self.pairs, self._opts = device, image, pairs, opts
        self.stock = stock_model(device, image, **opts)
        self.inputs = [{"image": image}]
        self.half = torch.bfloat16 if device == "cpu" else torch.float16
        with torch.no_grad(), proposals_of(self.stock) as pooled:
            self.stock(self.inputs)
        (self.proposals,) = pooled
        count = sum(map(len, self.proposals))
        if count < proposals:
            raise UserError(
                f"only {count} proposals are pooled of this image of {image.shape[2]} x "
                f"{image.shape[1]} px, and {proposals} are needed to time pooling: give a larger "
                "--size, or --image a photograph with more in it"
            )
        self.first_calls: dict[str, float] = {}
        self.fast = self._made(torch.float32)
        self.fast_half = self._made(self.half)

    def _made(self, dtype: torch.dtype, compile: bool = False) -> nn.Module:
        """An optimised copy after its first call. Records the seconds of both."""
        started = time.perf_counter()
        model = optimize_for_inference(self.stock, dtype=dtype, compile=compile)
        made = time.perf_counter() - started
        name = ("compiled " if compile else "") + str(dtype).removeprefix("torch.")
        self.first_calls[f"{name}: making"] = made
        self.first_calls[f"{name}: first call"] = seconds_of(self._call(model))
        return model

    def differences(self) -> dict[str, float]:
        """Compares the optimised float32 copy's detections with stock's, see :class:`Agreement`."""
        agreement = Agreement()
        with torch.no_grad():
            theirs, ours = (
                model(self.inputs)[0]["instances"].to("cpu") for model in (self.stock, self.fast)
            )
        agreement.add(theirs, ours)
        return {"detections": len(theirs), **vars(agreement)}

    def comparisons(self) -> Iterator[Comparison]:
        """Each against stock Detectron2 on the same weights, then against torchvision's model."""
        stock, fast = self._call(self.stock), self._call(self.fast)
        half = str(self.half).removeprefix("torch.")
        yield self._compare("Faster R-CNN R50-FPN, float32", stock, fast, 1.8)
        yield self._compare(f"the same, {half}", stock, self._call(self.fast_half), 3.2)
        yield self._neck()
        spread = spread_boxes(len(self.proposals[0]), *self.image.shape[1:])
        for name, boxes in (("RPN's", self.proposals[0]), ("12 to 400 px", spread)):
            yield self._pooler(name, boxes.to(self.device), torch.contiguous_format, 4.0)
            yield self._pooler(name, boxes.to(self.device), torch.channels_last, None)
        other = torchvision_model(self.device, *self.image.shape[1:])
        picture = [(self.image.flip(0) / 255).to(self.device)]
        calls = no_grad(lambda: other(picture)), fast
        yield compare("Faster R-CNN R50-FPN, float32", "torchvision", *calls, pairs=self.pairs)

    def figures(self, part: str) -> Iterator[tuple[str, Any]]:
        """Further measurements after the comparisons of a part, by their names in the report."""
        if part == "comparisons":
            yield "bare_convolutions", self.convolution_seconds()

    def training(self) -> Iterator[Comparison]:
        """Each against stock Detectron2; then inference in the memory that training leaves.

        The allocator keeps that memory, and the system need not provide it again. Stock gains more
        from this: its temporaries are larger and more.
        """
        yield self._pooler_training()
        yield self._training()
        half = str(self.half).removeprefix("torch.")
        for dtype, model in (("float32", self.fast), (half, self.fast_half)):
            yield self._compare(f"inference after it, {dtype}", *self._calls(model), None)

    def steps(self) -> Iterator[Comparison]:
        """The gain of each step of the optimizer, one after the other, and of compiling instead."""

        def ignore(*_: object, **__: object) -> None:
            """Ignores the record of a step."""

        model = copy.deepcopy(self.stock)
        fold(model, ignore)
        yield self._compare("batch norms folded", *self._calls(model), None)
        for put_in in PLUGIN_STEPS.values():
            put_in(model, ignore)
        yield self._compare("+ pooling, decoding what is selected", *self._calls(model), None)
        yield self._compare("+ fused convolutions, channels last", *self._calls(self.fast), None)
        half = f"+ {self.half}".replace("torch.", "")
        yield self._compare(half, *self._calls(self.fast_half), None)
        for dtype in (torch.float32, self.half):
            model = self._made(dtype, compile=True)
            name = f"compiled instead of fused, {dtype}".replace("torch.", "")
            compiled = any(each.name == "compiling" and each.taken for each in steps_of(model))
            if compiled:
                yield self._compare(name, *self._calls(model), None)

    def convolution_calls(self) -> Callable[[], object]:
        """Calls every convolution and matrix product of the optimised float32 model.

        These are the model's operators, without the ReLUs and sums fused into them.
        """
        return calls_of(bare_convolutions(self.fast, self.inputs))

    def convolution_seconds(self) -> dict[str, float]:
        """Seconds of the optimised model, and of its convolutions and matrix products one by one.

        The latter may be slower: in the model, convolutions find their input in the cache.
        """
        return self._convolution_seconds(self.fast)

    def _convolution_seconds(self, model: nn.Module) -> dict[str, float]:
        calls = self._call(model), self.convolution_calls()
        pairs = compare("bare convolutions", "whole model", *calls, pairs=self.pairs)
        return {
            "model": statistics.median(pairs.baseline_seconds),
            "convolutions": statistics.median(pairs.seconds),
        }

    def profile(self) -> dict[str, float]:
        """Milliseconds of one call of the optimised float32 model, by operator, largest first.

        Convolutions and matrix products are one row.
        """
        on_gpu = self.device == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        run = self._call(self.fast)
        run()
        with torch.profiler.profile(activities=activities) as profiler:
            run()
        spent = {"convolutions, matrix products": 0.0}
        for event in profiler.key_averages():
            # On a GPU, the time of kernels: in a graph, no operators call them.
            kind = torch.autograd.DeviceType
            if event.device_type != (kind.CUDA if on_gpu else kind.CPU):
                continue
            time_of = "self_device_time_total" if on_gpu else "self_cpu_time_total"
            ms = getattr(event, time_of, 0.0) / 1000
            is_product = re.search(r"conv|addmm|::b?mm|linear|gemm|cutlass|nvjet", event.key)
            name = "convolutions, matrix products" if is_product else event.key[:80]
            spent[name] = spent.get(name, 0.0) + ms
        first, *others = spent
        others.sort(key=spent.__getitem__, reverse=True)
        table = {name: spent[name] for name in (first, *others[:_MOST_OPERATORS])}
        return {**table, "all others": sum(spent[name] for name in others[_MOST_OPERATORS:])}

    def _calls(self, model: nn.Module) -> tuple[Callable[[], object], Callable[[], object]]:
        return self._call(self.stock), self._call(model)

    def _call(self, model: nn.Module) -> Callable[[], object]:
        return no_grad(lambda: model(self.inputs))

    def _compare(
        self, name: str, stock: Callable, ours: Callable, target: float | None
    ) -> Comparison:
        return compare(name, "stock Detectron2", stock, ours, pairs=self.pairs, target=target)

    def _neck(self) -> Comparison:
        with torch.no_grad():
            x = self.stock.preprocess_image(self.inputs).tensor
            stages = self.stock.backbone.bottom_up(x)
        last = {k: v.contiguous(memory_format=torch.channels_last) for k, v in stages.items()}
        calls = [
            no_grad(lambda b=backbone, m=maps: _with_stages(b, m))
            for backbone, maps in ((self.stock.backbone, stages), (self.fast.backbone, last))
        ]
        return self._compare("neck alone, float32", *calls, 1.5)

    def _features(self, layout: torch.memory_format) -> list[Tensor]:
        with torch.no_grad():
            pyramid = self.stock.backbone(self.stock.preprocess_image(self.inputs).tensor)
        return [pyramid[level].contiguous(memory_format=layout) for level in _LEVELS]

    def _pooler(
        self, which: str, boxes: Boxes, layout: torch.memory_format, target: float | None
    ) -> Comparison:
        features = self._features(layout)
        calls = [
            no_grad(lambda m=model: m.roi_heads.box_pooler(features, [boxes]))
            for model in (self.stock, self.fast)
        ]
        name = "NCHW" if layout == torch.contiguous_format else "channels last"
        name = f"pooler, {len(boxes)} boxes ({which}), {name}"
        return self._compare(name, *calls, target)

    def _pooler_training(self) -> Comparison:
        """1,024 boxes, forward and backward."""
        features = [level.requires_grad_() for level in self._features(torch.contiguous_format)]
        boxes = self.proposals[0].tensor
        more = torch.cat([boxes, boxes[:24] + 1])[:1024]

        def run(pooler: nn.Module) -> None:
            pooled = pooler(features, [Boxes(more)])
            torch.autograd.grad(pooled, features, torch.ones_like(pooled))

        poolers = (model.roi_heads.box_pooler for model in (self.stock, self.fast))
        calls = [partial(run, pooler) for pooler in poolers]
        return self._compare("pooler, 1024 boxes, forward and backward", *calls, 2.0)

    def _training(self) -> Comparison:
        batch = training_batch(self.image, 2)
        models = self.stock, plugin_model(self.stock, self.device, **self._opts)
        calls = [partial(train_once, model, batch) for model in models]
        pairs = self._compare("training iteration, batch 2", *calls, 1.2)
        self.stock.eval()
        return pairs


def no_grad(call: Callable[[], object]) -> Callable[[], object]:
    """The call without gradients."""
    return torch.no_grad()(call)


def calls_of(called: list[tuple[Callable[[Tensor], Tensor], Tensor]]) -> Callable[[], object]:
    """Calls all functions with their inputs, without gradients.

    Results are not kept: all together would need new memory each time.
    """

    def run() -> None:
        for call, x in called:
            call(x)

    return no_grad(run)


def train_once(model: nn.Module, batch: list[dict[str, Any]]) -> None:
    """An iteration's forward and backward pass."""
    model.train()
    torch.manual_seed(1)
    with EventStorage(0):
        sum(model(batch).values()).backward()
    model.zero_grad()


def _with_stages(backbone: nn.Module, stages: dict[str, Tensor]) -> dict[str, Tensor]:
    """The pyramid of given stages: the bottom-up network is not called."""
    bottom_up = backbone.bottom_up
    del backbone._modules["bottom_up"]
    backbone.__dict__["bottom_up"] = lambda _: stages
    try:
        return type(backbone).forward(backbone, stages["res2"])
    finally:
        del backbone.__dict__["bottom_up"]
        backbone.bottom_up = bottom_up


def bare_convolutions(
    model: nn.Module, inputs: list[dict[str, Any]]
) -> list[tuple[Callable[[Tensor], Tensor], Tensor]]:
    """Convolutions and matrix products of one call, each with its input."""
    called: list[tuple[Callable[[Tensor], Tensor], Tensor]] = []
    fused, handles = [], []

    def record(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        called.append((_bare(module), given[0].detach()))

    for module in model.modules():
        if isinstance(module, FusedConv2d):
            # It has two methods; both read their input through this one.
            module._input = partial(_recorded_input, module, called)
            fused.append(module)
        elif isinstance(module, nn.Conv2d | nn.Linear):
            handles.append(module.register_forward_pre_hook(record))
    try:
        with torch.no_grad():
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module in fused:
            del module._input
    return called


def _recorded_input(module: FusedConv2d, called: list[Any], x: Tensor) -> Tensor:
    x = type(module)._input(module, x)
    bare = copy.copy(module)
    bare.relu = False
    del bare._input  # its own calls are not recorded
    called.append((bare.forward, x.detach()))
    return x


def _bare(module: nn.Conv2d | nn.Linear) -> Callable[[Tensor], Tensor]:
    if isinstance(module, nn.Linear):
        return partial(F.linear, weight=module.weight, bias=module.bias)
    # Without the norm and activation of Detectron2's convolutions.
    return partial(module._conv_forward, weight=module.weight, bias=module.bias)


SCALINGS: dict[str, list[int]] = {
    "image side": [400, 800, 1200, 1600],
    "proposals": [100, 300, 1000, 2000],
    "batch": [1, 2, 4, 8],
    "channels": [64, 128, 192, 256],
}


def scaling(
    what: str, value: int, device: str, image_path: str | None, *, side: int = 800, **opts: Any
) -> dict[str, float]:
    """Medians of three of stock and optimised float32, in seconds, at one value of one quantity."""
    side = value if what == "image side" else side
    image = photograph(image_path, side, side)
    if what == "proposals":
        opts |= {"MODEL__RPN__POST_NMS_TOPK_TEST": value, "MODEL__RPN__PRE_NMS_TOPK_TEST": 2000}
    elif what == "channels":
        opts |= {"MODEL__FPN__OUT_CHANNELS": value}
    stock = stock_model(device, image, **opts)
    fast = optimize_for_inference(stock)
    inputs = [{"image": image}] * (value if what == "batch" else 1)
    calls = [no_grad(partial(model, inputs)) for model in (stock, fast)]
    pairs = compare(f"{what} {value}", "stock", *calls, pairs=3)
    return {"stock": sorted(pairs.baseline_seconds)[1], "optimised": sorted(pairs.seconds)[1]}


_MEMORY_KINDS = ("stock", "optimised", "training stock", "training plugin", "pooler stock",
                 "pooler")  # fmt: skip


def memory(device: str, height: int, width: int, image_path: str | None) -> dict[str, float]:
    """Peak memory, in MiB, of inference, training and pooling, each in a process of its own."""
    peaks = {}
    for kind in _MEMORY_KINDS:
        arguments = (kind, device, height, width, image_path)
        code = f"from evidence.benchmark.measure import peak; peak(*{arguments!r})"
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
        )
        peaks[kind] = float(done.stdout.split()[-1])
    return peaks


def _peak_of_process(device: str) -> float:
    """Peak memory of this process on the device so far, in MiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / MIB
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def peak(kind: str, device: str, height: int, width: int, image_path: str | None) -> None:
    """Prints the peak memory, in MiB, of one kind. It is called in a new process.

    For a pooler it is the memory that pooling adds to its maps and boxes.
    """
    base = 0.0
    if kind.startswith("pooler"):
        kind_of_pooler = PyramidROIPooler if kind == "pooler" else ROIPooler
        pooler = kind_of_pooler(7, [1 / 4, 1 / 8, 1 / 16, 1 / 32], 0, "ROIAlignV2")
        boxes = [spread_boxes(_PROPOSALS, height, width).to(device)]
        maps = [torch.rand(1, 256, height // s, width // s, device=device) for s in (4, 8, 16, 32)]
        base = _peak_of_process(device)
        with torch.no_grad():
            pooler(maps, boxes)
    else:
        image = photograph(image_path, height, width)
        model = stock_model(device, photograph(image_path, 320, 320))
        if kind.startswith("training"):
            if kind == "training plugin":
                model = plugin_model(model, device)
            train_once(model, training_batch(image, 2))
        else:
            if kind == "optimised":
                model = optimize_for_inference(model)
            with torch.no_grad():
                model([{"image": image}])
    print(_peak_of_process(device) - base)

"""The measurements on a GPU and their aims; both sides bring results to the host."""

from __future__ import annotations

import copy
import gc
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, record_function

from fpn_plugin.deploy import optimize_for_inference
from fpn_plugin.deploy.convolution import FusedConv2d
from fpn_plugin.deploy.graphs import tf32_set
from fpn_plugin.errors import one_line

from .measure import MIB, Bench, bare_convolutions, calls_of, no_grad
from .models import (
    FASTER_R50,
    MASK_R50,
    RETINANET_R50,
    plugin_model,
    spread_boxes,
    stock_model,
    torchvision_model,
    training_batch,
)
from .timing import Comparison, compare, seconds_of

__all__ = ["COUNTS", "ROWS", "Count", "CudaBench", "Row", "waits_among"]

_Found = TypeVar("_Found")
_Calls = tuple[Callable[[], object], Callable[[], object]]
_STOCK, _AUTOCAST = "stock Detectron2", "stock under autocast"


@dataclass(frozen=True)
class Row:
    """One comparison. ``calls`` is called when its turn comes."""

    name: str  # "{half}" stands for the dtype of half precision
    baseline: str
    calls: Callable[[CudaBench], _Calls]  # returns the baseline's call and the plugin's
    aim: float | None = None  # how many times faster the plugin should be
    limit: float | None = None  # the plugin's largest time, in seconds


@dataclass(frozen=True)
class Count:
    """One figure of both sides that should be low."""

    name: str
    measure: Callable[[Callable[[], object]], float]  # returns the figure of a call
    calls: Callable[[CudaBench], _Calls]  # returns stock's call and the plugin's
    aim: float | None = None  # the plugin's largest figure; None for stock's


class CudaBench(Bench):
    """Comparisons at one image size on a GPU; see :class:`Bench` for the arguments.

    Failed measurements, for example without enough memory, are recorded in ``failed``.
    """

    def __init__(self, device: str, *args: Any, **kwargs: Any) -> None:
        self.failed: dict[str, str] = {}
        self.counted: list[dict[str, Any]] = []
        self.graphs: dict[str, float] = {}  # memory that each adds, in MiB
        self._stocks: dict[str, nn.Module] = {}
        self._optimised: dict[tuple[str, bool], nn.Module] = {}
        super().__init__(device, *args, **kwargs)
        self._stocks[FASTER_R50] = self.stock
        self._optimised |= {(FASTER_R50, False): self.fast, (FASTER_R50, True): self.fast_half}

    def comparisons(self) -> Iterator[Comparison]:
        """Inference and pooling."""
        return self._rows("comparisons")

    def steps(self) -> Iterator[Comparison]:
        """Without graphs, and with a compiled backbone."""
        return self._rows("steps")

    def training(self) -> Iterator[Comparison]:
        """Whole iterations, with the optimizer's step."""
        return self._rows("training")

    def _rows(self, part: str) -> Iterator[Comparison]:
        for row in ROWS[part]:
            yield from self._row(row)
            gc.collect()  # its models
            torch.cuda.empty_cache()

    def _row(self, row: Row) -> Iterator[Comparison]:
        name = row.name.format(half=str(self.half).removeprefix("torch."))

        def timed() -> Comparison:
            calls, pairs = row.calls(self), self.pairs
            aims = {"target": row.aim, "limit": row.limit}
            return compare(name, row.baseline, *calls, pairs=pairs, **aims)

        yield from self._measured(f"{name}, against {row.baseline}", timed)

    def _measured(self, name: str, action: Callable[[], _Found]) -> Iterator[_Found]:
        """Yields the result of an action, or nothing if it fails. Failures are recorded."""
        try:
            found = action()
        except Exception as error:  # out of memory, no profiler: other measurements go on
            self.failed[name] = f"{type(error).__name__}: {one_line(error)}"
            return
        yield found

    def figures(self, part: str) -> Iterator[tuple[str, Any]]:
        """The other measurements, see the base class."""
        for count in COUNTS.get(part, ()):
            both = self._measured(count.name, lambda c=count: [*map(c.measure, c.calls(self))])
            for theirs, ours in both:
                aim = theirs if count.aim is None else count.aim
                figures = {"stock": theirs, "plugin": ours, "aim": aim}
                self.counted.append({"name": count.name, **figures})
                yield "counted", self.counted
        if part == "comparisons":
            for found in self._measured("bare convolutions", self.convolution_seconds):
                yield "bare_convolutions", found
            with tf32_set(False):
                for found in self._measured("differences, TF32 off", self.differences):
                    yield "differences_without_tf32", found
            yield "graphs", self.graphs
        yield "graph_calls", graph_calls(self._optimised)
        yield "failed", self.failed

    def convolution_calls(self) -> Callable[[], object]:
        """As the base class's, in half precision, without biases, in one graph."""
        model = optimize_for_inference(self.stock, dtype=self.half, graphs=None)
        called = bare_convolutions(model, self.inputs)
        # Without biases: a bias is another kernel unless a ReLU follows.
        for module in model.modules():
            if isinstance(module, FusedConv2d):
                module.bias = None
        called = [(partial(c, bias=None) if isinstance(c, partial) else c, x) for c, x in called]
        run = calls_of(called)
        return _captured(run) if self.device == "cuda" else run

    def convolution_seconds(self) -> dict[str, float]:
        """As the base class's, in half precision."""
        return self._convolution_seconds(self.fast_half)

    def detectors(
        self,
        config: str,
        images: int = 1,
        *,
        half: bool = True,
        autocast: bool = False,
        of_bytes: bool = False,
        left: tuple[str, ...] = (),
    ) -> _Calls:
        """Stock's detector and the optimised one.

        Args:
            config: of Detectron2's model zoo.
            images: number of images in a batch.
            half: whether the optimised one computes in half precision.
            autocast: whether stock's does.
            of_bytes: whether images are uint8, as from a data loader.
            left: fields that stay on the GPU.
        """
        if config not in self._stocks:
            self._stocks[config] = stock_model(self.device, self.image, config, **self._opts)
        stock = self._stocks[config]
        if (config, half) not in self._optimised:
            dtype = self.half if half else torch.float32
            self._optimised[config, half] = optimize_for_inference(stock, dtype=dtype)
        ours = self._optimised[config, half]
        image = self.image.round().to(torch.uint8) if of_bytes else self.image
        inputs = [{"image": image}] * images
        calls = (
            self._call(stock, inputs, autocast=autocast, left=left),
            self._call(ours, inputs, left=left),
        )
        dtype = str(self.half if half else torch.float32).removeprefix("torch.")
        kind = "uint8" if of_bytes else "float32"
        name = f"{config.split('/')[1].split('_R_')[0]}, {dtype}, {images} images of {kind}"
        with self._noted_memory(name):
            seconds_of(calls[1])
        return calls

    def without_graphs(self) -> _Calls:
        """Stock's detector, and ours launched kernel by kernel."""
        ours = optimize_for_inference(self.stock, dtype=self.half, graphs=None)
        return self._call(self.stock), self._call(ours)

    def compiled(self, half: bool) -> _Calls:
        """Stock's detector, and ours with a compiled backbone."""
        ours = self._made(self.half if half else torch.float32, compile=True)
        return self._call(self.stock), self._call(ours)

    def torchvision(self) -> _Calls:
        """Torchvision's detector under autocast, and ours in half precision."""
        other = torchvision_model(self.device, *self.image.shape[1:])
        image = self.image.flip(0) / 255

        def call() -> list[dict[str, Tensor]]:
            with torch.autocast(self.device, self.half):
                found = other([image.to(self.device)])
            return [{name: value.to("cpu") for name, value in each.items()} for each in found]

        return no_grad(call), self._call(self.fast_half)

    def poolers(self, spread: bool) -> _Calls:
        """Both poolers, on maps of half precision, channels last."""
        boxes = self.proposals[0].to(self.device)
        if spread:
            boxes = spread_boxes(len(boxes), *self.image.shape[1:]).to(self.device)
        maps = [level.to(self.half) for level in self._features(torch.channels_last)]
        stock, ours = (
            no_grad(lambda m=model: m.roi_heads.box_pooler(maps, [boxes]))
            for model in (self.stock, self.fast_half)
        )
        return stock, ours

    def trainers(self, images: int, amp: bool) -> _Calls:
        """A training iteration of each, from images on the host to the optimizer's step."""
        batch = training_batch(self.image.round().to(torch.uint8), images)
        models = (copy.deepcopy(self.stock), plugin_model(self.stock, self.device, **self._opts))
        stock, ours = (self._iteration(model, batch, amp) for model in models)
        return stock, ours

    def _iteration(
        self, model: nn.Module, batch: list[dict[str, Any]], amp: bool
    ) -> Callable[[], None]:
        model.train()
        trained = [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.SGD(trained, 1e-6, momentum=0.9)
        scaler = torch.amp.GradScaler(self.device, enabled=amp)

        def run() -> None:
            torch.manual_seed(1)
            with EventStorage(0):
                with torch.autocast(self.device, self.half, enabled=amp):
                    loss = sum(model(batch).values())
                optimizer.zero_grad()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()

        return run

    def _made(self, dtype: torch.dtype, compile: bool = False) -> nn.Module:
        kind = ("compiled " if compile else "") + str(dtype).removeprefix("torch.")
        with self._noted_memory(f"faster_rcnn, {kind}, 1 images of float32"):
            return super()._made(dtype, compile)

    @contextmanager
    def _noted_memory(self, name: str) -> Iterator[None]:
        """Records the memory of graphs that are captured in its block."""
        before = _graph_memory()
        yield
        added = _graph_memory() - before
        if added:
            self.graphs[name] = added

    def _call(
        self,
        model: nn.Module,
        inputs: list[dict[str, Any]] | None = None,
        *,
        autocast: bool = False,
        left: tuple[str, ...] = (),
    ) -> Callable[[], object]:
        """A call that moves results to the host, except the fields in ``left``."""
        given = self.inputs if inputs is None else inputs

        def call() -> list[Any]:
            with torch.autocast(self.device, self.half, enabled=autocast):
                found = [each["instances"] for each in model(given)]
            for instances in found:
                for name in left:
                    instances.remove(name)
            return [instances.to("cpu") for instances in found]

        return no_grad(call)


def _detectors(config: str, images: int = 1, **options: Any) -> Callable[[CudaBench], _Calls]:
    return lambda bench: bench.detectors(config, images, **options)


def _trainers(images: int, amp: bool) -> Callable[[CudaBench], _Calls]:
    return lambda bench: bench.trainers(images, amp)


def _spread_poolers(bench: CudaBench) -> _Calls:
    return bench.poolers(spread=True)


_BATCH_1, _BATCH_8 = "Faster R-CNN, {half}, batch 1", "Faster R-CNN, {half}, batch 8"
_FLOAT, _MASKS = "Faster R-CNN, float32, batch 1", "Mask R-CNN, {half}, batch 1"
_LEFT = _detectors(MASK_R50, left=("pred_masks",))
_SPREAD = "pooler, boxes of 12 to 400 px, channels last, {half}"
_PROPOSED = "pooler, the RPN's boxes, channels last, {half}"
ROWS: dict[str, tuple[Row, ...]] = {
    "comparisons": (
        Row(_BATCH_1, _STOCK, _detectors(FASTER_R50), 5, 0.004),
        Row(_BATCH_1, _AUTOCAST, _detectors(FASTER_R50, autocast=True), 5, 0.004),
        Row(f"{_BATCH_1}, uint8", _STOCK, _detectors(FASTER_R50, of_bytes=True), 5, 0.004),
        Row(_FLOAT, _STOCK, _detectors(FASTER_R50, half=False), 3),
        Row(_BATCH_8, _STOCK, _detectors(FASTER_R50, 8), 2.5),
        Row(_BATCH_8, _AUTOCAST, _detectors(FASTER_R50, 8, autocast=True), 2.5),
        Row(_MASKS, _STOCK, _detectors(MASK_R50), 3),
        Row(f"{_MASKS}, masks left on the GPU", _STOCK, _LEFT, 3),
        Row("RetinaNet, {half}, batch 1", _STOCK, _detectors(RETINANET_R50), 4),
        Row(_BATCH_1, "torchvision under autocast", CudaBench.torchvision, 3),
        Row(_SPREAD, _STOCK, _spread_poolers, 5),
        Row(_PROPOSED, _STOCK, lambda bench: bench.poolers(spread=False), 5),
    ),
    "steps": (
        Row(f"{_BATCH_1}, no graphs", _STOCK, CudaBench.without_graphs),
        Row(f"{_BATCH_1}, compiled", _STOCK, lambda bench: bench.compiled(half=True), 5, 0.004),
        Row(f"{_FLOAT}, compiled", _STOCK, lambda bench: bench.compiled(half=False), 3),
    ),
    "training": (
        Row("training iteration, AMP, batch 16", _STOCK, _trainers(16, True), 1.6),
        Row("training iteration, AMP, batch 2", _STOCK, _trainers(2, True), 1.3),
        Row("training iteration, float32, batch 16", _STOCK, _trainers(16, False), 1.3),
    ),
}
"""By part, in the order of measurement."""


def waits(call: Callable[[], object]) -> int:
    """How often a call waits for the GPU, by the CUDA functions that torch's profiler sees.

    These are, in all threads, waits for a stream, an event or the device, and copies that wait.
    Torch waits for a stream after each copy to pageable memory of the host.

    Raises:
        RuntimeError: the profiler sees no CUDA functions here.
    """
    torch.cuda.synchronize()
    for _ in range(2):
        call()
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler, record_function(_COUNTED):
        call()
    return waits_among(profiler.events())


_COUNTED = "counted"
_WAIT = re.compile(r"cu(da)?(Stream|Event|Device|Ctx)Synchronize|cu(da)?Memcpy(?!\w*Async)")


def waits_among(events: Iterable[Any]) -> int:
    """How many of a profiler's events wait for the GPU, within the event that marks the call.

    Raises:
        RuntimeError: none of them is a launch.
    """
    on_host = [each for each in events if each.device_type == DeviceType.CPU]
    counted = next(each.time_range for each in on_host if each.name == _COUNTED)
    names = [each.name for each in on_host if counted.start <= each.time_range.start <= counted.end]
    if not any(re.match(r"cu\w*Launch", name) for name in names):
        raise RuntimeError("torch's profiler sees no CUDA functions on this machine")
    return sum(_WAIT.match(name) is not None for name in names)


def peak_of_call(call: Callable[[], object]) -> float:
    """Peak memory of the GPU, in MiB, that a call allocates."""
    torch.cuda.synchronize()
    call()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MIB


def graph_calls(models: dict[tuple[str, bool], nn.Module]) -> dict[str, int]:
    """Calls of optimised models by how they ran, see :class:`Graphs`."""
    found: dict[str, int] = {}
    for (config, half), model in models.items():
        kind = f"{config.split('/')[1].split('_R_')[0]}, {'half precision' if half else 'float32'}"
        graphs = getattr(model, "graphs", None)
        for what, count in getattr(graphs, "counts", {}).items():
            found[f"{kind}: {what}"] = count
    return found


def _captured(run: Callable[[], None]) -> Callable[[], None]:
    """A call as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _graph_memory() -> float:
    """Memory of the GPU, in MiB, that all graphs of this process hold."""
    if not torch.cuda.is_initialized():
        return 0.0
    segments = torch.cuda.memory_snapshot()
    held = (each["total_size"] for each in segments if tuple(each["segment_pool_id"]) != (0, 0))
    return sum(held) / MIB


COUNTS: dict[str, tuple[Count, ...]] = {
    "comparisons": (
        Count("waits, one image", waits, _detectors(FASTER_R50), 1),
        Count("MiB of the pooler, boxes of 12 to 400 px", peak_of_call, _spread_poolers),
    ),
    "training": (
        Count("waits, training, AMP, batch 2", waits, _trainers(2, True), 1),
        Count("waits, training, float32, batch 2", waits, _trainers(2, False), 1),
    ),
}
"""By part, after its rows."""

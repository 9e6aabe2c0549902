"""Detectors that run as CUDA graphs, one for each padded size of images and number of images.

A graph replays all kernels from normalisation to detections at once. The host does not launch them
one by one. Images go to the GPU in one transfer. Detections come back in another; only there the
host waits.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from detectron2.modeling import GeneralizedRCNN, ProposalNetwork, RetinaNet
from detectron2.modeling.roi_heads.keypoint_head import heatmaps_to_keypoints
from detectron2.structures import Boxes, Instances, ROIMasks
from torch import Tensor, nn

from fpn_plugin.errors import one_line

from .static import FixedDetections, Geometry, StaticDetector, static_detector

__all__ = ["GraphLimits", "Graphs", "tf32_set", "use_graphs"]

logger = logging.getLogger(__name__)

_WARM_UPS = 3  # calls before a capture: kernels are compiled and chosen, anchors made
_PACKED = ("boxes", "scores", "classes", "levels", "regions")
_LARGE = 2**20  # bytes
_USES = 10  # calls of a size without a graph until its graph replaces another


@dataclass(frozen=True)
class GraphLimits:
    """Limits of the CUDA graphs of a model.

    Attributes:
        graphs: how many are kept. If there are more sizes and numbers of images, the graph that was
            not used for the longest time is dropped. 0: no graphs.
        gigabytes: memory of the GPU that all graphs together may hold, in GiB.
        images: largest batch that gets a graph.
    """

    graphs: int = 32
    gigabytes: float = 8.0
    images: int = 16


class _Key(NamedTuple):
    """The inputs and settings that a graph was captured for."""

    shape: tuple[int, int, int, int]  # images, channels, padded height and width
    dtype: torch.dtype  # of the given images
    tf32: tuple[bool, bool]  # cuDNN's and cuBLAS's setting
    weights: int  # address of the first one


class HostInstances(Instances):
    """Instances on a GPU that have a copy on the host already: ``to("cpu")`` does not wait.

    A field that is set later, or has no copy, is transferred as usual.
    """

    def __init__(self, image_size: tuple[int, int], **fields: Any) -> None:
        self._on_host: dict[str, Any] = {}
        super().__init__(image_size, **fields)

    def set(self, name: str, value: Any) -> None:
        """See the base class."""
        self._on_host.pop(name, None)
        super().set(name, value)

    def keep(self, **fields: Any) -> None:
        """Keeps copies on the host, of fields that are set already."""
        self._on_host.update(fields)

    def to(self, *args: Any, **kwargs: Any) -> Instances:
        """See the base class."""
        if kwargs or [str(each) for each in args] != ["cpu"]:
            return super().to(*args, **kwargs)
        moved = Instances(self.image_size)
        for name, value in self.get_fields().items():
            host = self._on_host.get(name)
            moved.set(name, _downloaded(value) if host is None else host)
        return moved


def _downloaded(value: Any) -> Any:
    """A copy on the host; a large one, such as masks, in pinned memory, which torch keeps for the
    next one. A copy to memory that the system has to clear first takes forty times as long.
    """
    if not isinstance(value, Tensor) or not value.is_cuda or value.nbytes < _LARGE:
        return value.to("cpu")
    try:
        host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    except RuntimeError:  # no more memory can be pinned
        return value.to("cpu")
    return host.copy_(value)


class _Graph:
    """A captured graph with its input and output; graphs run in turn, and share a memory pool."""

    def __init__(
        self, pipeline: StaticDetector, key: _Key, pool: tuple[int, int], device: torch.device
    ) -> None:
        self._pipeline = pipeline  # the graph reads its anchors
        images, shape = key.shape[0], key.shape
        pixels = torch.Size(shape).numel() * key.dtype.itemsize
        pixels = (pixels + 15) // 16 * 16
        size = pixels + images * 6 * 4
        # Images and geometry are in one buffer, and are sent together.
        self._host = torch.zeros(size, dtype=torch.uint8, pin_memory=True)
        self._device = torch.zeros(size, dtype=torch.uint8, device=device)

        def parts(packed: Tensor) -> tuple[Tensor, Tensor]:
            count = torch.Size(shape).numel() * key.dtype.itemsize
            return (
                packed[:count].view(key.dtype).view(shape),
                packed[pixels:].view(torch.float32).view(images, 6),
            )

        self.images, self.geometry = parts(self._host)
        self._device_images, self._device_geometry = parts(self._device)
        self._device_geometry[:, :4] = torch.tensor(shape[2:] * 2, device=device)
        self._device_geometry[:, 4:] = 1
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._run()
        torch.cuda.current_stream(device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.found, self._packed = self._run()
        self._down = torch.empty(self._packed.shape, pin_memory=True)
        self._done = torch.cuda.Event()

    def _run(self) -> tuple[FixedDetections, Tensor]:
        found = self._pipeline(self._device_images, Geometry.of(self._device_geometry))
        return found, packed(found)

    def put(self, images: Sequence[Tensor], geometry: Tensor) -> None:
        """Sends images and their geometry to the device."""
        on_host = all(image.device.type == "cpu" for image in images)
        into = self.images if on_host else self._device_images
        for room, image in zip(into, images, strict=True):
            room[:, : image.shape[1], : image.shape[2]].copy_(image, non_blocking=True)
        self.geometry.copy_(geometry)
        if on_host:
            self._device.copy_(self._host, non_blocking=True)
        else:
            self._device_geometry.copy_(self.geometry, non_blocking=True)

    def replay(self) -> tuple[Tensor, Tensor]:
        """Runs the graph, and returns its packed detections on the device and on the host."""
        self._graph.replay()
        self._down.copy_(self._packed, non_blocking=True)
        device = self._packed.clone()
        self._done.record()
        self._done.synchronize()
        return device, self._down.clone()


class Graphs:
    """The graphs of one model, and how often they were used.

    They take one call at a time: threads wait for each other. Copies of a model start without
    graphs.

    Args:
        limits: of the graphs.
        tf32: see :func:`optimize_for_inference`.
    """

    def __init__(self, limits: GraphLimits, tf32: bool | None = None) -> None:
        self.limits, self.tf32 = limits, tf32
        self.counts: Counter[str] = Counter()
        """How many calls were "replayed", and how many were not, by reason."""
        self.record_levels = False
        """Whether detections get ``pyramid_level``."""
        self._graphs: OrderedDict[_Key, _Graph] = OrderedDict()
        self._uses: Counter[_Key] = Counter()
        self._failed: dict[_Key, str] = {}
        self._pool: tuple[int, int] | None = None
        self._held = 0  # bytes
        self._last: torch.cuda.Event | None = None  # after the last read of a graph's memory
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, (self.limits, self.tf32)

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(
        self, model: nn.Module, inputs: list[dict[str, Any]]
    ) -> list[HostInstances] | None:
        """Detections of each input; None if the model itself must run. Counts both."""
        with self._lock:
            found = self._found(model, inputs)
        if isinstance(found, str):
            self.counts[found] += 1
            return None
        self.counts["replayed"] += 1
        return found

    def _found(self, model: nn.Module, inputs: list[dict[str, Any]]) -> list[HostInstances] | str:
        images = [each["image"] for each in inputs]
        device = model.pixel_mean.device
        if device.type != "cuda":
            return "not on a GPU"
        if torch.is_autocast_enabled():
            return "under autocast"
        if len(images) > self.limits.images:
            return f"more than {self.limits.images} images at once"
        dtypes = {image.dtype for image in images}
        dtype = dtypes.pop() if dtypes == {torch.uint8} else torch.float32
        shape = (len(images), images[0].shape[0], *padded_size(model, images))
        tf32 = (torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32)
        key = _Key(shape, dtype, tf32, next(model.parameters()).data_ptr())
        graph = self._graphs.get(key) or self._captured(model, key, device)
        if isinstance(graph, str):
            return graph
        self._graphs.move_to_end(key)
        if self._last is not None:  # it may be of another stream
            torch.cuda.current_stream(device).wait_event(self._last)
        rows = geometry(inputs)
        graph.put(images, torch.tensor(rows))
        device_row, host = graph.replay()
        if not host[:, 1].all():
            return "a fixed bound was not enough"
        found = instances_of(model, graph.found, device_row, host, rows, self.record_levels)
        self._last = torch.cuda.current_stream(device).record_event()
        return found

    def _captured(self, model: nn.Module, key: _Key, device: torch.device) -> _Graph | str:
        if key in self._failed:
            return self._failed[key]
        room = self.limits.gigabytes * 2**30
        if len(self._graphs) >= self.limits.graphs or self._held >= room:
            self._uses[key] += 1
            if self._uses[key] < _USES or not self._graphs:
                return "more sizes than graphs"
            self._graphs.popitem(last=False)
            del self._uses[key]
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        try:
            # A graph's tensors must be usable outside of inference mode too.
            with torch.inference_mode(False), torch.no_grad():
                graph = _Graph(static_detector(model), key, self._pool, device)
        except Exception as error:  # other libraries' models and a full GPU raise all kinds
            short = f"{key.shape[0]} x {key.shape[3]} x {key.shape[2]} px has no graph"
            logger.warning("%s, so the model runs without: %s", short, one_line(error))
            self._failed[key] = short
            return short
        self._graphs[key] = graph
        self._held = sum(
            each["total_size"]
            for each in torch.cuda.memory_snapshot()
            if tuple(each["segment_pool_id"]) == tuple(self._pool)
        )
        return graph


def geometry(inputs: Sequence[dict[str, Any]]) -> list[list[float]]:
    """Rows of :class:`.static.Geometry`: height and width, those of the output, scales x and y."""
    rows = []
    for each in inputs:
        height, width = each["image"].shape[-2:]
        output = [each.get("height", height), each.get("width", width)]
        rows.append([height, width, *output, output[1] / width, output[0] / height])
    return rows


def packed(found: FixedDetections) -> Tensor:
    """Detections without masks and heatmaps, as a row of float32 numbers for each image.

    float32 is exact for whole numbers up to 16 million.
    """
    numbers = torch.stack([found.counts, found.exact.long()], dim=1)
    columns = [numbers, *(getattr(found, name) for name in _PACKED)]
    return torch.cat([column.flatten(1).float() for column in columns], dim=1)


def instances_of(
    model: nn.Module,
    found: FixedDetections,
    on_device: Tensor,
    on_host: Tensor,
    rows: list[list[float]],
    record_levels: bool = False,
) -> list[HostInstances]:
    """Detectron2's instances, or proposals, of each image.

    Args:
        model: the detector.
        found: masks and heatmaps are read from it.
        on_device: the other fields, see :func:`packed`.
        on_host: a copy of it.
        rows: as :func:`geometry` returns them.
        record_levels: whether instances get ``pyramid_level``.
    """
    if isinstance(model, ProposalNetwork):
        names = {"proposal_boxes": "boxes", "objectness_logits": "scores"}
    else:
        names = {"pred_boxes": "boxes", "scores": "scores", "pred_classes": "classes"}
        if record_levels:
            names["pyramid_level"] = "levels"
    results = []
    for number, (*_, height, width, scale_x, scale_y) in enumerate(rows):
        count = int(on_host[number, 0])
        instances = HostInstances((int(height), int(width)))
        for name, of in names.items():
            instances.set(name, _field(found, of, on_device[number], count))
            instances.keep(**{name: _field(found, of, on_host[number], count)})
        if found.masks is not None:
            masks = ROIMasks(found.masks[number, :count])
            boxes = instances.pred_boxes
            instances.pred_masks = masks.to_bitmasks(boxes, int(height), int(width), 0.5).tensor
        if found.heatmaps is not None:
            heatmaps = found.heatmaps[number, :count].clone()
            # It reads the sizes of boxes one by one: on the host.
            regions = _field(found, "regions", on_host[number], count).tensor
            keypoints = heatmaps_to_keypoints(heatmaps, regions)[:, :, [0, 1, 3]]
            keypoints[:, :, 0] *= scale_x
            keypoints[:, :, 1] *= scale_y
            instances.pred_keypoints = keypoints
            instances.pred_keypoint_heatmaps = heatmaps
        results.append(instances)
    return results


def _field(found: FixedDetections, name: str, row: Tensor, count: int) -> Tensor | Boxes:
    """A field of one image's ``count`` detections, from its packed row."""
    start = 2
    for field in _PACKED:
        shape = getattr(found, field).shape[1:]
        if field == name:
            break
        start += shape.numel()
    values = row[start : start + count * shape[1:].numel()].view(count, *shape[1:])
    if name in ("boxes", "regions"):
        return Boxes(values)
    return values.long() if name in ("classes", "levels") else values


def padded_size(model: nn.Module, images: Sequence[Tensor]) -> tuple[int, int]:
    """Height and width that Detectron2 pads a batch to."""
    backbone = model.backbone
    constraints = backbone.padding_constraints
    square = constraints.get("square_size", 0)
    divisor = max(1, constraints.get("size_divisibility", backbone.size_divisibility))
    sides = (max(image.shape[i] for image in images) for i in (-2, -1))
    height, width = (-(-(square or side) // divisor) * divisor for side in sides)
    return height, width


@contextmanager
def tf32_set(allowed: bool | None) -> Iterator[None]:
    """Lets cuDNN and cuBLAS round float32 to TF32 in its block, or not; None: as torch is set."""
    libraries = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [library.allow_tf32 for library in libraries]
    if allowed is not None:
        for library in libraries:
            library.allow_tf32 = allowed
    try:
        yield
    finally:
        for library, was in zip(libraries, before, strict=True):
            library.allow_tf32 = was


class _Graphed(nn.Module):
    """A model that replays a graph if there is one for the input; otherwise it runs itself."""

    def forward(self, batched_inputs: list[dict[str, Any]]) -> Any:
        """See the base class."""
        if self.training:
            return super().forward(batched_inputs)
        with tf32_set(self.graphs.tf32):
            found = self.graphs(self, batched_inputs)
            if found is None:
                return super().forward(batched_inputs)
        name = "proposals" if isinstance(self, ProposalNetwork) else "instances"
        return [{name: instances} for instances in found]


class GraphedRCNN(_Graphed, GeneralizedRCNN):
    """GeneralizedRCNN with graphs."""


class GraphedRetinaNet(_Graphed, RetinaNet):
    """RetinaNet with graphs."""


class GraphedProposalNetwork(_Graphed, ProposalNetwork):
    """ProposalNetwork with graphs."""


_GRAPHED = {
    GeneralizedRCNN: GraphedRCNN,
    RetinaNet: GraphedRetinaNet,
    ProposalNetwork: GraphedProposalNetwork,
}


def use_graphs(model: nn.Module, limits: GraphLimits, tf32: bool | None) -> None:
    """Makes a model run as CUDA graphs, in place.

    Raises:
        UserError: the model has no pipeline of fixed shapes.
    """
    static_detector(model)
    model.graphs = Graphs(limits, tf32)
    # A new class instead of a new method: copies are independent and can be saved.
    model.__class__ = _GRAPHED[type(model)]

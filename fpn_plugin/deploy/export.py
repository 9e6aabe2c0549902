"""TorchScript, torch.export and ONNX files of a detector."""

from __future__ import annotations

import copy
import importlib
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn

from fpn_plugin.errors import UserError
from fpn_plugin.modeling import image_channels

from .folding import fold_batch_norms
from .graph import DetectionGraph, detection_graph
from .same_padding import fix_padding, padded_by_size

__all__ = ["FORMATS", "TIME_LIMIT", "batched", "export_graph", "exportable", "load_exported"]

TIME_LIMIT = 900
"""Seconds that writing a file may take by default."""

FORMATS = {"torchscript": "model.ts", "torch_export": "model.pt2", "onnx": "model.onnx"}
"""The name of each format, and of its file."""

Exported = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
"""Takes ``images, sizes``, returns ``boxes, scores, classes, image_index``, and ``masks`` if the
model has a mask head."""


def exportable(model: nn.Module) -> DetectionGraph:
    """A copy of a model as one function of tensors, with batch norms folded and padding fixed.

    Args:
        model: Faster or Mask R-CNN, or RetinaNet. It is not changed. It must not be optimised: no
            other runtime has the operators of optimised models.

    Raises:
        UserError: another architecture, an optimised model, or a pyramid that pads to squares.
    """
    if hasattr(model, "optimization_steps"):
        raise UserError("an optimised model cannot be exported: export the original")
    if getattr(model.backbone, "padding_constraints", {}).get("square_size", 0) > 0:
        raise UserError("a backbone that pads to squares (square_size) cannot be exported")
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    fold_batch_norms(model)
    fix_padding(model.backbone)
    return detection_graph(model).eval()


def batched(images: Sequence[Tensor], side: int = 64, channels: int = 3) -> tuple[Tensor, Tensor]:
    """Puts images of several sizes into one batch, as exported models take it.

    Args:
        images: each ``(C, H, W)``; there may be none.
        side: least height and width of the batch, in pixels.
        channels: C, for a batch without images.

    Returns:
        The batch, float32 ``(N, C, H, W)``, each image at the upper left, and the images' heights
        and widths, int64 ``(N, 2)``.
    """
    sizes = torch.tensor([image.shape[1:] for image in images], dtype=torch.int64).view(-1, 2)
    height, width = torch.cat([sizes, torch.tensor([[side, side]])]).amax(dim=0).tolist()
    batch = torch.zeros(len(images), channels, height, width)
    for place, image in zip(batch, images, strict=True):
        place[:, : image.shape[1], : image.shape[2]] = image
    return batch, sizes


def export_graph(
    graph: DetectionGraph, kind: str, path: str | Path, time_limit: float = TIME_LIMIT
) -> None:
    """Writes a file of one format.

    Args:
        graph: as :func:`exportable` returns it.
        kind: a name in ``FORMATS``.
        path: of the file.
        time_limit: seconds that this may take. It applies only in the main thread of a process,
            because Python cannot interrupt others.

    Raises:
        UserError: the format cannot carry the model, a package is missing or too old, or the time
            is up. The message says which, or what the exporter was doing.
    """
    _require("onnx", kind)
    if kind != "torchscript" and not hasattr(torch.export.Dim, "DYNAMIC"):
        raise UserError(
            f"{kind} needs a torch whose torch.export has dynamic sizes (Dim.DYNAMIC), "
            f"and this is {torch.__version__}: install a newer one, or export torchscript"
        )
    by_size = padded_by_size(graph.model) if kind != "torchscript" else []
    if by_size:
        raise UserError(
            f"{kind} takes endless time for a network that computes its padding from the sizes of "
            f"maps, as {by_size[0]} does, unless images are padded to its stride: set "
            "match_lateral_size (MODEL.FPN.MATCH_LATERAL_SIZE) False, or export torchscript"
        )
    # Two images of different sizes: an exporter takes equal sizes, and sizes of 1, as fixed.
    side = 4 * max(graph.model.backbone.size_divisibility, 64)
    generator = torch.Generator().manual_seed(0)
    channels = image_channels(graph.model)
    images = torch.rand(2, channels, side, side + side // 2, generator=generator) * 255
    example = (images, torch.tensor([[side, side + side // 2], [side - 9, side]]))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # exporters warn of each size that Python code reads
        try:
            with _limited(graph, kind, time_limit):
                _write(graph, kind, example, str(path))
        except UserError:
            raise
        except Exception as error:  # exporters raise errors of any kind
            reason = next((line for line in reversed(str(error).splitlines()) if line.strip()), "")
            raise UserError(
                f"{kind} cannot carry this model: {type(error).__name__}: {reason.strip()[:300]}"
            ) from error


class _TimeIsUp(BaseException):  # exporters catch every Exception
    pass


@contextmanager
def _limited(graph: DetectionGraph, kind: str, seconds: float) -> Iterator[None]:
    """Interrupts its block after some seconds, with an error that names the current module."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    names = {id(module): name for name, module in graph.named_modules()}

    def stop(_: int, frame: FrameType | None) -> None:
        while frame is not None and id(frame.f_locals.get("self")) not in names:
            frame = frame.f_back
        if frame is None:  # all modules are done
            raise _TimeIsUp("converting the traced model")
        name, function = names[id(frame.f_locals["self"])], frame.f_code.co_name
        raise _TimeIsUp(f"tracing {name or type(graph).__name__} ({function})")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except _TimeIsUp as error:
        raise UserError(
            f"{kind} was not written within {seconds:g} s: the exporter was {error}. Give it "
            "longer (--time-limit), or export torchscript, which does not keep track of sizes"
        ) from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _write(graph: DetectionGraph, kind: str, example: tuple[Tensor, Tensor], path: str) -> None:
    if kind == "torchscript":
        torch.jit.trace(graph, example, check_trace=False).save(path)
        return
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(
        graph,
        example,
        dynamic_shapes=({0: dynamic, 2: dynamic, 3: dynamic}, {0: dynamic}),
        strict=False,
        # Relations between the example's sizes are checked when the file runs; none is fixed.
        prefer_deferred_runtime_asserts_over_guards=True,
    )
    if kind == "torch_export":
        torch.export.save(program, path)
        return
    torch.onnx.export(
        program,
        example,
        path,
        dynamo=True,
        external_data=False,
        opset_version=18,
        verbose=False,
        input_names=["images", "sizes"],
        output_names=list(graph.output_names),
    )


def load_exported(path: str | Path) -> Exported:
    """Loads an exported file as a function that its own runtime computes.

    Args:
        path: of a file that :func:`export_graph` wrote.

    Returns:
        A function from ``images, sizes`` to the output tensors, see :class:`DetectionGraph`.

    Raises:
        UserError: onnxruntime is missing, or the file's suffix belongs to no format.
    """
    suffix = Path(path).suffix
    if suffix == ".ts":
        return torch.jit.load(str(path))
    if suffix == ".pt2":
        return torch.export.load(str(path)).module()
    if suffix != ".onnx":
        known = ", ".join(Path(name).suffix for name in FORMATS.values())
        raise UserError(f"{str(path)!r}: the suffix is none of {known}")
    _require("onnxruntime", "onnx")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        given = {"images": images.numpy(), "sizes": sizes.numpy()}
        return tuple(torch.from_numpy(output) for output in session.run(None, given))

    return run


def _require(package: str, kind: str) -> None:
    """Refuses the ONNX format if one of its packages is missing.

    Raises:
        UserError: a package is missing; the message names the command that installs it.
    """
    if kind != "onnx":
        return
    try:
        importlib.import_module(package)
        importlib.import_module("onnxscript")
    except ImportError as error:
        raise UserError(
            f"the onnx format needs {error.name}: pip install 'fpn_plugin[onnx]'"
        ) from None

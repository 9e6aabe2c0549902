"""What an optimised model is, how fast it is, and whether it detects the same."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from detectron2.structures import Instances
from torch import nn

from .comparison import Agreement
from .optimize import dtype_of, steps_of

__all__ = ["compare_detectors", "dtype_name", "print_steps"]


def print_steps(model: nn.Module) -> None:
    """Prints what was done to an optimised model, and what was skipped; nothing for any other."""
    if steps_of(model):
        print(f"optimised, {dtype_name(model)}:", *steps_of(model), sep="\n  ")


def dtype_name(model: nn.Module) -> str:
    """The dtype that a model's backbone runs in, as "bfloat16"."""
    return str(dtype_of(model)).removeprefix("torch.")


def compare_detectors(
    detectors: Mapping[str, Callable[[np.ndarray], Instances]], images: Iterable[np.ndarray]
) -> dict[str, tuple[float, float, Agreement]]:
    """Runs detectors in turn on each image.

    Args:
        detectors: by name; the others are compared with the first. They return detections on the
            CPU.
        images: see :class:`fpn_plugin.engine.inference.Detector`.

    Returns:
        For each, seconds of the first call, the median of the later ones, and how far its
        detections are from the first detector's.
    """
    seconds: dict[str, list[float]] = {name: [] for name in detectors}
    agreement = {name: Agreement() for name in detectors}
    for number, image in enumerate(images):
        outputs: dict[str, Instances] = {}
        for _ in range(2 if number == 0 else 1):  # a first call takes longer
            for name, detector in detectors.items():
                started = time.perf_counter()  # detections are on the CPU: the work is done
                outputs[name] = detector(image)
                seconds[name].append(time.perf_counter() - started)
        expected = next(iter(outputs.values()))
        for name, output in outputs.items():
            agreement[name].add(expected, output)
    return {
        name: (taken[0], statistics.median(taken[1:]), agreement[name])
        for name, taken in seconds.items()
    }

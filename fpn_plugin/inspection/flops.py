"""Detectron2's count of FLOPs, or fvcore's where Detectron2's does not import."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

__all__ = ["FlopCountAnalysis"]

try:
    from detectron2.utils.analysis import FlopCountAnalysis
except ImportError:  # in the release 0.6 it exports models through caffe2, which torch has dropped
    from fvcore.nn import FlopCountAnalysis as _OfTensors

    class _Flat(nn.Module):
        """A module from tensors to tensors, as tracing wants it, over any inputs and outputs."""

        def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
            super().__init__()
            self.model = model
            self._inputs = inputs

        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            given = iter(tensors)
            return tuple(_tensors(self.model(*_filled(self._inputs, given))))

    class FlopCountAnalysis(_OfTensors):  # type: ignore[no-redef]
        """Counts as Detectron2's does, by the same names of modules."""

        def __init__(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
            super().__init__(_Flat(model, inputs), tuple(_tensors(inputs)))


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in nested dicts and sequences, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def _filled(value: Any, tensors: Iterator[Tensor]) -> Any:
    """The same nesting with other tensors."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {key: _filled(each, tensors) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_filled(each, tensors) for each in value)
    return value

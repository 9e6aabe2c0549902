"""Reading pickles of arrays without running code that is in them.

A pickle gets none of numpy's functions: ``__setstate__`` of numpy's arrays does not check its
input, which may hold pointers to Python objects.
"""

from __future__ import annotations

import math
import pickle
import re
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable
from typing import IO, Any

import numpy as np

from fpn_plugin.errors import UserError, one_line

__all__ = ["NO_PICKLE", "load_arrays"]

# What pickle and torch raise if a file is not a pickle.
NO_PICKLE = (
    pickle.UnpicklingError, struct.error, AttributeError, EOFError, ImportError, LookupError,
    MemoryError, OverflowError, RecursionError, TypeError, ValueError,
)  # fmt: skip

_NUMBERS_AND_TEXT = re.compile(r"b1|[iufc]\d{1,2}|[SU]\d{1,9}", re.ASCII)
_OBJECTS = re.compile(r"O[48]?", re.ASCII)


class _Dtype:
    """A dtype in a pickle; only the byte order of its state is read."""

    def __init__(self, code: Any) -> None:
        self.code = code.decode("latin1") if isinstance(code, bytes) else code
        self.order = "="
        named = isinstance(self.code, str)
        self.of_objects = named and _OBJECTS.fullmatch(self.code) is not None
        if not self.of_objects and not (named and _NUMBERS_AND_TEXT.fullmatch(self.code)):
            raise ValueError(
                f"it holds an array of dtype {str(self.code)[:20]!r}, expected numbers, text or "
                "lists"
            )

    def __setstate__(self, state: Any) -> None:
        order = state[1]
        self.order = order.decode("latin1") if isinstance(order, bytes) else order
        if self.order not in ("<", ">", "=", "|"):
            raise ValueError(f"{str(self.order)[:20]!r} is no byte order of a dtype")

    def real(self) -> np.dtype:
        """The dtype as numpy's."""
        if self.of_objects:
            return np.dtype(object)
        dtype = np.dtype(self.code).newbyteorder(self.order)
        if not dtype.itemsize:
            raise ValueError(f"dtype {self.code!r} has no size")
        return dtype


class _Array:
    """An array or a number in a pickle; ``make`` makes it of a function that converts objects."""

    def __init__(self, make: Callable[[Callable[[Any], Any]], Any] | None = None) -> None:
        self._make = make

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state if len(state) == 5 else (1, *state)
        order = "F" if fortran else "C"
        self._make = lambda plain: _array(content, dtype, shape, order, plain)

    def real(self, plain: Callable[[Any], Any]) -> Any:
        """The array as numpy's; ``plain`` converts its objects."""
        make, self._make = self._make, None  # releases its bytes, which are copied
        if make is None:
            raise ValueError("it names an array without its content")
        return make(plain)


class _Standin:
    """What a pickle gets for a name: it can be called, and not changed."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setstate__(self, state: Any) -> None:
        raise ValueError("it sets the state of a function")


def _array(
    content: Any, dtype: Any, shape: Any, order: str, plain: Callable[[Any], Any]
) -> np.ndarray:
    """An array of raw bytes, or of a list of objects."""
    if not isinstance(dtype, _Dtype):
        raise ValueError("it holds an array without a dtype")
    if not isinstance(shape, tuple) or any(type(side) is not int or side < 0 for side in shape):
        raise ValueError(f"{str(shape)[:40]!r} is no shape of an array")
    count = math.prod(shape)
    if dtype.of_objects:
        if type(content) is not list or len(content) != count:
            raise ValueError("it holds an array of objects that is not given by a list of them")
        flat = np.empty(count, object)
        for index, value in enumerate(content):
            flat[index] = plain(value)
        return flat.reshape(shape, order=order)
    if isinstance(content, str):  # of Python 2
        content = content.encode("latin1")
    if not isinstance(content, bytes | bytearray):
        raise ValueError(f"it holds an array given by a {type(content).__name__}, not by bytes")
    real = dtype.real()
    if len(content) != count * real.itemsize:
        raise ValueError(
            f"it holds an array of shape {str(shape)[:40]} and dtype {dtype.code} in "
            f"{len(content)} bytes"
        )
    array = np.frombuffer(content, real).reshape(shape, order=order)
    array = array.astype(real.newbyteorder("="), copy=True)  # torch needs the machine's byte order
    if real.kind == "U" and (array.reshape(-1).view(np.uint32) > sys.maxunicode).any():
        raise ValueError("it holds an array of text that is no text")
    return array


def _scalar(dtype: Any, content: Any = b"") -> _Array:
    return _Array(lambda plain: _array(content, dtype, (1,), "C", plain)[0])


def _frombuffer(content: Any, dtype: Any, shape: Any, order: Any, axis_order: Any = None) -> _Array:
    def make(plain: Callable[[Any], Any]) -> np.ndarray:
        if not isinstance(dtype, _Dtype) or dtype.of_objects:
            raise ValueError("it holds an array of objects that is not given by a list of them")
        array = _array(content, dtype, shape, "F" if order == "F" else "C", plain)
        # numpy 2.3 adds the order of axes for an array that is neither C's nor Fortran's.
        return array if axis_order is None else array.transpose(axis_order)

    return _Array(make)


def _encoded(text: Any, encoding: Any = "latin1") -> bytes:
    """Bytes, which protocols before 3 write as text; other codecs are not run."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise ValueError(f"it holds text in encoding {str(encoding)[:20]!r}; expected latin1")
    return text.encode("latin1")


_STANDINS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "dtype"): _Standin(lambda code, align=False, copy=True: _Dtype(code)),
    ("numpy", "ndarray"): _Standin(lambda *_: _Array()),  # numpy names it and does not call it
    ("_codecs", "encode"): _Standin(_encoded),
    ("__builtin__", "bytes"): _Standin(lambda: b""),
    **{
        (f"numpy.{core}.{module}", name): _Standin(call)
        for core in ("core", "_core")  # before numpy 2, and since
        for module, name, call in (
            ("multiarray", "_reconstruct", lambda kind, shape, code: _Array()),
            ("multiarray", "scalar", _scalar),
            ("numeric", "_frombuffer", _frombuffer),
        )
    },
}


class _ArraysOnly(pickle.Unpickler):
    """Unpickles arrays, numbers, text and containers; refuses all other names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _STANDINS:
            return _STANDINS[module, name]
        raise UserError(
            f"it is a pickle that would call {module}.{name}; only arrays are read from pickles, "
            "because loading anything else runs code"
        )


class _Real:
    """Replaces stand-ins by numpy's arrays at any depth; shared values stay shared."""

    def __init__(self) -> None:
        self._done: dict[int, Any] = {}
        self._within: set[int] = set()

    def __call__(self, value: Any) -> Any:
        if not isinstance(value, list | tuple | dict | set | frozenset | _Array | _Dtype):
            if isinstance(value, _Standin):
                raise ValueError("it holds a function")
            return value
        key = id(value)
        if key in self._done:
            return self._done[key]
        if key in self._within:
            raise ValueError("it holds an array or a tuple that contains itself")
        self._within.add(key)
        self._done[key] = made = self._made(value)
        self._within.discard(key)
        return made

    def _made(self, value: Any) -> Any:
        if isinstance(value, _Array):
            return value.real(self)
        if isinstance(value, _Dtype):
            return value.real()
        if isinstance(value, list):
            made: Any = self._done.setdefault(id(value), [])  # it may hold itself
            made.extend(map(self, value))
        elif isinstance(value, dict):
            made = self._done.setdefault(id(value), type(value)())
            # Not value.items: a pickle can set attributes of an OrderedDict.
            made.update((self(key), self(held)) for key, held in dict.items(value))
        else:
            made = type(value)(map(self, value))
        return made


def load_arrays(file: IO[bytes], encoding: str = "latin1") -> Any:
    """Reads a pickle of arrays, numbers and text; arrays are in the machine's byte order.

    Args:
        file: opened for reading bytes.
        encoding: of Python 2's text.

    Raises:
        UserError: the pickle names anything else, which does not run.
        pickle.UnpicklingError: the file is not a pickle, or its arrays are inconsistent.
    """
    try:
        return _Real()(_ArraysOnly(file, encoding=encoding).load())
    except UserError:
        raise
    except NO_PICKLE as error:
        raise pickle.UnpicklingError(one_line(error)) from error

"""Reading pickles of arrays without running what else may be in them."""

from __future__ import annotations

import pickle
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any
from unittest import mock

from detectron2.data import build

from fpn_plugin.errors import UserError

__all__ = ["load_arrays", "proposals_read_as_arrays"]

# What the model zoo's pickles and proposal files are made of.
_ARRAYS = {
    ("collections", "OrderedDict"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
    ("_codecs", "encode"),
    ("__builtin__", "bytes"),
    ("numpy.core.numeric", "_frombuffer"),
    ("numpy._core.numeric", "_frombuffer"),
}


# What unpickling something else ends in.
_NO_PICKLE = (
    pickle.UnpicklingError,
    AttributeError,
    EOFError,
    ImportError,
    IndexError,
    KeyError,
    TypeError,
    ValueError,
)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles arrays, numbers, text and what holds them; refuses everything that could run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ARRAYS:
            return super().find_class(module, name)
        raise UserError(
            f"it is a pickle that would call {module}.{name}; only arrays are read from pickles, "
            "because loading anything else runs code"
        )


def load_arrays(file: IO[bytes], encoding: str = "latin1") -> Any:
    """What a pickle of arrays, numbers and text holds.

    Args:
        file: opened for reading bytes.
        encoding: of Python 2's text.

    Raises:
        UserError: it names anything else, which is not called.
    """
    return _ArraysOnly(file, encoding=encoding).load()


@contextmanager
def proposals_read_as_arrays() -> Iterator[None]:
    """Within it, Detectron2 reads proposal files, which are pickles, by :func:`load_arrays`.

    Raises:
        UserError: one holds more than arrays, or is no pickle.
    """

    def load(file: IO[bytes], encoding: str = "latin1") -> Any:
        name = getattr(file, "name", "of proposals")
        try:
            return load_arrays(file, encoding)
        except UserError as error:
            raise UserError(
                f"{name!r} is not loaded: {error}; tools/dump_proposals.py makes such files"
            ) from error
        except _NO_PICKLE as error:
            told = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{name!r} is no file of proposals: {told}") from error

    with mock.patch.object(build, "pickle", types.SimpleNamespace(load=load)):
        yield

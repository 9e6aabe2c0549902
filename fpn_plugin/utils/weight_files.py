"""Files of weights: read without running code that is in them, and written."""

from __future__ import annotations

import pickle
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from fpn_plugin.errors import UserError, one_line

from .pickles import NO_PICKLE, load_arrays

__all__ = [
    "NO_CHECKPOINT",
    "a_dict",
    "classes_in",
    "explained_reading",
    "read_checkpoint",
    "read_file",
    "weights_of",
    "write_checkpoint",
]

# What torch, pickle and Detectron2 raise for a file that is not a checkpoint.
NO_CHECKPOINT = (*NO_PICKLE, AssertionError, RuntimeError)

_OF_TORCH_SAVE = (b"PK\x03\x04", b"\x80")  # an archive; a pickle, before torch 1.6
_HTML = (b"<!doctype html", b"<html", b"<head", b"<?xml")

_TRUSTED = (
    "If you trust its author: load it once with torch.load(..., weights_only=False) or pickle, "
    "and save its state dict with safetensors.torch.save_file"
)


def read_file(path: str, trust_pickle: bool = False) -> dict[Any, Any]:
    """What a file of weights holds; see :func:`read_checkpoint`."""
    zoo, in_safetensors = path.endswith(".pkl"), path.endswith(".safetensors")
    _check_kind(path, of_torch_save=not (zoo or in_safetensors or trust_pickle))
    if in_safetensors:
        return {"model": safetensors.torch.load_file(path)}
    if zoo:
        with open(path, "rb") as file:
            return a_dict(load_arrays(file))
    try:
        return a_dict(torch.load(path, map_location="cpu", weights_only=not trust_pickle))
    except pickle.UnpicklingError as error:
        if "Weights only load failed" not in str(error):
            raise
        found = re.search(r"(?:GLOBAL|Unsupported class) (\S+)", str(error))
        raise UserError(
            f"it holds more than tensors{f', {found[1]} first' if found else ''}; loading that "
            "would run code that is in it"
        ) from error


@contextmanager
def explained_reading(path: str) -> Iterator[None]:
    """Within it, a file is read; errors name it by what the user gave, for example a URL."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path!r} is not loaded: {error}. {_TRUSTED}") from error
    except OSError as error:
        raise UserError(f"cannot read weights {path!r}: {error.strerror or error}") from error
    except (*NO_CHECKPOINT, safetensors.SafetensorError) as error:
        raise UserError(f"{path!r} is not a checkpoint: {one_line(error)}") from error


def a_dict(content: Any, where: str = "it") -> dict[Any, Any]:
    """The content of a file or of its part ``where``; a ValueError if it is no dict."""
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ValueError(f"{where} holds a value of type {kind}, expected a dict of tensors")
    return content


def _check_kind(path: str, of_torch_save: bool) -> None:
    """Refuses files that hold no weights, and those that hold code, if torch.load shall run none.

    torch before 2.6 runs code of some archives in spite of ``weights_only`` (CVE-2025-32434).
    """
    with open(path, "rb") as file:
        head = file.read(512)
        file.seek(0)
        if not head:
            raise ValueError("it is empty")
        if head.startswith(b"version https://git-lfs"):
            raise ValueError("it is git-lfs's pointer to the weights: get them by git lfs pull")
        if head.lstrip().lower().startswith(_HTML):
            raise ValueError(
                "it is an HTML page, which servers send for a log-in or an error: download the "
                "weights again"
            )
        if not of_torch_save:
            return
        with (
            suppress(tarfile.TarError),
            tarfile.open(fileobj=file, mode="r:"),
        ):  # as torch.load does
            raise UserError("it is a tar file, as torch before 0.1.10 wrote; these may run code")
    if not head.startswith(_OF_TORCH_SAVE):
        raise ValueError(f"it begins with {head[:20]!r}, unlike any file of torch.save")
    if head.startswith(_OF_TORCH_SAVE[0]):
        # torch's own reader, because another one may see other content.
        members = torch._C.PyTorchFileReader(path).get_all_records()
        if any(member.rpartition("/")[2] == "constants.pkl" for member in members):
            raise UserError(
                "it is a TorchScript archive, a program with its weights (it has constants.pkl)"
            )


def weights_of(checkpoint: Any, *parts: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint by name.

    Args:
        checkpoint: the content of a file.
        parts: keys that the weights may be under; if it has none of them, it is all weights.

    Raises:
        ValueError: it holds no tensors, or anything else.
    """
    part = next((part for part in parts if isinstance(checkpoint, dict) and part in checkpoint), "")
    where = f"its {part!r}" if part else "it"
    weights = a_dict(checkpoint[part] if part else checkpoint, where)
    if not weights:
        raise ValueError(f"{where} holds no tensors")
    for key, value in weights.items():
        named = f"{where} has {str(key)[:60]!r}"
        if not isinstance(key, str):
            raise ValueError(f"{named} of type {type(key).__name__} for the name of a tensor")
        if not isinstance(value, Tensor | np.ndarray):
            raise ValueError(f"{named} of type {type(value).__name__}, expected a tensor")
        if isinstance(value, np.ndarray) and value.dtype.kind not in "biufc":
            raise ValueError(f"{named} of dtype {value.dtype}, expected numbers")
    return {key: torch.as_tensor(value) for key, value in weights.items()}


def read_checkpoint(path: str | Path, *, trust_pickle: bool = False) -> dict[str, Any]:
    """The content of a file of weights, read without running code that is in it.

    Args:
        path: ``.safetensors``, whose weights are returned under "model"; ``.pkl`` of arrays, as in
            Detectron2's model zoo; or torch.save's file of tensors and plain values.
        trust_pickle: also read files of torch.save that hold more. This runs code that is in them.

    Raises:
        UserError: the file cannot be read, would run code, or holds something else.
    """
    with explained_reading(str(path)):
        return read_file(str(path), trust_pickle)


def classes_in(path: str | Path) -> list[str] | None:
    """Names of the classes that a checkpoint's model was trained on, in its order.

    Returns:
        None if the file does not name them, does not exist or is no checkpoint.
    """
    try:
        _check_kind(str(path), of_torch_save=True)
        content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=True)
    except (*NO_CHECKPOINT, OSError):
        return None
    classes = content.get("classes") if isinstance(content, dict) else None
    if type(classes) is not list or not all(type(name) is str for name in classes):
        return None
    return classes


def write_checkpoint(state: dict[str, Tensor], path: str | Path, *, bare: bool = False) -> None:
    """Writes a state dict, by safetensors to ``.safetensors``, else by torch.save.

    Args:
        state: tensors by name.
        path: of the file; its folder is made.
        bare: torch.save writes the state dict itself, as in torchvision's files, instead of
            ``{"model": state dict}``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".safetensors":
        safetensors.torch.save_file({k: v.contiguous() for k, v in state.items()}, path)
    else:
        torch.save(state if bare else {"model": state}, path)

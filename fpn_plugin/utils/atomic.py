"""Atomic writes: a file is complete or absent, whenever the process or the machine stops."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from fpn_plugin.errors import UserError

__all__ = ["PARTIAL", "AtomicWrites", "explained_full_disk", "make_output_dir", "written_whole"]

PARTIAL = ".partial"
"""The suffix of a file until it is complete."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def written_whole(path: str, mode: str = "wb") -> Iterator[IO[Any]]:
    """Opens a file for writing that gets its name when it is complete and on the disk.

    Until then, and if writing fails, the name keeps its earlier content.

    Args:
        path: of the file, in a folder that exists.
        mode: "wb" or "w".
    """
    aside = path + PARTIAL
    try:
        with open(aside, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        if os.path.exists(aside):
            os.remove(aside)
        raise
    # Without this, a loss of power may lose the new name.
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class AtomicWrites:
    """A path manager that writes local files by :func:`written_whole`, else uses another."""

    def __init__(self, path_manager: Any) -> None:
        self._path_manager = path_manager

    def __getattr__(self, name: str) -> Any:
        return getattr(self._path_manager, name)

    def open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
        """A context manager that opens a file."""
        if mode in ("w", "wb") and "://" not in path:
            return written_whole(path, mode)
        return self._path_manager.open(path, mode, **kwargs)


@contextmanager
def explained_full_disk(what: str, remedy: str) -> Iterator[None]:
    """Within it, a full disk, a full quota or a file too large is a :class:`UserError`.

    Args:
        what: is written, for the message.
        remedy: what the user can do.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch's writer of archives raises its own error while it handles the system's.
        cause: BaseException | None = error
        while cause is not None and not (isinstance(cause, OSError) and cause.errno in _FULL):
            cause = cause.__context__
        if cause is None:
            raise
        raise UserError(f"cannot write {what}: {os.strerror(cause.errno)}; {remedy}") from error


def make_output_dir(folder: str, key: str) -> None:
    """Makes a folder for output, unless it exists; "" is the working directory.

    Raises:
        UserError: the folder, which the config's ``key`` names, cannot be made or written to.
    """
    if "://" in folder:  # Detectron2's path manager makes it
        return
    try:
        os.makedirs(folder or ".", exist_ok=True)
        if not os.access(folder or ".", os.W_OK | os.X_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{key} is {folder!r}, where no files can be written: {reason}; give another folder"
        ) from error

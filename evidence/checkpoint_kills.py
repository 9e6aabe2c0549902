"""A training that kills itself while it writes a checkpoint, at a chosen moment."""

from __future__ import annotations

import io
import os
import signal
import sys
from typing import Any

from fpn_plugin.cli.train import train_main
from fpn_plugin.engine import run_tool
from fpn_plugin.utils import atomic

__all__ = ["MOMENTS", "train_until"]

MOMENTS = ("among its bytes", "before they are on the disk", "before it has its name",
           "before last_checkpoint names it")  # fmt: skip
"""When the process is killed."""

_BYTES = 40 << 20  # a checkpoint of the tiny model has more


def train_until() -> None:
    """Trains as ``fpn-plugin train``, in a process with arguments ``MOMENT NTH FRACTION ...``.

    At that moment of the n-th checkpoint that it writes, the process sends itself SIGKILL.
    ``FRACTION`` says after what part of the bytes. With the moment "never" it does not.
    """
    moment, nth, fraction, *args = sys.argv[1:]
    writes = 0

    def due(name: str, path: str) -> bool:
        return name == moment and writes == int(nth) and ".pth" in path

    class KilledFile(io.FileIO):
        def write(self, data: Any) -> int:
            written = super().write(data)
            if due("among its bytes", self.name) and self.tell() > float(fraction) * _BYTES:
                _kill()
            return written

    def killed_open(path: str, mode: str = "r") -> Any:
        nonlocal writes
        if mode != "wb":
            return open(path, mode)
        writes += path.endswith(atomic.PARTIAL)
        return io.BufferedWriter(KilledFile(path, "w"))

    class KilledOs:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def fsync(self, descriptor: int) -> None:
            if due("before they are on the disk", os.readlink(f"/proc/self/fd/{descriptor}")):
                _kill()
            os.fsync(descriptor)

        def replace(self, aside: str, path: str) -> None:
            if due("before it has its name", path):
                _kill()
            os.replace(aside, path)
            if due("before last_checkpoint names it", path):
                _kill()

    atomic.open, atomic.os = killed_open, KilledOs()
    run_tool(lambda: train_main(args))


def _kill() -> None:
    os.killpg(os.getpgid(0), signal.SIGKILL)

"""Log lines of a run: all of them in log.txt, few on a terminal."""

from __future__ import annotations

import logging
import os
import re
import sys

from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from tqdm import tqdm

__all__ = ["LOGGERS", "add_loggers", "on_terminal", "set_up_loggers"]

LOGGERS = ("fvcore", "detectron2", "fpn_plugin")
"""The libraries whose log lines a run writes."""

_COLORS = re.compile(r"\x1b\[[0-9;]*m")


class _Terminal:
    """The terminal as a stream: lines are written above the line that shows the progress."""

    def write(self, text: str) -> None:
        tqdm.write(text, end="")

    def flush(self) -> None:
        sys.stdout.flush()


class _PlainFormatter(logging.Formatter):
    """Another formatter's lines without codes for colours.

    Detectron2 logs configs with such codes, in files too.
    """

    def __init__(self, formatter: logging.Formatter | None) -> None:
        super().__init__()
        self._formatter = formatter or logging.Formatter()

    def format(self, record: logging.LogRecord) -> str:
        return _COLORS.sub("", self._formatter.format(record))


def set_up_loggers(folder: str) -> None:
    """Sets up the loggers of a command's run.

    On a terminal, lines of Detectron2 and fvcore are shown only from warnings on: progress and
    results are shown by this plugin. Everywhere else, lines are those of Detectron2's
    ``default_setup``, without codes for colours.

    Args:
        folder: gets log.txt with all lines.
    """
    rank = comm.get_rank()
    before = [handler for name in LOGGERS for handler in logging.getLogger(name).handlers]
    # default_setup makes the first two calls again, word for word: Detectron2 adds nothing then.
    setup_logger(folder, distributed_rank=rank, name="fvcore")
    setup_logger(folder, distributed_rank=rank)
    setup_logger(folder, distributed_rank=rank, name="fpn_plugin")
    terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb" and "CI" not in os.environ
    for name in LOGGERS:
        for handler in logging.getLogger(name).handlers:
            if handler in before:
                continue
            if terminal and handler.stream is sys.stdout:
                handler.setStream(_Terminal())
                if name != "fpn_plugin":
                    handler.setLevel(logging.WARNING)
            else:
                handler.setFormatter(_PlainFormatter(handler.formatter))


def add_loggers(*names: str, folder: str | None = None) -> None:
    """Sets up loggers, as Detectron2 does, that nothing has set up.

    Args:
        names: of :data:`LOGGERS`.
        folder: gets log.txt; None for no file.
    """
    for name in names:
        if not logging.getLogger(name).isEnabledFor(logging.INFO):
            setup_logger(folder, distributed_rank=comm.get_rank(), name=name)


def on_terminal() -> bool:
    """Whether :func:`set_up_loggers` has found a terminal, in this process."""
    handlers = logging.getLogger("detectron2").handlers
    return any(isinstance(getattr(each, "stream", None), _Terminal) for each in handlers)

"""Commands as functions, for notebooks and scripts.

The arguments are those of the command by name, with ``_`` for ``-``: ``--config-file my.yaml`` is
``config_file="my.yaml"``, ``--resume`` is ``resume=True``. An option that may be repeated takes a
list. ``opts`` is the list of config keys and values: ``opts=["SOLVER.MAX_ITER", 500]``.

A function raises a :class:`UserError` for what the command reports as an error.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from detectron2.utils.logger import setup_logger

from fpn_plugin.engine.launch import explained_files, quiet_third_parties
from fpn_plugin.engine.logs import LOGGERS

from .check import check_files
from .common import Arguments
from .fit import fit_main
from .train import train_main

__all__ = ["check", "fit", "train"]


def check(dataset: str | Path, folder: str | Path | None = None, **options: Any) -> dict[str, Any]:
    """Prints what is wrong with COCO-format data: ``fpn-plugin check``.

    Args:
        dataset: a COCO JSON, ``"NAME=JSON:IMAGES"``, or the name of a registered dataset.
        folder: the images of a JSON.
        options: of the command; ``fpn-plugin check --help`` lists them.

    Returns:
        ``{"refused": int, "warnings": int, ...}``, as ``--json`` writes it. Training takes the data
        if nothing is refused.
    """
    return _call(check_files, {"dataset": dataset, "folder": folder, **options})


def fit(config_file: str | Path, **options: Any) -> Path:
    """Fits a config's pyramid to labelled boxes: ``fpn-plugin fit``.

    Args:
        config_file: path of a config, or the name of a packaged one.
        options: of the command; ``fpn-plugin fit --help`` lists them.

    Returns:
        The folder of fitted.yaml, report.md and report.json.
    """
    return _call(fit_main, {"config_file": config_file, **options})


def train(config_file: str | Path, **options: Any) -> Path:
    """Trains a model and evaluates it: ``fpn-plugin train``.

    Args:
        config_file: path of a config, or the name of a packaged one.
        options: of the command; ``fpn-plugin train --help`` lists them.

    Returns:
        OUTPUT_DIR, the folder that :class:`fpn_plugin.Detector` takes.
    """
    return _call(train_main, {"config_file": config_file, **options})


def _call(command: Callable[[Arguments], Any], values: dict[str, Any]) -> Any:
    quiet_third_parties()
    with explained_files(), _log_handlers_kept():
        return command(values)


@contextmanager
def _log_handlers_kept() -> Iterator[None]:
    """Removes the log handlers that are added within it.

    Detectron2 adds handlers for each output folder. With those of the runs before, each line would
    be shown several times, and written to their log.txt too.
    """
    loggers = [logging.getLogger(name) for name in LOGGERS]
    before = [list(logger.handlers) for logger in loggers]
    try:
        yield
    finally:
        for logger, handlers in zip(loggers, before, strict=True):
            logger.handlers[:] = handlers
        setup_logger.cache_clear()  # the same folder gets its handlers again

"""``fpn-plugin evaluate``: training's ``--eval-only`` by its own name."""

from __future__ import annotations

from collections.abc import Sequence

from .train import train_main

__all__ = ["evaluate_main"]


def evaluate_main(argv: Sequence[str] | None = None) -> None:
    """Evaluates what the command line says; see :func:`train_main`."""
    train_main(argv, command="evaluate")

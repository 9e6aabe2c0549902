"""The command line's word for optimising: --optimize DTYPE."""

from __future__ import annotations

import argparse

import torch

__all__ = ["add_optimize_argument", "optimize_dtype"]

_DTYPES = ("float32", "bfloat16", "float16")


def add_optimize_argument(parser: argparse.ArgumentParser) -> None:
    """Adds --optimize to a tool's arguments."""
    parser.add_argument(
        "--optimize",
        choices=_DTYPES,
        help="run a fast copy of the model: float32 gives the same detections",
    )


def optimize_dtype(args: argparse.Namespace) -> torch.dtype | None:
    """The dtype that was asked for; None for the model as it is."""
    return None if args.optimize is None else getattr(torch, args.optimize)

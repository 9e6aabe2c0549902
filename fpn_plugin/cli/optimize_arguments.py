"""The command line's word for optimising: --optimize DTYPE."""

from __future__ import annotations

import argparse

import torch
from torch import nn

from fpn_plugin.deploy.optimize import dtype_of, steps_of

__all__ = ["add_optimize_argument", "dtype_name", "optimize_dtype", "print_steps"]

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


def print_steps(model: nn.Module) -> None:
    """Says what was done to an optimised model, and what was skipped; nothing of any other."""
    if steps_of(model):
        print(f"optimised, {dtype_name(model)}:", *steps_of(model), sep="\n  ")


def dtype_name(model: nn.Module) -> str:
    """The dtype that a model's backbone runs in, as "bfloat16"."""
    return str(dtype_of(model)).removeprefix("torch.")

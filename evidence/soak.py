"""``python -m evidence.soak``: trains and evaluates for long, and measures memory growth."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.evaluation import DatasetEvaluator
from torch import nn
from tqdm import tqdm

from fpn_plugin.cli.common import ToolParser, at_least, output_folder
from fpn_plugin.data import register_datasets
from fpn_plugin.engine import FPNTrainer, load_config, run_tool
from fpn_plugin.errors import UserError

from .tiny import make_new_folder, make_squares, tiny_options

__all__ = ["slope", "soak_main"]


def soak_main(argv: Sequence[str] | None = None) -> None:
    """Trains, evaluates, and prints the slope of this process's memory in each.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: the folder is there or cannot be made; too few readings are left.
    """
    parser = ToolParser(
        description="Train and evaluate a tiny detector for long, and report how much memory "
        "each iteration and each image adds."
    )
    parser.add_argument("--iterations", type=at_least(1), default=2000)
    parser.add_argument("--images", type=at_least(1), default=2000, help="to evaluate")
    parser.add_argument("--warm-up", type=at_least(0), default=400, help="left out of the slope")
    parser.add_argument(
        "--output", type=output_folder, default="output/soak", help="folder to make"
    )
    args = parser.parse_args(argv)
    folder = Path(args.output)
    if args.warm_up > min(args.iterations, args.images) - 100:
        raise UserError("--warm-up leaves fewer than 100 readings: raise --iterations, --images")
    make_new_folder(folder)
    dataset = make_squares(folder / "data", args.images)
    register_datasets([dataset])
    config, opts = _split(tiny_options(dataset, folder / "run", workers=0))
    opts += ["SOLVER.MAX_ITER", str(args.iterations), "SOLVER.CHECKPOINT_PERIOD", "500"]
    cfg = load_config(config, [*opts, "TEST.EVAL_PERIOD", "0"])
    report = {name: slope(rss, args.warm_up) for name, rss in _soak(cfg, args).items()}
    (folder / "report.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report, indent=1))


def slope(rss: Sequence[int], warm_up: int) -> dict[str, float]:
    """The line of least squares through memory over steps.

    Each reading depends on earlier ones, so an interval for independent readings would be too
    narrow. The interval is Student's, for the means of ten blocks.

    Args:
        rss: bytes after each step.
        warm_up: how many first readings to leave out.

    Returns:
        ``bytes_per_step``, ``interval_95`` (half its width), ``steps``, and ``mib`` at their
        beginning and end.
    """
    kept = np.asarray(rss[warm_up:], dtype=np.float64)
    blocks = list(np.array_split(np.arange(len(kept)), 10))
    at = np.array([block.mean() for block in blocks])
    mean = np.array([kept[block].mean() for block in blocks])
    centred = at - at.mean()
    per_step = float(centred @ mean / (centred @ centred))
    residual = mean - mean.mean() - per_step * centred
    error = float(np.sqrt(residual @ residual / (len(blocks) - 2) / (centred @ centred)))
    student = 2.306  # 97.5 % quantile of Student's t with 8 degrees of freedom
    return {
        "bytes_per_step": round(per_step, 1),
        "interval_95": round(student * error, 1),
        "steps": len(kept),
        "mib_at_begin": round(kept[0] / 2**20, 1),
        "mib_at_end": round(kept[-1] / 2**20, 1),
    }


def _split(args: list[str]) -> tuple[str, list[str]]:
    """Config file and options among arguments of train_net.py."""
    return args[args.index("--config-file") + 1], args[args.index("--resume") + 1 :]


def _soak(cfg: Any, args: argparse.Namespace) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    quiet = cfg.clone()
    quiet.defrost()
    quiet.DATASETS.TEST = ()
    trainer = FPNTrainer(quiet)
    test = FPNTrainer.test
    model, images = trainer.model, args.images
    without = "evaluation without keeping predictions"
    for name, total, unit, call in (
        ("training", args.iterations, "iteration", trainer.train),
        ("evaluation", images, "image", lambda: test(cfg, model)),
        (without, images, "image", lambda: test(cfg, model, _KeepsNothing())),
    ):
        with tqdm(total=total, unit=unit) as bar, _readings(trainer.model, bar) as found[name]:
            call()
    return found


class _KeepsNothing(DatasetEvaluator):
    """Keeps no predictions. COCOEvaluator keeps all until the end."""

    def evaluate(self) -> dict[str, Any]:
        return {}


def _rss() -> int:
    """Bytes of memory that this process holds, as Linux counts them."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise UserError("/proc/self/status has no VmRSS: this needs Linux")


@contextmanager
def _readings(model: nn.Module, bar: tqdm) -> Iterator[list[int]]:
    """Collects the memory after each forward pass of a model, in its block."""
    readings: list[int] = []

    def read(*_: Any) -> None:
        readings.append(_rss())
        bar.update()

    handle = model.register_forward_hook(read)
    try:
        yield readings
    finally:
        handle.remove()


if __name__ == "__main__":
    run_tool(soak_main)

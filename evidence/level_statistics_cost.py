"""``python -m evidence.level_statistics_cost``: the time that level statistics add to training."""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from detectron2.engine import SimpleTrainer
from detectron2.utils.events import EventStorage
from tabulate import tabulate
from torch import nn
from tqdm import tqdm

from fpn_plugin.cli.common import ToolParser, at_least
from fpn_plugin.data import check_datasets, register_datasets
from fpn_plugin.engine import run_tool
from fpn_plugin.engine.level_statistics import LevelStatistics
from fpn_plugin.engine.settings import config_on_device
from fpn_plugin.engine.trainer import FPNTrainer
from fpn_plugin.mini import ensure_mini_datasets

__all__ = ["argument_parser", "cost_main", "cost_table", "paired_seconds"]

_WARM_UP = 3
_EXAMPLES = """
Example:
  python -m evidence.level_statistics_cost --config-file mini/faster_rcnn_R_18_FPN.yaml --pairs 100
"""


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    parser = ToolParser(
        description="Time iterations with and without level statistics, batch by batch, and "
        "report the cost of MODEL.FPN.LEVEL_STATS_PERIOD. Weights are random and do not change.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--config-file", required=True, help="path of a config, or packaged name")
    parser.add_argument(
        "--pairs", type=at_least(1), default=60, help="batches to time, each both ways"
    )
    parser.add_argument("--dataset", action="append", default=[], metavar="NAME=JSON:IMAGES")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def cost_main(argv: Sequence[str] | None = None) -> None:
    """Prints the cost of an iteration with statistics, and of statistics at the config's period.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: something given cannot be used.
    """
    args = argument_parser().parse_args(argv)
    cfg = config_on_device(args.config_file, args.opts)
    period = cfg.MODEL.FPN.LEVEL_STATS_PERIOD or 20
    register_datasets(args.dataset)
    check_datasets(cfg.DATASETS.TRAIN, "DATASETS.TRAIN")
    ensure_mini_datasets(cfg.DATASETS.TRAIN)
    model = FPNTrainer.build_model(cfg)
    batches = itertools.islice(FPNTrainer.build_train_loader(cfg), args.pairs + _WARM_UP)
    shown = tqdm(batches, total=args.pairs + _WARM_UP, desc="timing", unit="pair")
    plain, observed = paired_seconds(model, shown, args.pairs)
    print(cost_table(plain, observed, period))


def cost_table(plain: Sequence[float], observed: Sequence[float], period: int) -> str:
    """Describes paired timings: medians, spread and ratio.

    Args:
        plain: seconds of iterations without statistics.
        observed: seconds with them, of the same batches.
        period: MODEL.FPN.LEVEL_STATS_PERIOD.
    """
    differences = [b - a for a, b in zip(plain, observed, strict=True)]
    usual, more = statistics.median(plain), statistics.median(differences)
    rows = [
        [name, *(1000 * v for v in (statistics.median(taken), *_middle_half(taken)))]
        for name, taken in (
            ("plain iteration", plain),
            ("observed iteration", observed),
            ("difference in a pair", differences),
        )
    ]
    headers = [f"ms, {len(plain)} pairs", "median", "25%", "75%"]
    ratios = [b / a for a, b in zip(plain, observed, strict=True)]
    low, high = _middle_half(ratios)
    return (
        f"{tabulate(rows, headers=headers, tablefmt='github', floatfmt='.1f')}\n"
        f"observed / plain: {statistics.median(ratios):.3f} in the median of pairs "
        f"({low:.3f} to {high:.3f} in the middle half)\n"
        f"level statistics every {period} iterations: {100 * more / usual / period:+.2f}% of the "
        "time of training (median difference / median of plain / period)"
    )


def _middle_half(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def paired_seconds(
    model: nn.Module, batches: Iterable[Any], pairs: int, warm_up: int = _WARM_UP
) -> tuple[list[float], list[float]]:
    """Seconds of training iterations without and with statistics, on the same batches.

    Which comes first changes from batch to batch. The learning rate is 0, so that random weights
    stay finite.

    Args:
        model: in training mode.
        batches: as a training loader gives them.
        pairs: how many to time.
        warm_up: how many more to run before, untimed.

    Returns:
        Seconds without and with, a pair for each batch.
    """
    batches = iter(batches)
    given: list[Any] = []

    def twice() -> Iterator[Any]:
        while True:
            yield given[-1]

    trainer = SimpleTrainer(model, twice(), torch.optim.SGD(model.parameters(), lr=0.0))
    hook = LevelStatistics(model, 1)
    trainer.register_hooks([hook])
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with EventStorage() as trainer.storage:
        for number in range(warm_up + pairs):
            given[:] = [next(batches)]
            for observing in (number % 2 == 0, number % 2 == 1):
                begun = _now()
                if observing:
                    hook.before_step()
                trainer.run_step()
                hook.after_step()
                if number >= warm_up:
                    seconds[observing].append(_now() - begun)
                trainer.iter += 1
    return seconds[False], seconds[True]


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    run_tool(cost_main)

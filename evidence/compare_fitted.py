"""``python -m evidence.compare_fitted``: trains a config, and the config fitted to a dataset."""

from __future__ import annotations

import argparse
import io
import json
import math
import statistics
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from detectron2.data import MetadataCatalog
from matplotlib.figure import Figure
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from tabulate import tabulate

from fpn_plugin.cli.common import ToolParser, at_least, output_folder
from fpn_plugin.data import Needs, check_datasets, register_datasets
from fpn_plugin.engine import find_config_file, load_config, run_tool
from fpn_plugin.errors import UserError, near_names
from fpn_plugin.fitting import Recommendation
from fpn_plugin.fitting.fit import fit_pyramid
from fpn_plugin.fitting.ground_truth import read_ground_truth
from fpn_plugin.fitting.report import write_config
from fpn_plugin.mini import ensure_mini_datasets
from fpn_plugin.mini.scene import KINDS
from fpn_plugin.paper.report import mean_with_spread
from fpn_plugin.paper.runs import RunFolder
from fpn_plugin.paper.scheduler import Task, run_tasks
from fpn_plugin.paper.tables import Run
from fpn_plugin.visualization.palette import CATEGORY_COLORS

__all__ = ["ComparedRun", "argument_parser", "compare_main"]

# Argument, and the kind of the mini dataset; --cells adds a dataset of one's own.
_DATA = {"small": "small", "default": "", "large": "large", "thin": "thin"}
_CELLS = "cells"
_CONFIG = "mini/faster_rcnn_R_18_FPN.yaml"
_METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR", "ARs", "ARm", "ARl")
_COLORS = dict(zip(("fitted", "default"), CATEGORY_COLORS, strict=False))
_MARKERS = {"default": "D", "fitted": "o"}
_AVERAGE_RECALL = {"AR": 8, "ARs": 9, "ARm": 10, "ARl": 11}  # places in COCOeval's figures

_EXAMPLES = """
Examples:
  python -m evidence.compare_fitted --seeds 0 1 2                  # all four datasets
  python -m evidence.compare_fitted small thin --seeds 0           # two of them, one seed
  python -m evidence.compare_fitted cells small --cells cells --at-once 8 --device cuda
  python -m evidence.compare_fitted --dry-run
"""


@dataclass(frozen=True)
class ComparedRun(RunFolder):
    """A training in ``<output>/<data>/<default or fitted>/seed<seed>``.

    Attributes:
        config_file: the config, or the fitted one.
        datasets: as --dataset takes them.
    """

    config_file: str = ""
    datasets: tuple[str, ...] = ()

    @property
    def config_name(self) -> str:
        """Its config."""
        return self.config_file

    def metrics(self) -> dict[str, float]:
        """AP and AR of a finished run, in percent, and seconds per iteration.

        AR is COCO's, of at most 100 detections. Detectron2 computes it and does not keep it.
        """
        outcome = self.outcome("bbox")
        found = {name: value for name, value in outcome.metrics.items() if "-" not in name}
        recall = self.kept("recall.json", self._recall)
        return {**found, **recall, "s/it": outcome.seconds_per_iteration}

    def _recall(self) -> dict[str, float]:
        [name] = self.config().DATASETS.TEST
        detections = self.path / "inference" / "coco_instances_results.json"
        with redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            truth = COCO(MetadataCatalog.get(name).json_file)
            if not json.loads(detections.read_text()):
                return dict.fromkeys(_AVERAGE_RECALL, 0.0)
            evaluation = COCOeval(truth, truth.loadRes(str(detections)), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        figures = {name: float(evaluation.stats[i]) for name, i in _AVERAGE_RECALL.items()}
        # COCOeval has -1 if there is no object of a size.
        return {name: 100 * v if v >= 0 else float("nan") for name, v in figures.items()}


class ComparedTask(Task):
    """The training of a run, which names the run's datasets."""

    @property
    def name(self) -> str:
        """As the progress line shows it."""
        return f"{self.folder.scale} {super().name}"

    def command(self, num_gpus: int) -> list[str]:
        """Its command line."""
        words = super().command(num_gpus)
        named = [word for spec in self.folder.datasets for word in ("--dataset", spec)]
        at = words.index("train") + 1
        return [*words[:at], *named, *words[at:]]


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    parser = ToolParser(
        description="Train a config and the fitted config for the same number of iterations, on "
        "mini datasets of small, mixed, large and long thin objects and on a dataset of your own, "
        "and compare them. Finished runs are kept, and reported if the others are interrupted. "
        "Interrupted runs continue.",
        epilog=_EXAMPLES,
    )
    parser.add_argument(
        "data", nargs="*", default=list(_DATA), help=", ".join([*_DATA, f"{_CELLS} (of --cells)"])
    )
    parser.add_argument(
        "--cells", metavar="FOLDER", help="has train.json, val.json and images/, in COCO format"
    )
    parser.add_argument("--seeds", nargs="+", type=at_least(0), default=[0], metavar="SEED")
    parser.add_argument("--config-file", default=_CONFIG, help=f"what is fitted; {_CONFIG}")
    parser.add_argument(
        "--output", type=output_folder, default="output/fitted", help="folder of runs and report"
    )
    parser.add_argument(
        "--at-once", type=at_least(1, 1024), default=1, metavar="N", help="runs at a time"
    )
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="MODEL.DEVICE of the runs; the config's by default",
    )
    parser.add_argument("--dry-run", action="store_true", help="fit, list what would run, stop")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="config options: KEY VALUE ..."
    )
    return parser


def compare_main(argv: Sequence[str] | None = None) -> None:
    """Fits, trains what is missing, and writes report.md, report.json and comparison.png.

    The report has all runs that have finished, also if others fail or are interrupted.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: unknown data, a folder made by another config or other code, a failed run.
    """
    args = argument_parser().parse_args(argv)
    known = [*_DATA, *([_CELLS] if args.cells else [])]
    if args.cells is not None and not Path(args.cells, "train.json").is_file():
        raise UserError(f"--cells {args.cells!r} has no train.json")
    for name in args.data:
        if name == _CELLS and not args.cells:
            raise UserError("cells are compared, and --cells does not name their folder")
        if name not in known:
            raise UserError(f"no data {name!r}: {near_names(name, known)}")
    output = Path(args.output)
    if _CELLS in args.data:
        register_datasets(_cells(args))
    compared = {name: _fitted(name, args, output) for name in dict.fromkeys(args.data)}
    seeds = list(dict.fromkeys(args.seeds))
    folders = {
        (name, which, seed): _folder(name, which, seed, args, output)
        for seed in seeds
        for name, found in compared.items()
        for which in (("default", "fitted") if found.changes else ("default",))
    }
    for folder in folders.values():
        folder.check()
    if args.dry_run:
        for (name, which, seed), folder in folders.items():
            state = "finished" if folder.finished else "to run"
            print(f"{state:>9}  {name} {which} seed {seed}")
        return
    try:
        run_tasks([ComparedTask(folder, dump=False) for folder in folders.values()], args.at_once)
    finally:
        for (name, which, seed), folder in folders.items():
            if folder.finished:
                compared[name].runs.setdefault(which, {})[seed] = folder.metrics()
        iterations = next(iter(folders.values())).config().SOLVER.MAX_ITER
        report = write_comparison(list(compared.values()), iterations, output)
        print(f"{report.read_text()}\nreport: {report}")


def _cells(args: argparse.Namespace) -> list[str]:
    """The folder of --cells as --dataset takes it."""
    folder = Path(args.cells)
    return [f"{_CELLS}_{split}={folder}/{split}.json:{folder}/images" for split in ("train", "val")]


def _opts(name: str, args: argparse.Namespace) -> tuple[str, ...]:
    if name == _CELLS:
        prefix, classes = _CELLS, len(MetadataCatalog.get(f"{_CELLS}_train").thing_classes)
    else:
        kind = _DATA[name]
        prefix, classes = "_".join(filter(None, ("mini", kind))), len(KINDS[kind].categories)
    device = ("MODEL.DEVICE", args.device) if args.device else ()
    return (
        "DATASETS.TRAIN", f"('{prefix}_train',)", "DATASETS.TEST", f"('{prefix}_val',)",
        "MODEL.ROI_HEADS.NUM_CLASSES", str(classes), *device, *args.opts,
    )  # fmt: skip


def _fitted(name: str, args: argparse.Namespace, output: Path) -> Compared:
    """Fits the config to a dataset and writes the fitted one next to the runs."""
    opts = _opts(name, args)
    cfg = load_config(args.config_file, opts)
    for split in ("TRAIN", "TEST"):
        check_datasets(cfg.DATASETS[split], f"DATASETS.{split}", registers=False)
    ensure_mini_datasets([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    needs = Needs.of(cfg, training=True)
    fit = fit_pyramid(cfg, read_ground_truth(cfg.DATASETS.TRAIN, needs, "DATASETS.TRAIN"))
    base, fitted = Path(find_config_file(args.config_file)), output / name / "fitted.yaml"
    fitted.parent.mkdir(parents=True, exist_ok=True)
    write_config(fit, base, opts[::2], fitted)
    return Compared(name, fit.recommendations)


def _folder(
    name: str, which: str, seed: int, args: argparse.Namespace, output: Path
) -> ComparedRun:
    fitted = which == "fitted"
    return ComparedRun(
        run=Run(which),
        scale=name,
        seed=seed,
        output=output,
        opts=_opts(name, args),
        config_file=str(output / name / "fitted.yaml") if fitted else args.config_file,
        datasets=tuple(_cells(args)) if name == _CELLS else (),
    )


@dataclass
class Compared:
    """The comparison on one dataset.

    Attributes:
        name: of the dataset.
        recommendations: of fitting the config to it.
        runs: metrics by seed, for "default" and "fitted".
    """

    name: str
    recommendations: list[Recommendation]
    runs: dict[str, dict[int, dict[str, float]]] = field(default_factory=dict)

    @property
    def changes(self) -> list[str]:
        """Subjects that fitting changes."""
        return [each.subject for each in self.recommendations if not each.keep]

    def values(self, which: str, metric: str) -> list[float]:
        """A metric of every seed, in their order."""
        return [run[metric] for _, run in sorted(self.runs.get(which, {}).items())]


def write_comparison(compared: Sequence[Compared], iterations: int, folder: Path) -> Path:
    """Writes the report.

    Args:
        compared: the comparison on each dataset.
        iterations: of each training.
        folder: gets report.md, report.json and comparison.png.

    Returns:
        The path of report.md.
    """
    parts = [
        "# A pyramid as it is and fitted, trained equally long",
        "**Short runs on small datasets: they say nothing about COCO.** Each "
        f"training has {iterations} iterations. ±: standard deviation over seeds. AR: of at most "
        "100 detections an image.",
        _table(compared),
        "![AP with the config as it is and fitted](comparison.png)",
        *(_in_words(each) for each in compared),
    ]
    _chart(compared).savefig(folder / "comparison.png")
    content = {"iterations": iterations, "data": [_without_nan(asdict(each)) for each in compared]}
    (folder / "report.json").write_text(json.dumps(content, indent=1))
    report = folder / "report.md"
    report.write_text("\n\n".join(parts) + "\n")
    return report


def _without_nan(value: Any) -> Any:
    """Replaces NaN, which JSON does not have, by None."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _table(compared: Sequence[Compared]) -> str:
    rows = []
    for each in compared:
        for which, runs in each.runs.items():
            cells = (_cell(each.values(which, metric)) for metric in _METRICS)
            seconds = f"{statistics.median(each.values(which, 's/it')):.2f}"
            rows.append([each.name, which, ",".join(map(str, sorted(runs))), *cells, seconds])
        if not each.changes:
            rows.append([each.name, "fitted", "the config is kept"])
    headers = ["data", "pyramid", "seeds", *_METRICS, "s/it"]
    return tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True)


def _cell(values: Sequence[float]) -> str:
    if any(map(math.isnan, values)):
        return "-"
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return mean_with_spread(statistics.mean(values), spread, len(values))


def _in_words(each: Compared) -> str:
    """The gains of fitting, and what it changed."""
    if not each.changes:
        return f"**{each.name}**: the config is kept; there is nothing to compare."
    gains = []
    both = set.intersection(*(set(each.runs.get(w, {})) for w in ("default", "fitted")))
    for metric in ("AP", "AR") if both else ():
        default, fitted = (
            [each.runs[which][seed][metric] for seed in sorted(both)]
            for which in ("default", "fitted")
        )
        gain = statistics.mean(fitted) - statistics.mean(default)
        text = f"{metric} {gain:+.1f}"
        if len(fitted) > 1:
            pairs = zip(default, fitted, strict=True)
            higher = sum(b > a for a, b in pairs)
            text += f" (higher with {higher} of {len(fitted)} seeds)"
        gains.append(text)
    gained = ", ".join(gains) or "no seed has finished with both"
    lines = [f"**{each.name}**: {gained}. Fitting changes {' and '.join(each.changes)}."]
    lines += [f"- {r.subject}: {r.reason} {r.effect}" for r in each.recommendations if not r.keep]
    return "\n".join(lines)


def _chart(compared: Sequence[Compared]) -> Figure:
    with matplotlib.rc_context({"font.size": 13}):
        figure = Figure(figsize=(10, 1.8 + len(compared)), dpi=120, layout="constrained")
        all_axes = figure.subplots(1, 2, sharey=True)
        for axes, metric in zip(all_axes, ("AP", "AR"), strict=True):
            for which, shift in (("default", -0.14), ("fitted", 0.14)):
                for place, each in enumerate(compared):
                    values = each.values(which, metric)
                    if not values:
                        continue
                    at, color = place + shift, _COLORS[which]
                    axes.plot(values, [at] * len(values), ".", color=color, alpha=0.5, ms=8)
                    mean = statistics.mean(values)
                    axes.plot(
                        mean, at, _MARKERS[which], color=color, mec="black", ms=10,
                        label="as it is" if which == "default" else "fitted",
                    )  # fmt: skip
                    axes.annotate(
                        f"{mean:.1f}", (mean, at), (0, -15 if shift > 0 else 15),
                        textcoords="offset points", ha="center", va="center",
                    )  # fmt: skip
            axes.set_title(metric)
            axes.grid(axis="x", alpha=0.3)
            axes.margins(x=0.2, y=0.2)
            axes.set_xlabel("points; small marks: seeds")
        all_axes[0].set_yticks(range(len(compared)), [each.name for each in compared])
        all_axes[0].invert_yaxis()
        handles = dict(zip(*all_axes[0].get_legend_handles_labels()[::-1], strict=True))
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=2)
    return figure


if __name__ == "__main__":
    run_tool(compare_main)

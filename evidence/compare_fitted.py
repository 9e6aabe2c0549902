"""``python -m evidence.compare_fitted``: trains a config and its fitted sibling."""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

from detectron2.data import MetadataCatalog
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpn_plugin.cli.common import ToolParser, at_least, output_folder
from fpn_plugin.data import Needs, check_datasets
from fpn_plugin.engine import find_config_file, load_config, run_tool
from fpn_plugin.errors import UserError, near_names
from fpn_plugin.fitting.fit import fit_pyramid
from fpn_plugin.fitting.ground_truth import read_ground_truth
from fpn_plugin.fitting.report import write_report
from fpn_plugin.mini import ensure_mini_datasets
from fpn_plugin.mini.scene import KINDS
from fpn_plugin.paper.runs import RunFolder
from fpn_plugin.paper.scheduler import run_tasks, tasks_for
from fpn_plugin.paper.tables import Run

from .compare_report import Compared, write_comparison

__all__ = ["ComparedRun", "argument_parser", "compare_main"]

# As they are asked for, and the kind of mini dataset that each is.
_DATA = {"small": "small", "default": "", "large": "large", "thin": "thin"}
_CONFIG = "mini/faster_rcnn_R_18_FPN.yaml"
_AVERAGE_RECALL = {"AR": 8, "ARs": 9, "ARm": 10, "ARl": 11}  # places in COCOeval's figures

_EXAMPLES = """
Examples:
  python -m evidence.compare_fitted --seeds 0 1 2                  # all four datasets
  python -m evidence.compare_fitted small thin --seeds 0           # two of them, one seed
  python -m evidence.compare_fitted --dry-run
"""


@dataclass(frozen=True)
class ComparedRun(RunFolder):
    """A training in ``<output>/<data>/<default or fitted>/seed<seed>``.

    Attributes:
        config_file: the config, or the fitted one.
    """

    config_file: str = ""

    @property
    def config_name(self) -> str:
        """Its config."""
        return self.config_file

    def metrics(self) -> dict[str, float]:
        """AP and AR of a finished run, in percent, and seconds per iteration.

        AR is COCO's of at most 100 detections, which Detectron2 computes and does not keep.
        """
        outcome = self.outcome("bbox")
        found = {name: value for name, value in outcome.metrics.items() if "-" not in name}
        cached = self.path / "recall.json"
        if not cached.is_file():
            cached.write_text(json.dumps(self._recall()))
        return {
            **found,
            **json.loads(cached.read_text()),
            "s/it": outcome.seconds_per_iteration,
        }

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


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    parser = ToolParser(
        description="Train a config and its fitted sibling for as many iterations, on mini "
        "datasets of small, mixed, large and long thin objects, and compare them. Finished runs "
        "are kept, interrupted ones continue.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("data", nargs="*", default=list(_DATA), help=", ".join(_DATA))
    parser.add_argument("--seeds", nargs="+", type=at_least(0), default=[0], metavar="SEED")
    parser.add_argument("--config-file", default=_CONFIG, help=f"what is fitted; {_CONFIG}")
    parser.add_argument(
        "--output", type=output_folder, default="output/fitted", help="folder of runs and report"
    )
    parser.add_argument(
        "--at-once", type=at_least(1, 1024), default=1, metavar="N", help="runs at a time"
    )
    parser.add_argument("--dry-run", action="store_true", help="fit, list what would run, stop")
    parser.add_argument(
        "--opts", nargs=argparse.REMAINDER, default=[], help="config options: KEY VALUE ..."
    )
    return parser


def compare_main(argv: Sequence[str] | None = None) -> None:
    """Fits, trains what is missing, and writes report.md, report.json and comparison.png.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: unknown data, a folder made by another config or other code, a failed run.
    """
    args = argument_parser().parse_args(argv)
    for name in args.data:
        if name not in _DATA:
            raise UserError(f"no data {name!r}: {near_names(name, _DATA)}")
    output = Path(args.output)
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
    tasks = tasks_for(list(folders.values()))
    if args.dry_run:
        for (name, which, seed), folder in folders.items():
            state = "finished" if folder.finished else "to run"
            print(f"{state:>9}  {name} {which} seed {seed}")
        return
    run_tasks(tasks, args.at_once)
    for (name, which, seed), folder in folders.items():
        compared[name].runs.setdefault(which, {})[seed] = folder.metrics()
    iterations = next(iter(folders.values())).config().SOLVER.MAX_ITER
    report = write_comparison(list(compared.values()), iterations, output)
    print(f"{report.read_text()}\nreport: {report}")


def _opts(name: str, args: argparse.Namespace) -> tuple[str, ...]:
    kind = _DATA[name]
    prefix = "_".join(filter(None, ("mini", kind)))
    return (
        "DATASETS.TRAIN", f"('{prefix}_train',)", "DATASETS.TEST", f"('{prefix}_val',)",
        "MODEL.ROI_HEADS.NUM_CLASSES", str(len(KINDS[kind].categories)), *args.opts,
    )  # fmt: skip


def _fitted(name: str, args: argparse.Namespace, output: Path) -> Compared:
    """Fits the config to a dataset and writes the fit's report next to the runs."""
    opts = _opts(name, args)
    cfg = load_config(args.config_file, opts)
    for split in ("TRAIN", "TEST"):
        check_datasets(cfg.DATASETS[split], f"DATASETS.{split}", registers=False)
    ensure_mini_datasets([*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST])
    needs = Needs.of(cfg, training=True)
    fit = fit_pyramid(cfg, read_ground_truth(cfg.DATASETS.TRAIN, needs, "DATASETS.TRAIN"))
    base = Path(find_config_file(args.config_file))
    write_report(fit, cfg.DATASETS.TRAIN, base, opts[::2], output / name / "fit")
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
        config_file=str(output / name / "fit" / "fitted.yaml") if fitted else args.config_file,
    )


if __name__ == "__main__":
    run_tool(compare_main)

"""``python -m evidence.benchmark``: measures, and writes the report after each measurement."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from torch import nn
from tqdm import tqdm

from fpn_plugin.cli.common import ToolParser, at_least, input_file, output_folder
from fpn_plugin.deploy import optimize_for_inference
from fpn_plugin.deploy.comparison import Agreement
from fpn_plugin.deploy.graphs import tf32_set
from fpn_plugin.engine.checkpoint import StrictCheckpointer
from fpn_plugin.engine.settings import load_config, settled_device
from fpn_plugin.engine.trainer import FPNTrainer
from fpn_plugin.errors import UserError

from .cuda import CudaBench
from .measure import SCALINGS, Bench, memory, scaling
from .models import photograph
from .report import LEAST_PAIRS, UNITS, environment, one_line, spread, write_report
from .timing import Comparison

__all__ = ["argument_parser", "benchmark_main"]

# In this order: inference after training is faster, in the memory that training leaves.
_BENCHES = {"cpu": Bench, "cuda": CudaBench}
_COMPARING = ("comparisons", "steps", "training")
_PARTS = (*_COMPARING, "profile", "memory", "accuracy", "scaling")


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of the command."""
    parser = ToolParser(
        description="Time the plugin against stock Detectron2 and torchvision. Run nothing else "
        "on the machine. On a GPU, times include moving the results to the host.",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument(
        "--output", type=output_folder, default="output/benchmark", help="folder to write to"
    )
    pairs = f"timed pairs of each comparison; fewer than {LEAST_PAIRS} are a trial"
    parser.add_argument("--pairs", type=at_least(1), default=LEAST_PAIRS, help=pairs)
    parser.add_argument(
        "--size", type=at_least(1, 10_000), nargs=2, default=(800, 1216), metavar=("H", "W")
    )
    parser.add_argument("--image", type=input_file, help="a photograph; scikit-learn's by default")
    parser.add_argument(
        "--threads", type=at_least(1, 1024), help="threads of torch; its own choice by default"
    )
    trained = "folder of a training, for example output/demo: compare its AP and its detections"
    parser.add_argument("--trained", metavar="RUN", help=trained)
    parser.add_argument("--parts", nargs="+", choices=_PARTS, default=_PARTS)
    return parser


def benchmark_main(argv: Sequence[str] | None = None) -> None:
    """Runs the parts asked for.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: something given cannot be used.
    """
    args = argument_parser().parse_args(argv)
    for name in ("config.yaml", "model_final.pth") if args.trained else ():
        if not Path(args.trained, name).is_file():
            raise UserError(f"--trained {args.trained!r} has no {name}: name a run's OUTPUT_DIR")
    device = settled_device(args.device, True, 1, "--device")
    if args.threads:
        torch.set_num_threads(args.threads)
    folder, size = Path(args.output), tuple(args.size)
    content: dict[str, Any] = {"environment": environment(device, size, args.pairs)}
    print(one_line(content["environment"]))
    done: dict[str, list[Comparison]] = {part: [] for part in _COMPARING}
    if {*_COMPARING, "profile"} & set(args.parts):
        bench = _BENCHES[device](device, photograph(args.image, *size), args.pairs)
        content["differences"] = bench.differences()
        content["first_calls"] = bench.first_calls
        for part in _COMPARING:
            for comparison in getattr(bench, part)() if part in args.parts else ():
                done[part].append(comparison)
                print(_line(comparison, device))
                write_report(folder, content, done)
            for name, values in bench.figures(part) if part in args.parts else ():
                content[name] = values
                write_report(folder, content, done)
            if part == "comparisons" and "profile" in args.parts:
                content["profile"] = bench.profile()
        del bench
    if "memory" in args.parts:
        content["memory"] = memory(device, *size, args.image)
        write_report(folder, content, done)
    if "accuracy" in args.parts and args.trained:
        content |= _accuracy(Path(args.trained), device)
        write_report(folder, content, done)
    if "scaling" in args.parts:
        points = [(what, value) for what, values in SCALINGS.items() for value in values]
        content["scaling"] = {what: {} for what in SCALINGS}
        for what, value in tqdm(points, desc="scaling", unit="point"):
            content["scaling"][what][value] = scaling(what, value, device, args.image)
            write_report(folder, content, done)
    print(f"report: {write_report(folder, content, done)}")


def _line(comparison: Comparison, device: str) -> str:
    """A comparison in a line: medians, least and greatest."""
    unit = UNITS[device]
    theirs, ours = unit.spread(comparison.baseline_seconds), unit.spread(comparison.seconds)
    return (
        f"{comparison.name}, against {comparison.baseline}: {theirs} {unit.symbol} and "
        f"{ours} {unit.symbol}, {spread(comparison.ratios, 2)} times faster"
    )


def _accuracy(run: Path, device: str) -> dict[str, dict[str, float]]:
    """AP of a trained model and its fast copies, and how well the float32 copy's detections agree;
    on a GPU also without TF32, and how the copy's calls ran.
    """
    cfg = load_config(str(run / "config.yaml"), ["MODEL.DEVICE", device])
    original = FPNTrainer.build_model(cfg)
    StrictCheckpointer(original, complete=True).load(str(run / "model_final.pth"))
    original.eval()
    half = torch.bfloat16 if device == "cpu" else torch.float16
    fast = optimize_for_inference(original)
    models = {
        "original": original,
        "optimised float32": fast,
        f"optimised {half}".replace("torch.", ""): optimize_for_inference(original, dtype=half),
    }
    dataset = cfg.DATASETS.TEST[0]
    points = {}
    for name, model in models.items():
        evaluator = COCOEvaluator(dataset, tasks=("bbox",), distributed=False)
        # Detectron2's own test(): the plugin's also writes files.
        results = DefaultTrainer.test.__func__(FPNTrainer, cfg, model, [evaluator])
        points[name] = results["bbox"]["AP"]
    loader = partial(FPNTrainer.build_test_loader, cfg, dataset)
    found = {"accuracy": points, "agreement": _agreement(original, fast, loader())}
    if device == "cuda":
        with tf32_set(False):
            found["agreement_without_tf32"] = _agreement(original, fast, loader())
        found["trained_calls"] = dict(getattr(getattr(fast, "graphs", None), "counts", {}))
    return found


def _agreement(original: nn.Module, fast: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
    agreement = Agreement()
    with torch.no_grad():
        for batch in tqdm(batches, desc="comparing"):
            for theirs, ours in zip(original(batch), fast(batch), strict=True):
                agreement.add(theirs["instances"].to("cpu"), ours["instances"].to("cpu"))
    return vars(agreement)

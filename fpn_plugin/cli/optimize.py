"""What tools/optimize.py does: says what optimising brings on a user's own images."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.structures import Instances
from PIL import Image
from tabulate import tabulate
from tqdm import tqdm

from fpn_plugin.data import read_picture, register_datasets
from fpn_plugin.deploy.comparison import Agreement
from fpn_plugin.deploy.optimize import optimize_for_inference
from fpn_plugin.engine.inference import Detector
from fpn_plugin.engine.settings import load_config, settle_device
from fpn_plugin.errors import UserError

from .common import ToolParser, at_least
from .optimize_arguments import dtype_name, print_steps

__all__ = ["argument_parser", "optimize_main"]

_EXAMPLES = """
Example:
  optimize.py --config-file output/demo/config.yaml --input photos/ \\
      MODEL.WEIGHTS output/demo/model_final.pth
"""


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of tools/optimize.py."""
    parser = ToolParser(
        description="Optimise a trained model and say what that brings: seconds an image, and "
        "whether detections are the same. demo.py and train_net.py --eval-only take --optimize.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--config-file", required=True, help="path of a config, or packaged name")
    parser.add_argument("--input", nargs="+", required=True, metavar="PATH", help="images, folders")
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"],
        choices=("float32", "bfloat16", "float16"),
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="compile the backbone as well")
    parser.add_argument(
        "--max-images", type=at_least(1), default=20, help="take only the first so many"
    )
    parser.add_argument("--dataset", action="append", default=[], metavar="NAME=JSON:IMAGES")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def optimize_main(argv: Sequence[str] | None = None) -> None:
    """Runs the original and its optimised copies in turn on each image, and prints a table.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: something given cannot be used.
    """
    args = argument_parser().parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    settle_device(cfg, "MODEL.DEVICE" in args.opts[::2])
    register_datasets(args.dataset)
    paths = list(_images(args.input))[: args.max_images]
    original = Detector(cfg)
    detectors, made_in = {"original": original}, {"original": 0.0}
    for dtype in args.dtypes:
        detector = Detector(cfg)
        started = time.perf_counter()
        detector.model = optimize_for_inference(
            original.model, dtype=getattr(torch, dtype), compile=args.compile
        )
        # Not always what was asked for: a CPU may lack half precision.
        ran = dtype_name(detector.model)
        name = dtype if ran == dtype else f"{ran} ({dtype} skipped)"
        detectors[name], made_in[name] = detector, time.perf_counter() - started
        print_steps(detector.model)
    seconds: dict[str, list[float]] = {name: [] for name in detectors}
    agreement = {name: Agreement() for name in detectors}
    for number, path in enumerate(tqdm(paths, desc="detecting", unit="image")):
        image = read_picture(cfg, path)
        outputs: dict[str, Instances] = {}
        for _ in range(2 if number == 0 else 1):  # a first call takes longer
            for name, detector in detectors.items():
                started = time.perf_counter()  # detections are on the CPU: nothing is left undone
                outputs[name] = detector(image)
                seconds[name].append(time.perf_counter() - started)
        for name, output in outputs.items():
            agreement[name].add(outputs["original"], output)
    medians = {name: statistics.median(taken[1:]) for name, taken in seconds.items()}
    rows = [
        [
            name,
            made_in[name],
            seconds[name][0],
            median,
            medians["original"] / median,
            *vars(agreement[name]).values(),
        ]
        for name, median in medians.items()
    ]
    headers = ["model", "made in (s)", "first call (s)", "s/image", "times faster"]
    headers += ["same", "missing", "extra", "box (px)", "score"]
    print(tabulate(rows, headers=headers, tablefmt="github", floatfmt=".4g"))
    print(
        "made in: optimising, and compiling where asked for; s/image: median without the first "
        "call; same: detections with a partner in the original's, of their class and IoU above "
        "0.5; missing, extra: those that only the original has, or only this model; box, score: "
        "largest difference between partners"
    )


def _images(given: Sequence[str]) -> list[Path]:
    suffixes = Image.registered_extensions()
    found: list[Path] = []
    for path in map(Path, given):
        if path.is_dir():
            found += sorted(p for p in path.iterdir() if p.suffix.lower() in suffixes)
        elif path.is_file():
            found.append(path)
        else:
            raise UserError(f"--input {str(path)!r} is neither a file nor a folder")
    if not found:
        raise UserError(f"--input {' '.join(given)!r} has no images")
    return found

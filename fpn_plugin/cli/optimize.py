"""``fpn-plugin optimize``: what optimising brings on a user's own images."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

import torch
from tabulate import tabulate
from tqdm import tqdm

from fpn_plugin.data import read_picture, register_datasets
from fpn_plugin.data.given_images import images_in
from fpn_plugin.deploy import optimize_for_inference
from fpn_plugin.deploy.comparison import compare_detectors
from fpn_plugin.deploy.optimize import dtype_name, print_steps
from fpn_plugin.engine.inference import Detector
from fpn_plugin.engine.settings import config_on_device

from .common import ToolParser, add_shared

__all__ = ["argument_parser", "optimize_main"]

_EXAMPLES = """
Example:
  fpn-plugin optimize --config-file output/demo/config.yaml --input photos/ \\
      MODEL.WEIGHTS output/demo/model_final.pth
"""


def argument_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = ToolParser(
        "fpn-plugin optimize",
        description="Optimise a trained model and measure what that brings: seconds an image, and "
        "whether detections are the same. Detecting and evaluating take --optimize.",
        epilog=_EXAMPLES,
    )
    add_shared(parser, "--input", required=True)
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"],
        choices=("float32", "bfloat16", "float16"),
    )  # fmt: skip
    parser.add_argument("--compile", action="store_true", help="compile the backbone as well")
    add_shared(parser, "--max-images", default=20)
    add_shared(parser, "--config-file", "--dataset", "opts")
    return parser


def optimize_main(argv: Sequence[str] | None = None) -> None:
    """Runs the original and its optimised copies in turn on each image, and prints a table.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: something given cannot be used.
    """
    args = argument_parser().parse_args(argv)
    cfg = config_on_device(args.config_file, args.opts)
    register_datasets(args.dataset)
    given = images_in(args.input, "--input")[: args.max_images]
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
    images = (read_picture(cfg, each.path) for each in tqdm(given, "detecting", unit="image"))
    measured = compare_detectors(detectors, images)
    baseline = measured["original"][1]
    rows = [
        [name, made_in[name], first, median, baseline / median, *vars(agreement).values()]
        for name, (first, median, agreement) in measured.items()
    ]
    headers = ["model", "made in (s)", "first call (s)", "s/image", "times faster"]
    headers += ["same", "missing", "extra", "box (px)", "score"]
    print(tabulate(rows, headers=headers, tablefmt="github", floatfmt=".4g"))
    print(
        "made in: optimising, and compiling if asked for; s/image: median without the first "
        "call; same: detections with a partner in the original's, of their class and IoU above "
        "0.5; missing, extra: those that only the original has, or only this model; box, score: "
        "largest difference between partners"
    )

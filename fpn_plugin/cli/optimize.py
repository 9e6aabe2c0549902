r"""Optimise a trained model, and measure seconds an image and whether detections are the same.
The commands detect and evaluate take --optimize.

Example:
  fpn-plugin optimize --config-file output/demo/config.yaml --input photos/ \
      MODEL.WEIGHTS output/demo/model_final.pth
"""

from __future__ import annotations

import time

import torch
from tabulate import tabulate
from tqdm import tqdm

from fpn_plugin.data import read_picture
from fpn_plugin.data.given_images import images_in
from fpn_plugin.deploy import optimize_for_inference
from fpn_plugin.deploy.comparison import compare_detectors
from fpn_plugin.deploy.optimize import dtype_name, print_steps
from fpn_plugin.engine.inference import Detector
from fpn_plugin.engine.run_datasets import register_with_runs, run_folders
from fpn_plugin.engine.settings import config_on_device

from .common import DTYPES, ToolParser, add_shared, command_parser

__all__ = ["optimize_main"]


def _parser() -> ToolParser:
    parser = command_parser("optimize", __doc__)
    add_shared(parser, "--input", required=True)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--compile", action="store_true", help="compile the backbone as well")
    add_shared(parser, "--max-images", default=20)
    add_shared(parser, "--config-file", "--dataset", "opts")
    return parser


def optimize_main(argv: list[str] | None = None) -> None:
    """Runs the model and its optimised copies on each image in turn, and prints a table."""
    args = _parser().parse_args(argv)
    cfg = config_on_device(args.config_file, args.opts)
    register_with_runs(args.dataset, *run_folders(args.config_file, cfg.MODEL.WEIGHTS))
    given = images_in(args.input, "--input")[: args.max_images]
    original = Detector(cfg)
    detectors, made_in = {"original": original}, {"original": 0.0}
    for dtype in args.dtypes:
        detector = Detector(cfg)
        started = time.perf_counter()
        detector.model = optimize_for_inference(
            original.model, dtype=getattr(torch, dtype), compile=args.compile
        )
        # A CPU may lack half precision.
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
        "made in: time to optimise, and to compile with --compile; s/image: median without the "
        "first call; same: detections that the original has too, of the same class and with IoU "
        "above 0.5; missing, extra: detections of only the original, of only this model; box, "
        "score: largest difference of the same detections"
    )

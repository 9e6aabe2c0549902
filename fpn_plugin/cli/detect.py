"""``fpn-plugin detect``: images in, pictures with boxes and a JSON of detections out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from detectron2.data import MetadataCatalog

from fpn_plugin.data import register_datasets
from fpn_plugin.deploy.optimize import print_steps
from fpn_plugin.engine.detection import detect_images
from fpn_plugin.engine.inference import Detector, class_names
from fpn_plugin.engine.settings import config_on_device
from fpn_plugin.errors import UserError

from .common import ToolParser, add_shared, given_images

__all__ = ["argument_parser", "detect_main"]

_EXAMPLES = """
Examples:
  fpn-plugin detect --config-file output/demo/config.yaml --input photos/ --output pictures/ \\
      MODEL.WEIGHTS output/demo/model_final.pth
  fpn-plugin detect --config-file output/demo/config.yaml --ground-truth mini_val \\
      --max-images 12 MODEL.WEIGHTS output/demo/model_final.pth
"""


def argument_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = ToolParser(
        "fpn-plugin detect",
        description="Draw detections, each box in the colour of the pyramid level it was pooled "
        "from.",
        epilog=_EXAMPLES,
    )
    add_shared(parser.add_mutually_exclusive_group(required=True), "--input", "--ground-truth")
    add_shared(parser, "--output", default="output/pictures")
    add_shared(
        parser,
        "--threshold",
        help="least score to draw (default: %(default)s); the JSON has all detections",
    )
    add_shared(parser, "--config-file", "--max-images", "--optimize", "--dataset", "opts")
    return parser


def detect_main(argv: Sequence[str] | None = None) -> None:
    """Writes a picture for each image and detections.json; see :func:`detect_images`.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: something given cannot be used. An image that cannot be read among others that
            can is reported at the end.
    """
    args = argument_parser().parse_args(argv)
    cfg = config_on_device(args.config_file, args.opts)
    register_datasets(args.dataset)
    images, truth_names = given_images(args), ()
    if args.ground_truth:  # loaded for its images, the dataset has registered its categories
        truth_names = MetadataCatalog.get(args.ground_truth).get("thing_classes", ())
    detector = Detector(cfg, args.optimize and getattr(torch, args.optimize))
    print_steps(detector.model)
    if not class_names(cfg):
        print("category names are unknown: give --dataset NAME=JSON:IMAGES of DATASETS.TEST")
    output = Path(args.output)
    unreadable = detect_images(detector, cfg, images, output, args.threshold, truth_names)
    print(f"{len(images) - len(unreadable)} pictures and detections.json in {output}")
    if unreadable:
        raise UserError(f"{len(unreadable)} of {len(images)} images left out: {unreadable[0]}")

r"""Draw detections. The colour of a box is the pyramid level that it is pooled from, or its class.

Examples:
  fpn-plugin detect --config-file output/demo/config.yaml --input photos/ --output pictures/ \
      MODEL.WEIGHTS output/demo/model_final.pth
  fpn-plugin detect --config-file output/demo/config.yaml --ground-truth mini_val \
      --max-images 12 MODEL.WEIGHTS output/demo/model_final.pth
"""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.data import MetadataCatalog

from fpn_plugin.deploy.optimize import print_steps
from fpn_plugin.engine.detection import detect_images
from fpn_plugin.engine.inference import Detector, class_names
from fpn_plugin.engine.run_datasets import register_with_runs, run_folders
from fpn_plugin.engine.settings import config_on_device
from fpn_plugin.errors import UserError

from .common import ToolParser, add_shared, command_parser, given_images

__all__ = ["detect_main"]


def _parser() -> ToolParser:
    parser = command_parser("detect", __doc__)
    add_shared(parser.add_mutually_exclusive_group(required=True), "--input", "--ground-truth")
    add_shared(parser, "--output", default="output/pictures")
    score = "lowest score to draw (default: %(default)s); the JSON has all detections"
    add_shared(parser, "--threshold", help=score)
    add_shared(
        parser, "--config-file", "--color-by", "--max-images", "--optimize", "--dataset", "opts"
    )
    return parser


def detect_main(argv: list[str] | None = None) -> None:
    """Writes a picture for each image and detections.json; see :func:`detect_images`."""
    args = _parser().parse_args(argv)
    cfg = config_on_device(args.config_file, args.opts)
    register_with_runs(args.dataset, *run_folders(args.config_file, cfg.MODEL.WEIGHTS))
    images, truth_names = given_images(args), ()
    if args.ground_truth:  # given_images() has loaded its categories
        truth_names = MetadataCatalog.get(args.ground_truth).get("thing_classes", ())
    detector = Detector(cfg, args.optimize and getattr(torch, args.optimize))
    print_steps(detector.model)
    if not class_names(cfg):
        print("category names are unknown: give --dataset NAME=JSON:IMAGES of DATASETS.TEST")
    output = Path(args.output)
    unreadable = detect_images(
        detector, cfg, images, output, args.threshold, truth_names, args.color_by
    )
    print(f"{len(images) - len(unreadable)} pictures and detections.json in {output}")
    if unreadable:
        raise UserError(f"{len(unreadable)} of {len(images)} images left out: {unreadable[0]}")

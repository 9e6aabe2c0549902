r"""Draw what trained models do with images, level by level: features, proposals and detections by
the level they are pooled from, matched anchors, the contribution of each level. Several models are
drawn side by side.

Examples:
  fpn-plugin visualize --config-file output/demo/config.yaml --input photo.jpg \
      --output output/pictures MODEL.WEIGHTS output/demo/model_final.pth
  fpn-plugin visualize --run output/demo --ground-truth mini_val --max-images 4
  fpn-plugin visualize --run "(c) FPN=output/mini/table1_c_FPN/seed0" \
      "(d) bottom-up=output/mini/table1_d_bottom_up/seed0" --ground-truth mini_val --max-images 2
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path

from detectron2.config import CfgNode

from fpn_plugin.data import check_datasets, class_order, follow_classes
from fpn_plugin.engine.inference import Detector, class_names, keypoint_layout
from fpn_plugin.engine.run_datasets import class_colors, register_with_runs, run_folders
from fpn_plugin.engine.settings import config_on_device
from fpn_plugin.errors import UserError
from fpn_plugin.mini import ensure_mini_datasets
from fpn_plugin.visualization.palette import category_colors
from fpn_plugin.visualization.pictures import LabelledModel, draw_models

from .common import ToolParser, add_shared, at_least, command_parser, given_images

__all__ = ["visualize_main"]


def _parser() -> ToolParser:
    parser = command_parser("visualize", __doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    add_shared(model, "--config-file", required=False)
    model.add_argument(
        "--run",
        nargs="+",
        metavar="[LABEL=]FOLDER",
        help="folders of finished trainings, with config.yaml and model_final.pth",
    )
    add_shared(parser.add_mutually_exclusive_group(required=True), "--input", "--ground-truth")
    add_shared(parser, "--output", default="output/seen")
    parser.add_argument(
        "--proposals", type=at_least(1), default=50, help="how many to draw, best first"
    )
    add_shared(parser, "--color-by", "--max-images", "--threshold", "--dataset", "opts")
    return parser


def visualize_main(argv: list[str] | None = None) -> None:
    """Writes pictures of each image, and contributions.png and .json over all images."""
    args = _parser().parse_args(argv)
    cfgs = _configs(args)
    weights = [cfg.MODEL.WEIGHTS for cfg in cfgs.values()]  # those of --run are in its folder
    folders = [run_folders(args.config_file or "", each) for each in weights]
    register_with_runs(args.dataset, *itertools.chain(*folders))
    if args.ground_truth:
        check_datasets([args.ground_truth], "--ground-truth")
        ensure_mini_datasets([args.ground_truth])
    images = [] if args.ground_truth else given_images(args)
    first = next(iter(cfgs.values()))
    models = [LabelledModel(label, cfg, Detector(cfg).model) for label, cfg in cfgs.items()]
    names = class_names(first)
    if args.ground_truth and sorted(class_order(args.ground_truth) or ()) == sorted(names):
        follow_classes([args.ground_truth], names, "the model")
    images = images or given_images(args)
    output, layout = Path(args.output), keypoint_layout(first)
    colors = []
    if args.color_by == "class":
        colors = category_colors(names, class_colors(*itertools.chain(*folders)))
    complete = draw_models(
        models, images, output, names, layout, args.threshold, args.proposals, colors
    )
    print(f"pictures of {len(images)} images and contributions.json in {output}")
    if not complete:
        print("no contributions.png: it needs a model with RoI heads, or labels (--ground-truth)")


def _configs(args: argparse.Namespace) -> dict[str, CfgNode]:
    """The config of each model, by its label."""
    if args.config_file:
        return {Path(args.config_file).stem: config_on_device(args.config_file, args.opts)}
    cfgs: dict[str, CfgNode] = {}
    for given in args.run:
        label, _, folder = given.rpartition("=")
        config, weights = Path(folder, "config.yaml"), Path(folder, "model_final.pth")
        for file in (config, weights):
            if not file.is_file():
                raise UserError(
                    f"--run {given!r}: {str(file)!r} does not exist; --run takes folders of "
                    "finished trainings, with config.yaml and model_final.pth (others: "
                    "--config-file)"
                )
        label = label or Path(folder).name
        if label in cfgs:
            raise UserError(f"--run: two models are named {label!r}; give them LABEL=FOLDER")
        cfgs[label] = config_on_device(str(config), ["MODEL.WEIGHTS", str(weights), *args.opts])
    return cfgs

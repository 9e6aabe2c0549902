"""``fpn-plugin visualize``: pictures of what trained models do, level by level."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode

from fpn_plugin.data import check_datasets, class_order, follow_classes, register_datasets
from fpn_plugin.engine.inference import Detector, class_names, keypoint_layout
from fpn_plugin.engine.settings import config_on_device
from fpn_plugin.errors import UserError
from fpn_plugin.mini import ensure_mini_datasets
from fpn_plugin.visualization.pictures import LabelledModel, draw_models

from .common import ToolParser, add_shared, at_least, given_images

__all__ = ["argument_parser", "visualize_main"]

_EXAMPLES = """
Examples:
  fpn-plugin visualize --config-file output/demo/config.yaml --input photo.jpg \\
      --output output/pictures MODEL.WEIGHTS output/demo/model_final.pth
  fpn-plugin visualize --run output/demo --ground-truth mini_val --max-images 4
  fpn-plugin visualize --run "(c) FPN=output/mini/table1_c_FPN/seed0" \\
      "(d) bottom-up=output/mini/table1_d_bottom_up/seed0" --ground-truth mini_val --max-images 2
"""


def argument_parser() -> argparse.ArgumentParser:
    """The command's arguments."""
    parser = ToolParser(
        "fpn-plugin visualize",
        description="Draw what trained models do with images, level by level: features, where "
        "proposals and detections were pooled, anchors that matched, what each level contributed. "
        "Several models stand side by side.",
        epilog=_EXAMPLES,
    )
    model = parser.add_mutually_exclusive_group(required=True)
    add_shared(model, "--config-file", required=False)
    model.add_argument(
        "--run", nargs="+", metavar="[LABEL=]FOLDER",
        help="folders of finished trainings: config.yaml and model_final.pth",
    )  # fmt: skip
    add_shared(parser.add_mutually_exclusive_group(required=True), "--input", "--ground-truth")
    add_shared(parser, "--output", default="output/seen")
    parser.add_argument(
        "--proposals", type=at_least(1), default=50, help="how many of the best to draw"
    )
    add_shared(parser, "--max-images", "--threshold", "--dataset", "opts")
    return parser


def visualize_main(argv: Sequence[str] | None = None) -> None:
    """Writes pictures for each image, and contributions.png and .json over all of them.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: something given cannot be used.
    """
    args = argument_parser().parse_args(argv)
    register_datasets(args.dataset)
    if args.ground_truth:
        check_datasets([args.ground_truth], "--ground-truth")
        ensure_mini_datasets([args.ground_truth])
    images = [] if args.ground_truth else given_images(args)
    cfgs = _configs(args)
    first = next(iter(cfgs.values()))
    models = [LabelledModel(label, cfg, Detector(cfg).model) for label, cfg in cfgs.items()]
    names = class_names(first)
    if args.ground_truth and sorted(class_order(args.ground_truth) or ()) == sorted(names):
        follow_classes([args.ground_truth], names, "the model")
    images = images or given_images(args)
    output, layout = Path(args.output), keypoint_layout(first)
    pictures = f"pictures of {len(images)} images"
    if draw_models(models, images, output, names, layout, args.threshold, args.proposals):
        print(f"{pictures}, contributions.png and .json in {output}")
    else:
        print(
            f"{pictures} in {output}; no contributions.png: what each level contributes is known "
            "of a model with RoI heads, or with labels (--ground-truth)"
        )


def _configs(args: argparse.Namespace) -> dict[str, CfgNode]:
    """The config of each model, by its label."""
    if args.config_file:
        cfgs = {Path(args.config_file).stem: config_on_device(args.config_file, args.opts)}
    else:
        cfgs = {}
        for given in args.run:
            label, _, folder = given.rpartition("=")
            path = Path(folder)
            label = label or path.name
            for file in ("config.yaml", "model_final.pth"):
                if not (path / file).is_file():
                    raise UserError(
                        f"--run {given!r}: {str(path / file)!r} does not exist; a folder of a "
                        "finished training has config.yaml and model_final.pth (others: "
                        "--config-file)"
                    )
            if label in cfgs:
                raise UserError("--run: two models have one name; give them LABEL=FOLDER")
            weights = ["MODEL.WEIGHTS", str(path / "model_final.pth")]
            opts = [*weights, *args.opts]
            cfgs[label] = config_on_device(str(path / "config.yaml"), opts)
    return cfgs

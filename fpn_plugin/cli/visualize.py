"""What tools/visualize.py does: pictures of what trained models do, level by level."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode
from torch import Tensor
from tqdm import tqdm

from fpn_plugin.data import (
    check_datasets,
    class_order,
    follow_classes,
    read_picture,
    register_datasets,
)
from fpn_plugin.engine.inference import Detector, class_names, keypoint_layout
from fpn_plugin.engine.settings import load_config, settle_device
from fpn_plugin.errors import UserError
from fpn_plugin.inspection.forward_trace import ForwardTrace, forward_trace
from fpn_plugin.mini import ensure_mini_datasets
from fpn_plugin.visualization.contributions import contributions, draw_contributions
from fpn_plugin.visualization.features import draw_features
from fpn_plugin.visualization.regions import draw_anchors, draw_pooling

from .common import ToolParser, at_least, between, output_folder
from .images import GivenImage, add_input_arguments, given_images

__all__ = ["argument_parser", "visualize_main"]

_EXAMPLES = """
Examples:
  visualize.py --config-file output/demo/config.yaml --input photo.jpg --output output/seen \\
      MODEL.WEIGHTS output/demo/model_final.pth
  visualize.py --run output/demo --ground-truth mini_val --max-images 4
  visualize.py --run "(c) FPN=output/mini/table1_c_FPN/seed0" \\
      "(d) bottom-up=output/mini/table1_d_bottom_up/seed0" --ground-truth mini_val --max-images 2
"""


@dataclass(frozen=True)
class _Model:
    """A trained model and what it is called in pictures."""

    label: str
    cfg: CfgNode
    detector: Detector


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of tools/visualize.py."""
    parser = ToolParser(
        description="Draw what trained models do with images, level by level: features, where "
        "proposals and detections were pooled, anchors that matched, what each level contributed. "
        "Several models stand side by side.",
        epilog=_EXAMPLES,
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--config-file", help="path of a config; weights: MODEL.WEIGHTS")
    model.add_argument(
        "--run", nargs="+", metavar="[LABEL=]FOLDER",
        help="folders of finished trainings: config.yaml and model_final.pth",
    )  # fmt: skip
    add_input_arguments(parser)
    parser.add_argument(
        "--output", type=output_folder, default="output/seen", help="folder to write to"
    )
    parser.add_argument(
        "--threshold",
        type=between(0, 1),
        default=0.5,
        help="least score of a detection to draw and count",
    )
    parser.add_argument(
        "--proposals", type=at_least(1), default=50, help="how many of the best to draw"
    )
    parser.add_argument("--dataset", action="append", default=[], metavar="NAME=JSON:IMAGES")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
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
    models = _models(args)
    names = class_names(models[0].cfg)
    if args.ground_truth and sorted(class_order(args.ground_truth) or ()) == sorted(names):
        follow_classes([args.ground_truth], names, "the model")
    images = images or given_images(args)
    labels = [model.label for model in models]
    output = Path(args.output)
    seen_by: list[list[ForwardTrace]] = [[] for _ in models]
    taken: set[str] = set()
    for given in tqdm(images, desc="looking", unit="image"):
        name = _free_name(given.path.stem, taken)
        seen = [_look(model, given) for model in models]
        _draw(seen, models, output / name, args)
        for kept, one in zip(seen_by, seen, strict=True):
            kept.append(one)
            one.features.update({level: maps[:0] for level, maps in one.features.items()})
    counted = [contributions(seen, args.threshold) for seen in seen_by]
    drawn = any(counted)  # nothing is without labels and RoI heads, as RetinaNet's
    if drawn:
        draw_contributions(counted, labels, output / "contributions.png", len(images))
    told = dict(zip(labels, counted, strict=True))
    (output / "contributions.json").write_text(json.dumps(told, indent=1))
    if drawn:
        print(f"pictures of {len(images)} images, contributions.png and .json in {output}")
    else:
        print(
            f"pictures of {len(images)} images in {output}; no contributions.png: what each level "
            "gave is known of a model with RoI heads, or with labels (--ground-truth)"
        )


def _models(args: argparse.Namespace) -> list[_Model]:
    named = "MODEL.DEVICE" in args.opts[::2]
    if args.config_file:
        cfg = load_config(args.config_file, args.opts)
        settle_device(cfg, named)
        return [_Model(Path(args.config_file).stem, cfg, Detector(cfg))]
    models: list[_Model] = []
    for given in args.run:
        label, _, folder = given.rpartition("=")
        path = Path(folder)
        for file in ("config.yaml", "model_final.pth"):
            if not (path / file).is_file():
                raise UserError(
                    f"--run {given!r}: {str(path / file)!r} is not there; a folder of a finished "
                    "training has config.yaml and model_final.pth (others: --config-file)"
                )
        weights = ["MODEL.WEIGHTS", str(path / "model_final.pth")]
        cfg = load_config(str(path / "config.yaml"), [*weights, *args.opts])
        settle_device(cfg, named)
        models.append(_Model(label or path.name, cfg, Detector(cfg)))
    if len({model.label for model in models}) < len(models):
        raise UserError("--run: two models have one name; give them LABEL=FOLDER")
    return models


def _look(model: _Model, given: GivenImage) -> ForwardTrace:
    image = read_picture(model.cfg, given.path)
    return forward_trace(model.detector.model, model.cfg, image, given.annotations)


def _draw(
    seen: Sequence[ForwardTrace], models: Sequence[_Model], folder: Path, args: argparse.Namespace
) -> None:
    labels = [model.label for model in models]
    if len(models) == 1:
        draw_features(seen, labels, folder / "features.png")
    else:
        draw_features(seen, labels, folder / "features.png", kinds=["colour"])
        draw_features(seen, labels, folder / "norms.png", kinds=["norm"])
    if any(one.proposed is not None or one.detections is not None for one in seen):
        names = class_names(models[0].cfg)
        layout = keypoint_layout(models[0].cfg)
        draw_pooling(
            seen, labels, folder / "pooling.png", args.proposals, args.threshold, names, layout
        )
    drawn: list[Tensor] = []
    for one, label in zip(seen, labels, strict=True):
        # Anchors do not depend on weights: models of one config have the same.
        if one.matched is None or any(torch.equal(one.matched.boxes, other) for other in drawn):
            continue
        suffix = f"-{_file_name(label)}" if drawn else ""
        draw_anchors(one, folder / f"anchors{suffix}.png")
        drawn.append(one.matched.boxes)


def _file_name(label: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in label).strip("_")


def _free_name(stem: str, taken: set[str]) -> str:
    """A folder's name for an image; images of one name in several folders get numbers."""
    number, name = 1, stem
    while name in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(name)
    return name

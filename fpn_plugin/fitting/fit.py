"""What tools/fit_pyramid.py does: a dataset and a config in, a fitted config and a report out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from fpn_plugin.cli.common import ToolParser, output_folder
from fpn_plugin.data import Needs, register_datasets
from fpn_plugin.engine import find_config_file, load_config
from fpn_plugin.errors import UserError

from .density import Density, check_sampling
from .ground_truth import GroundTruth, read_ground_truth
from .measures import Measures, measure
from .pyramid import Pyramid
from .recommend import recommend
from .recommendation import Recommendation
from .resizing import InputBoxes, ResizeRule, boxes_at_input

__all__ = ["Fit", "argument_parser", "fit_main", "fit_pyramid"]

_FACTORS = (0.5, 0.75, 1.0, 1.5, 2.0)  # of the config's input size
_MAX_FACTOR = 2.0  # of MAX_SIZE alone
# What other input sizes are measured on, at most.
_SAMPLE_IMAGES, _SAMPLE = 20_000, 100_000

_EXAMPLES = """
Examples:
  fit_pyramid.py --config-file mini/faster_rcnn_R_18_FPN.yaml --data mini_small_train
  fit_pyramid.py --config-file my.yaml --data train.json --output output/fit
  fit_pyramid.py --config-file my.yaml INPUT.MIN_SIZE_TRAIN "(1200,)"   # DATASETS.TRAIN of my.yaml
"""


@dataclass(frozen=True)
class Fit:
    """A dataset, a config's pyramid against it, and what to change.

    Attributes:
        cfg: the config.
        fitted: the config with all recommendations applied.
        truth: the dataset's boxes.
        rule: how training resizes images.
        inputs: the boxes as the network sees them in training.
        before: the config's pyramid, measured.
        after: that of the fitted config.
        test: the config's pyramid measured at the input size of testing.
        input_sizes: the config's pyramid at other input sizes, a row each.
        density: objects per image.
        recommendations: in the order in which they were found.
    """

    cfg: CfgNode
    fitted: CfgNode
    truth: GroundTruth
    rule: ResizeRule
    inputs: InputBoxes
    before: Measures
    after: Measures
    test: Measures
    input_sizes: list[dict[str, Any]]
    density: Density
    recommendations: list[Recommendation]


def fit_pyramid(cfg: CfgNode, truth: GroundTruth) -> Fit:
    """Fits a config's pyramid to boxes.

    Args:
        cfg: the config.
        truth: the boxes of the training data.

    Raises:
        UserError: the config has no pyramid with anchors.
    """
    pyramid = Pyramid.from_config(cfg)
    rule = ResizeRule.from_config(cfg, training=True)
    inputs = boxes_at_input(truth, rule)
    recommendations, fitted = recommend(cfg, truth, inputs)
    before = measure(inputs, pyramid)
    changed = any(not recommendation.keep for recommendation in recommendations)
    few = truth.sample(_SAMPLE_IMAGES)
    testing = boxes_at_input(few, ResizeRule.from_config(cfg, training=False))
    return Fit(
        cfg=cfg,
        fitted=fitted,
        truth=truth,
        rule=rule,
        inputs=inputs,
        before=before,
        after=measure(inputs, Pyramid.from_config(fitted)) if changed else before,
        test=measure(testing.sample(_SAMPLE), pyramid),
        input_sizes=[
            _at_input_size(few, rule, *factors, pyramid) for factors in _input_sizes(rule)
        ],
        density=Density.of(truth),
        recommendations=recommendations,
    )


def _input_sizes(rule: ResizeRule) -> list[tuple[float, float]]:
    """Factors of MIN_SIZE and of MAX_SIZE to measure at."""
    if not rule.resizes:
        return [(1.0, 1.0)]
    return [*((factor, factor) for factor in _FACTORS), (1.0, _MAX_FACTOR)]


def _at_input_size(
    truth: GroundTruth, rule: ResizeRule, factor: float, max_factor: float, pyramid: Pyramid
) -> dict[str, Any]:
    """The same pyramid where images are larger or smaller."""
    scaled = replace(rule.scaled(factor), max_size=rule.scaled(max_factor).max_size)
    inputs = boxes_at_input(truth, scaled)
    measured = measure(inputs.sample(_SAMPLE), pyramid)
    found = measured.as_dict()
    keys = (
        "clamped_fine", "clamped_coarse", "below_1_cell", "below_2_cells", "recall_50", "recall_70",
        "mean_iou",
    )  # fmt: skip
    return {
        "factor": factor,
        "max_factor": max_factor,
        "short_edges": list(scaled.short_edges),
        "max_size": scaled.max_size,
        "limited_by_max_size": inputs.limited,
        "pixels": inputs.pixels,
        "median_size": found["size_percentiles"]["50"],
        "levels": {
            level: float((measured.level == level).mean())
            for level in pyramid.roi_levels or pyramid.anchor_levels
        },
        **{key: found[key] for key in keys},
    }


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of tools/fit_pyramid.py."""
    parser = ToolParser(
        description="Which levels, canonical size and anchors your data wants: measures a config's "
        "pyramid against labelled boxes, and writes a config that fits them better.",
        epilog=_EXAMPLES,
    )
    parser.add_argument("--config-file", required=True, help="path of a config, or packaged name")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="NAME|JSON",
        help="a registered dataset or a COCO instances JSON; may be given several times; default: "
        "the config's DATASETS.TRAIN",
    )
    parser.add_argument("--dataset", action="append", default=[], metavar="NAME=JSON:IMAGES")
    parser.add_argument(
        "--output",
        type=output_folder,
        default="output/fit",
        help="folder of the report and config",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def fit_main(argv: Sequence[str] | None = None) -> None:
    """Fits a pyramid, and writes fitted.yaml, report.md, report.json and charts.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: something given cannot be used.
    """
    from .report import check_output, write_report  # matplotlib, which the library need not load

    args = argument_parser().parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    # What is wrong with the config is told before a long reading.
    Pyramid.from_config(cfg)
    for training in (True, False):
        ResizeRule.from_config(cfg, training)
    check_sampling(cfg)
    base, folder = Path(find_config_file(args.config_file)), Path(args.output)
    check_output(base, folder)
    register_datasets(args.dataset)
    sources = args.data or list(cfg.DATASETS.TRAIN)
    if not sources:
        raise UserError("no data: give --data, or a config whose DATASETS.TRAIN names some")
    key = "--data" if args.data else "DATASETS.TRAIN"
    fit = fit_pyramid(cfg, read_ground_truth(sources, Needs.of(cfg, training=True), key))
    print(write_report(fit, sources, base, list(args.opts[::2]), folder, args.dataset))

"""A run's results, curves, levels and errors as one page of HTML."""

from __future__ import annotations

import itertools
import json
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog

from fpn_plugin.data import Needs, check_datasets, check_records, read_image_or_say
from fpn_plugin.inspection.box_levels import BoxLevels
from fpn_plugin.inspection.errors import (
    FALSE_ALARM_KINDS,
    MISS_KINDS,
    SIZES,
    confusion,
    find_errors,
)
from fpn_plugin.mini import ensure_mini_datasets
from fpn_plugin.utils.metrics import (
    PRECISION_FILE,
    ap_by_class,
    level_rows,
    loss_rows,
    task_metrics,
)

from .errors import draw_confusion, draw_mistakes, plot_errors
from .level_curves import FIGURES, plot_level_curves
from .losses import plot_losses
from .page import Page
from .palette import category_colors, level_title
from .precision import plot_precision

__all__ = ["run_page"]

_WORST = 12


def run_page(
    run: Path, cfg: CfgNode, threshold: float = 0.5, colors: Mapping[str, str] | None = None
) -> Page:
    """The report on a run as a page. It says which parts the run lacks.

    Args:
        run: its OUTPUT_DIR.
        cfg: its config.
        threshold: lowest score of a detection that counts.
        colors: of classes by name; others have those of the palette.
    """
    page = Page(f"Run {run.resolve().name}", _summary(cfg))
    with tempfile.TemporaryDirectory() as folder:
        _add_results(page, run)
        _add_precision(page, run, cfg, colors or {}, Path(folder))
        _add_losses(page, run, Path(folder))
        _add_levels(page, run, Path(folder))
        _add_errors(page, run, cfg, threshold, Path(folder))
    return page


def _summary(cfg: CfgNode) -> str:
    fpn = cfg.MODEL.FPN
    return (
        f"{_architecture(cfg)} on {_network(cfg)}; k0 = {fpn.CANONICAL_LEVEL} at "
        f"{fpn.CANONICAL_BOX_SIZE} px; input {cfg.INPUT.MIN_SIZE_TEST} px; trained on "
        f"{', '.join(cfg.DATASETS.TRAIN)}: {cfg.SOLVER.MAX_ITER} iterations of "
        f"{cfg.SOLVER.IMS_PER_BATCH} images, learning rate {cfg.SOLVER.BASE_LR:g}, seed {cfg.SEED}"
    )


def _architecture(cfg: CfgNode) -> str:
    name = {"ProposalNetwork": "RPN", "PanopticFPN": "Panoptic FPN"}.get(
        cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.META_ARCHITECTURE
    )
    if name != "GeneralizedRCNN":
        return name
    kind = "Keypoint" if cfg.MODEL.KEYPOINT_ON else "Mask" if cfg.MODEL.MASK_ON else "Faster"
    return f"{'Cascade ' if 'Cascade' in cfg.MODEL.ROI_HEADS.NAME else ''}{kind} R-CNN"


def _network(cfg: CfgNode) -> str:
    network = cfg.MODEL.FPN.BOTTOM_UP.removeprefix("build_").removesuffix("_backbone")
    if network in ("timm", "torchvision"):
        return f"{cfg.MODEL[network.upper()].NAME} of {network}"
    return f"ResNet-{cfg.MODEL.RESNETS.DEPTH}" if "resnet" in network else network


def _add_precision(
    page: Page, run: Path, cfg: CfgNode, own: Mapping[str, str], folder: Path
) -> None:
    page.section("Precision and recall")
    path = run / "inference" / PRECISION_FILE
    if not path.is_file() or not cfg.DATASETS.TEST:
        page.text(f"No curves: {path.name} is not in the run's folder inference. Evaluate anew.")
        return
    name = cfg.DATASETS.TEST[-1]  # each evaluation replaces the file of the one before
    with np.load(path) as stored:
        arrays = dict(stored)
    classes = arrays.pop("classes").tolist()
    colors = category_colors(classes, own)
    for task, precision in arrays.items():
        if (precision < 0).all():
            page.text(f"No curves of {task}: no object of {name} is labelled.")
            continue
        picture = plot_precision(precision, classes, colors, folder / f"{task}.png")
        page.picture(picture, f"{task} on {name}: precision at each recall, as COCO evaluates it.")


def _add_results(page: Page, run: Path) -> None:
    page.section("Results")
    path = run / "results.json"
    if not path.is_file():
        page.text("Not evaluated: the run has no results.json.")
        return
    for task, metrics in task_metrics(json.loads(path.read_text())):
        overall = {key: value for key, value in metrics.items() if "-" not in key}
        page.text(f"{task}, in percent")
        page.table(list(overall), [_numbers(overall.values())])
        by_class = ap_by_class(metrics)
        if by_class:
            page.text("AP by category")
            for start in range(0, len(by_class), 10):
                some = dict(itertools.islice(by_class.items(), start, start + 10))
                page.table(list(some), [_numbers(some.values())])


def _numbers(values: Iterable[float]) -> list[str]:
    return ["-" if v is None or math.isnan(v) else f"{v:.1f}" for v in values]


def _add_losses(page: Page, run: Path, folder: Path) -> None:
    page.section("Losses")
    if not loss_rows(run / "metrics.json"):
        page.text("No training is logged: metrics.json has no losses.")
        return
    picture = plot_losses(run / "metrics.json", folder / "losses.png")
    page.picture(picture, "Losses and learning rate over the training.")


def _add_levels(page: Page, run: Path, folder: Path) -> None:
    page.section("Levels in training")
    statistics = level_rows(run / "metrics.json")
    if not any(name in statistics for name in FIGURES):
        page.text("Not logged: train with MODEL.FPN.LEVEL_STATS_PERIOD 20 to see them here.")
        return
    picture = plot_level_curves(statistics, folder / "levels.png")
    page.picture(picture, "Statistics of each level: iterations as points, running means as lines.")
    levels = sorted({level for by_level in statistics.values() for level in by_level})
    rows = [
        [title, *(_late_mean(statistics[name].get(level, [])) for level in levels)]
        for name, title in FIGURES.items()
        if name in statistics
    ]
    page.text("Means over the last quarter of the training")
    page.table(["", *map(level_title, levels)], rows)


def _late_mean(points: Sequence[tuple[int, float]]) -> str:
    late = [value for _, value in points[-max(len(points) // 4, 1) :]]
    return f"{np.mean(late):.3g}" if late else "-"


def _add_errors(page: Page, run: Path, cfg: CfgNode, threshold: float, folder: Path) -> None:
    page.section("Errors")
    results = run / "inference" / "coco_instances_results.json"
    if not results.is_file() or not cfg.DATASETS.TEST:
        page.text(f"No detections: {results.name} is not in the run's folder inference.")
        return
    name = cfg.DATASETS.TEST[-1]  # each evaluation replaces the file of the one before
    ensure_mini_datasets([name])
    check_datasets([name], "DATASETS.TEST")
    check_records([name], Needs(training=False))
    metadata = MetadataCatalog.get(name)
    dataset = json.loads(Path(metadata.json_file).read_text())
    levels = BoxLevels(cfg, dataset)
    found = json.loads(results.read_text())
    errors = find_errors(dataset, found, levels, threshold)
    page.text(
        f"On {name}: {len(errors.misses)} of {sum(errors.objects.values())} objects missed, "
        f"{len(errors.false_alarms)} of {sum(errors.detections.values())} detections false, at "
        f"scores from {threshold:g} on and an IoU of 0.5. Sizes are COCO's, in pixels of the "
        "image. The level of a box is Eq. (1)'s for the box itself at the network's input size. A "
        "detection was pooled for its proposal, whose level may be the next one."
    )
    page.picture(
        plot_errors(errors, levels.names, folder / "errors.png"),
        "Objects missed and detections that are false, as shares of all of that size or level.",
    )
    for headers, kinds, counts_in in (
        (("objects", "missed"), MISS_KINDS, errors.missed_in),
        (("detections", "false"), FALSE_ALARM_KINDS, errors.false_in),
    ):
        rows = [[level_title(group), *counts_in(group)] for group in (*SIZES, *levels.names)]
        page.table(["", *headers, *kinds], rows)
    names = [category["name"] for category in dataset["categories"]]
    counts = confusion(dataset, found, threshold)
    page.picture(
        draw_confusion(counts, names, folder / "confusion.png"),
        f"Confusion matrix, at scores from {threshold:g} on and an IoU of 0.5. An object is given "
        "to the detection with the highest score, whatever its class. The colour is the share of "
        "the row.",
    )
    files = {image["id"]: image["file_name"] for image in dataset["images"]}

    def image_of(image_id: int) -> np.ndarray:
        return read_image_or_say(Path(metadata.image_root) / files[image_id])[:, :, ::-1]

    for mistakes, caption in (
        (errors.misses, "The largest missed objects."),
        (errors.false_alarms, "The false alarms with the highest scores."),
    ):
        if mistakes:
            worst = mistakes[:_WORST]
            page.picture(draw_mistakes(worst, image_of, files, folder / "worst.png"), caption)

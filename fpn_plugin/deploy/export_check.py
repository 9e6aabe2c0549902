"""Exports of a model, each run and compared with the model."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from fpn_plugin.data import channels_first, resized_picture
from fpn_plugin.errors import UserError
from fpn_plugin.modeling import image_channels

from .comparison import Agreement
from .export import FORMATS, Exported, batched, export_graph, exportable, load_exported
from .graph import DetectionGraph

__all__ = ["detection_differences", "export_checked"]

BOX_PX, SCORE, MASK = 0.05, 1e-3, 1e-2
"""Greatest differences between a file's detections and the model's: pixels, scores, and mask
probabilities."""

_COLUMNS = ("detections", "other", "box (px)", "score", "mask")


def export_checked(
    cfg: CfgNode,
    model: nn.Module,
    classes: Sequence[str],
    images: Sequence[np.ndarray],
    formats: Sequence[str],
    folder: Path,
    time_limit: int,
) -> None:
    """Exports a model, runs each file, compares detections, and prints a line for each format.

    Args:
        cfg: the model's config.
        model: on the CPU, in evaluation mode.
        classes: their names, for ``model.json``.
        images: to compare detections on, as :func:`fpn_plugin.data.read_picture` reads them.
        formats: names of :data:`FORMATS`.
        folder: gets the files and ``model.json``.
        time_limit: seconds after which a format is given up.

    Raises:
        UserError: a format cannot carry the model, or a file's detections
            are not the model's. Other formats are written all the same.
    """
    cases = _cases(cfg, images)
    graph = exportable(model)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(json.dumps(_description(cfg, graph, classes), indent=1))
    rows: list[list[Any]] = []
    problems: list[str] = []
    for kind in formats:
        path = folder / FORMATS[kind]
        started = time.perf_counter()
        print(f"{kind}: writing {path} (up to some minutes)", flush=True)
        try:
            export_graph(graph, kind, path, time_limit)
            found = detection_differences(model, load_exported(path), cases)
        except UserError as error:
            problems.append(str(error))
            continue
        except RuntimeError as error:  # of the file, for an image of a size that it does not take
            problems.append(f"{path} fails on the images: {(str(error).splitlines() or [''])[0]}")
            continue
        size, seconds = path.stat().st_size / 2**20, time.perf_counter() - started
        rows.append([kind, str(path), size, seconds, *found.values()])
        within = found["box (px)"] <= BOX_PX and found["score"] <= SCORE and found["mask"] <= MASK
        if found["other"] or not within:
            problems.append(f"{path} does not give the model's detections: see the table")
    headers = ["format", "file", "MiB", "seconds", *_COLUMNS]
    print(tabulate(rows, headers=headers, tablefmt="github", floatfmt=".3g"))
    print(
        f"Compared on {len(cases)} batches, one of no image; other: detections that only one of "
        "them has; box, score, mask: largest differences.\nInput, output and classes: "
        f"{folder / 'model.json'}. Resizing before, and pasting masks after, is the caller's."
    )
    if "torch_export" in formats:
        print(
            f"torch_export's file takes images above {_coarsest(model)} px a side: a coarsest "
            "level of one cell is a case of its own to it."
        )
    if problems:
        raise UserError("\n".join(problems))


def detection_differences(
    model: nn.Module, exported: Exported, cases: Sequence[Sequence[Tensor]]
) -> dict[str, float]:
    """How far an exported file's detections are from its model's.

    Args:
        model: Detectron2's, in evaluation mode.
        exported: as :func:`load_exported` gives it.
        cases: batches of images ``(C, H, W)`` in the model's channel order; one may be empty.

    Returns:
        ``detections``, the model's in all; ``other``: those that only one has, see
        :class:`Agreement`; ``box (px)``, ``score`` and ``mask``: largest differences of the
        rest, of masks in probability, 0 without a mask head.
    """
    detections, agreement, masks = 0, Agreement(), [0.0]
    for images in cases:
        with torch.no_grad():
            expected = _detected(model, images)
            # A coarsest level of one cell is a case of its own to torch.export.
            side = 64 if images else 2 * _coarsest(model)
            batch = batched(images, side, image_channels(model))
            boxes, scores, classes, index, *of_masks = exported(*batch)
        # Images beyond those given would be an error of the file's too.
        agreement.extra += int((index >= len(images)).sum())
        for number, theirs in enumerate(expected):
            mine = index == number
            ours = Instances(theirs.image_size)
            ours.pred_boxes, ours.scores = Boxes(boxes[mine]), scores[mine]
            ours.pred_classes = classes[mine]
            detections += len(theirs)
            partners, own = agreement.add(theirs, ours)
            if of_masks and len(own):
                apart = theirs.pred_masks[partners, 0] - of_masks[0][mine][own]
                masks.append(float(apart.abs().max()))
    return {
        "detections": detections,
        "other": agreement.missing + agreement.extra,
        "box (px)": agreement.box_px,
        "score": agreement.score,
        "mask": max(masks),
    }


def _coarsest(model: nn.Module) -> int:
    return max(shape.stride for shape in model.backbone.output_shape().values())


def _detected(model: nn.Module, images: Sequence[Tensor]) -> list[Instances]:
    """The model's detections, masks as probabilities over their boxes."""
    if not images:
        return []
    inputs = [{"image": image} for image in images]
    if not getattr(getattr(model, "roi_heads", None), "mask_on", False):
        return [output["instances"] for output in model(inputs)]
    # Pasted masks are a yes or no a pixel. Postprocessing leaves out empty boxes too.
    found = model.inference(inputs, do_postprocess=False)
    return [each[each.pred_boxes.nonempty()] for each in found]


def _cases(cfg: CfgNode, images: Sequence[np.ndarray]) -> list[list[Tensor]]:
    """Each image as the config resizes it; all at once; smaller and narrower ones; none."""
    resized = [channels_first(cfg, resized_picture(cfg, image)[0]) for image in images]
    first = resized[0]
    small = F.interpolate(first[None], scale_factor=0.75, mode="bilinear")[0]
    narrow = first[:, :, : first.shape[2] * 2 // 3]
    blank = torch.zeros_like(first)
    return [*([image] for image in resized), [small], [narrow], [blank], [*resized, small], []]


def _description(cfg: CfgNode, graph: DetectionGraph, classes: Sequence[str]) -> dict[str, Any]:
    return {
        "input": {
            "images": f"float32 (N, {image_channels(graph.model)}, H, W), {cfg.INPUT.FORMAT}, "
            "values 0 to 255, padded right and below; N, H and W may vary, N may be 0",
            "sizes": "int64 (N, 2), height and width of each image without padding",
            "resizing": {
                "shorter side": cfg.INPUT.MIN_SIZE_TEST,
                "longer side at most": cfg.INPUT.MAX_SIZE_TEST,
            },
        },
        "output": {
            "boxes": "float32 (D, 4), x1 y1 x2 y2 in pixels of images",
            "scores": "float32 (D), falling",
            "classes": "int64 (D)",
            "image_index": "int64 (D)",
            **(
                {"masks": "float32 (D, M, M), probability over each box"}
                if "masks" in graph.output_names
                else {}
            ),
        },
        "classes": list(classes),
    }

"""Exported files, each run and compared with its model."""

from __future__ import annotations

import json
import shutil
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
from fpn_plugin.errors import UserError, one_line
from fpn_plugin.modeling import image_channels

from .comparison import Agreement
from .export import FORMATS, Exported, batched, export_graph, exportable, load_exported
from .graph import DetectionGraph

__all__ = ["detection_differences", "export_checked"]

BOX_PX, SCORE, MASK = 0.05, 1e-3, 1e-2
"""Largest accepted differences between a file's detections and the model's: pixels, scores, and
mask probabilities."""

_RUNNER = "onnx_runner.py"
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
        folder: the files and ``model.json`` are written to it; next to an ONNX file a program that
            runs it by onnxruntime.
        time_limit: seconds after which writing a format is stopped.

    Raises:
        UserError: a format cannot carry the model, or a file's detections differ from the model's.
            The other formats are still written.
    """
    cases = _cases(cfg, images)
    graph = exportable(model)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(json.dumps(_description(cfg, graph, classes), indent=1))
    rows, problems = [], []
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
        except RuntimeError as error:  # the file does not take an image of this size
            problems.append(f"{path} fails on the images: {one_line(error)}")
            continue
        if kind == "onnx":
            shutil.copy(Path(__file__).with_name(_RUNNER), folder)
        size, seconds = path.stat().st_size / 2**20, time.perf_counter() - started
        rows.append([kind, str(path), size, seconds, *found.values()])
        within = found["box (px)"] <= BOX_PX and found["score"] <= SCORE and found["mask"] <= MASK
        if found["other"] or not within:
            problems.append(f"the detections of {path} differ from the model's: see the table")
    headers = ["format", "file", "MiB", "seconds", *_COLUMNS]
    print(tabulate(rows, headers=headers, tablefmt="github", floatfmt=".3g"))
    print(
        f"Compared on {len(cases)} batches, one of them empty. other: detections that only the "
        "model or only the file has. box, score, mask: largest differences.\nInput, output and "
        f"classes are described in {folder / 'model.json'}. Resize images before, and paste masks "
        "after."
    )
    if (folder / _RUNNER).is_file():
        print(f"{folder / _RUNNER} runs the ONNX file: python {folder / _RUNNER} photo.jpg")
    if "torch_export" in formats:
        print(
            f"The file of torch_export takes images with sides above {_coarsest(model)} px: it "
            "does not run if the coarsest level is one cell."
        )
    if problems:
        raise UserError("\n".join(problems))


def detection_differences(
    model: nn.Module, exported: Exported, cases: Sequence[Sequence[Tensor]]
) -> dict[str, float]:
    """How far the detections of an exported file are from its model's.

    Args:
        model: Detectron2's, in evaluation mode.
        exported: as :func:`load_exported` returns it.
        cases: batches of images ``(C, H, W)`` in the model's channel order; one may be empty.

    Returns:
        ``detections``: the model's; ``other``: those that only the model or only the file has, see
        :class:`Agreement`; ``box (px)``, ``score`` and ``mask``: largest differences of the
        others; masks are compared as probabilities, 0 without a mask head.
    """
    agreement, masks = Agreement(), [0.0]
    for images in cases:
        with torch.no_grad():
            expected = _detected(model, images)
            # torch.export's file does not run if the coarsest level is one cell.
            side = 64 if images else 2 * _coarsest(model)
            batch = batched(images, side, image_channels(model))
            boxes, scores, classes, index, *of_masks = exported(*batch)
        # Detections in images that were not given are wrong too.
        agreement.extra += int((index >= len(images)).sum())
        for number, theirs in enumerate(expected):
            mine = index == number
            fields = {"scores": scores[mine], "pred_classes": classes[mine]}
            ours = Instances(theirs.image_size, pred_boxes=Boxes(boxes[mine]), **fields)
            partners, own = agreement.add(theirs, ours)
            if of_masks and len(own):
                apart = theirs.pred_masks[partners, 0] - of_masks[0][mine][own]
                masks.append(float(apart.abs().max()))
    detections, other = agreement.matched + agreement.missing, agreement.missing + agreement.extra
    figures = (detections, other, agreement.box_px, agreement.score, max(masks))
    return dict(zip(_COLUMNS, figures, strict=True))


def _coarsest(model: nn.Module) -> int:
    return max(shape.stride for shape in model.backbone.output_shape().values())


def _detected(model: nn.Module, images: Sequence[Tensor]) -> list[Instances]:
    """The model's detections. Masks are probabilities over their boxes."""
    if not images:
        return []
    inputs = [{"image": image} for image in images]
    if not getattr(getattr(model, "roi_heads", None), "mask_on", False):
        return [output["instances"] for output in model(inputs)]
    # Pasted masks are yes or no for each pixel. Postprocessing also leaves out empty boxes.
    found = model.inference(inputs, do_postprocess=False)
    return [each[each.pred_boxes.nonempty()] for each in found]


def _cases(cfg: CfgNode, images: Sequence[np.ndarray]) -> list[list[Tensor]]:
    """Batches: each resized image, a smaller, a narrower, a black one, several images, none."""
    resized = [channels_first(cfg, resized_picture(cfg, image)[0]) for image in images]
    first = resized[0]
    small = F.interpolate(first[None], scale_factor=0.75, mode="bilinear")[0]
    narrow = first[:, :, : first.shape[2] * 2 // 3]
    blank = torch.zeros_like(first)
    return [*([image] for image in resized), [small], [narrow], [blank], [*resized, small], []]


def _description(cfg: CfgNode, graph: DetectionGraph, classes: Sequence[str]) -> dict[str, Any]:
    masks = {"masks": "float32 (D, M, M), probability over each box"}
    return {
        "classes": list(classes),
        "input_size": {
            "shorter_side": cfg.INPUT.MIN_SIZE_TEST,
            "longer_side_at_most": cfg.INPUT.MAX_SIZE_TEST,
        },
        "channel_order": cfg.INPUT.FORMAT,
        "mean": list(cfg.MODEL.PIXEL_MEAN),
        "deviation": list(cfg.MODEL.PIXEL_STD),
        "input": {
            "images": f"float32 (N, {image_channels(graph.model)}, H, W), resized, in channel_order"
            ", values 0 to 255: the model subtracts mean and divides by deviation itself; padded "
            "right and below; N, H and W may vary, N may be 0",
            "sizes": "int64 (N, 2), height and width of each image without padding",
        },
        "output": {
            "boxes": "float32 (D, 4), x1 y1 x2 y2 in pixels of images",
            "scores": "float32 (D), highest first",
            "classes": "int64 (D), an index into the list classes",
            "image_index": "int64 (D)",
            **(masks if "masks" in graph.output_names else {}),
        },
    }

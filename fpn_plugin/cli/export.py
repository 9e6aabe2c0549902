"""What tools/export_model.py does: writes files, runs each, and compares it with the model."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from fpn_plugin.data import channels_first, read_picture, register_datasets, resized_picture
from fpn_plugin.deploy.comparison import Agreement
from fpn_plugin.deploy.export import (
    FORMATS,
    TIME_LIMIT,
    Exported,
    batched,
    export_graph,
    exportable,
    load_exported,
)
from fpn_plugin.deploy.graph import DetectionGraph
from fpn_plugin.engine.inference import Detector, class_names
from fpn_plugin.engine.settings import load_config
from fpn_plugin.errors import UserError
from fpn_plugin.modeling import image_channels

from .common import ToolParser, at_least, output_folder

__all__ = ["argument_parser", "differences", "export_main"]

BOX_PX, SCORE, MASK = 0.05, 1e-3, 1e-2
"""Greatest differences between a file's detections and the model's: pixels, scores, and mask
probabilities."""

_COLUMNS = ("detections", "other", "box (px)", "score", "mask")


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of tools/export_model.py."""
    parser = ToolParser(
        description="Export a trained Faster R-CNN, Mask R-CNN or RetinaNet, run each file, and "
        "compare its detections with the model's.",
        epilog="Example:\n  export_model.py --config-file output/demo/config.yaml --input "
        "photo.jpg \\\n      --output exported MODEL.WEIGHTS output/demo/model_final.pth\n",
    )
    parser.add_argument("--config-file", required=True, help="path of a config, or packaged name")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="IMAGE", help="to compare detections on"
    )
    parser.add_argument(
        "--output", type=output_folder, default="output/exported", help="folder to write to"
    )
    parser.add_argument("--dataset", action="append", default=[], metavar="NAME=JSON:IMAGES")
    parser.add_argument(
        "--time-limit",
        type=at_least(1),
        default=TIME_LIMIT,
        metavar="SECONDS",
        help="give a format up that takes longer to write (default: %(default)s)",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config options: KEY VALUE ...")
    return parser


def export_main(argv: Sequence[str] | None = None) -> None:
    """Exports, checks, and prints a line for each format.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: something given cannot be used, a format cannot carry the model, or a file's
            detections are not the model's. Formats that are fine are written all the same.
    """
    args = argument_parser().parse_args(argv)
    cfg = load_config(args.config_file, args.opts)
    cfg.MODEL.DEVICE = "cpu"
    register_datasets(args.dataset)
    cases = _cases(cfg, args.input)
    model = Detector(cfg).model
    graph = exportable(model)
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.json").write_text(json.dumps(_description(cfg, graph), indent=1))
    rows: list[list[Any]] = []
    problems: list[str] = []
    for kind in args.formats:
        path = folder / FORMATS[kind]
        started = time.perf_counter()
        print(f"{kind}: writing {path} (up to some minutes)", flush=True)
        try:
            export_graph(graph, kind, path, args.time_limit)
            found = differences(model, load_exported(path), cases)
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
    headers = ["format", "file", "MB", "seconds", *_COLUMNS]
    print(tabulate(rows, headers=headers, tablefmt="github", floatfmt=".3g"))
    print(
        f"Compared on {len(cases)} batches, one of no image; other: detections that only one of "
        "them has; box, score, mask: largest differences.\nInput, output and classes: "
        f"{folder / 'model.json'}. Resizing before, and pasting masks after, is the caller's."
    )
    if "torch_export" in args.formats:
        print(
            f"torch_export's file takes images above {_coarsest(model)} px a side: a coarsest "
            "level of one cell is a case of its own to it."
        )
    if problems:
        raise UserError("\n".join(problems))


def differences(
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


def _cases(cfg: CfgNode, paths: Sequence[str]) -> list[list[Tensor]]:
    """Each image as the config resizes it; all at once; smaller and narrower ones; none."""
    pictures = [resized_picture(cfg, read_picture(cfg, path))[0] for path in paths]
    images = [channels_first(cfg, picture) for picture in pictures]
    first = images[0]
    small = F.interpolate(first[None], scale_factor=0.75, mode="bilinear")[0]
    narrow = first[:, :, : first.shape[2] * 2 // 3]
    blank = torch.zeros_like(first)
    return [*([image] for image in images), [small], [narrow], [blank], [*images, small], []]


def _description(cfg: CfgNode, graph: DetectionGraph) -> dict[str, Any]:
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
        "classes": class_names(cfg),
    }

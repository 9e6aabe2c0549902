"""What tools/export_model.py does: writes files, runs each, and compares it with the model."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.transforms import ResizeShortestEdge
from tabulate import tabulate
from torch import Tensor, nn
from torch.nn import functional as F

from fpn_plugin.data import read_image_or_say, register_datasets
from fpn_plugin.engine.settings import load_config
from fpn_plugin.errors import UserError
from fpn_plugin.inference import Detector, class_names

from .export import FORMATS, Exported, batched, export_graph, exportable, load_exported
from .graph import DetectionGraph

__all__ = ["argument_parser", "differences", "export_main"]

BOX_PX, SCORE = 0.05, 1e-3
"""Greatest differences between a file's detections and the model's: pixels, and scores."""


def argument_parser() -> argparse.ArgumentParser:
    """The arguments of tools/export_model.py."""
    parser = argparse.ArgumentParser(
        description="Export a trained Faster R-CNN, Mask R-CNN or RetinaNet, run each file, and "
        "compare its detections with the model's.",
        epilog="Example:\n  export_model.py --config-file output/demo/config.yaml --input "
        "photo.jpg \\\n      --output exported MODEL.WEIGHTS output/demo/model_final.pth\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-file", required=True, help="path of a config, or packaged name")
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="IMAGE", help="to compare detections on"
    )
    parser.add_argument("--output", default="output/exported", help="folder to write to")
    parser.add_argument("--dataset", action="append", default=[], metavar="NAME=JSON:IMAGES")
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
    cfg = load_config(args.config_file, [*args.opts, "MODEL.DEVICE", "cpu"])
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
            export_graph(graph, kind, path)
            found = differences(model, load_exported(path), cases)
        except UserError as error:
            problems.append(str(error))
            continue
        size, seconds = path.stat().st_size / 2**20, time.perf_counter() - started
        rows.append([kind, str(path), size, seconds, *found.values()])
        if found["other"] or found["box (px)"] > BOX_PX or found["score"] > SCORE:
            problems.append(f"{path} does not give the model's detections: see the table")
    headers = ["format", "file", "MB", "seconds", "detections", "other", "box (px)", "score"]
    print(tabulate(rows, headers=headers, tablefmt="github", floatfmt=".3g"))
    print(
        f"Compared on {len(cases)} batches, one of no image; other: detections that only one of "
        "them has; box, score: largest differences.\nInput, output and classes: "
        f"{folder / 'model.json'}. Resizing before, and pasting masks after, is the caller's."
    )
    if "torch_export" in args.formats:
        coarsest = max(shape.stride for shape in model.backbone.output_shape().values())
        print(
            f"torch_export's file takes images above {coarsest} px a side: a coarsest level of "
            "one cell is a case of its own to it."
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
        cases: batches of images ``(3, H, W)`` in the model's channel order; one may be empty.

    Returns:
        ``detections``, the model's in all; ``other``: those that only one has, by rank within
        an image and class; ``box (px)`` and ``score``: largest differences of the rest.
    """
    found = {"detections": 0, "other": 0, "box (px)": 0.0, "score": 0.0}
    for images in cases:
        with torch.no_grad():
            expected = model([{"image": image} for image in images]) if images else []
            boxes, scores, classes, index, *_ = exported(*batched(images))
        for number, output in enumerate(expected):
            theirs, ours = output["instances"], index == number
            found["detections"] += len(theirs)
            for each in theirs.pred_classes.unique().tolist():
                mine, of_class = ours & (classes == each), theirs.pred_classes == each
                count = min(int(mine.sum()), int(of_class.sum()))
                found["other"] += int(mine.sum()) + int(of_class.sum()) - 2 * count
                if count:
                    box = boxes[mine][:count] - theirs.pred_boxes.tensor[of_class][:count]
                    score = scores[mine][:count] - theirs.scores[of_class][:count]
                    found["box (px)"] = max(found["box (px)"], float(box.abs().max()))
                    found["score"] = max(found["score"], float(score.abs().max()))
            known = torch.isin(classes[ours], theirs.pred_classes)
            found["other"] += int((~known).sum())
        if not images:
            found["other"] += len(boxes)
    return found


def _cases(cfg: CfgNode, paths: Sequence[str]) -> list[list[Tensor]]:
    """Each image as the config resizes it; all at once; smaller and narrower ones; none."""
    resize = ResizeShortestEdge(cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    images = []
    for path in paths:
        pixels = read_image_or_say(Path(path))
        if cfg.INPUT.FORMAT == "RGB":
            pixels = pixels[:, :, ::-1]
        pixels = resize.get_transform(pixels).apply_image(pixels)
        images.append(torch.tensor(np.ascontiguousarray(pixels)).permute(2, 0, 1).float())
    first = images[0]
    small = F.interpolate(first[None], scale_factor=0.75, mode="bilinear")[0]
    narrow = first[:, :, : first.shape[2] * 2 // 3]
    blank = torch.zeros_like(first)
    return [*([image] for image in images), [small], [narrow], [blank], [*images, small], []]


def _description(cfg: CfgNode, graph: DetectionGraph) -> dict[str, Any]:
    return {
        "input": {
            "images": f"float32 (N, 3, H, W), {cfg.INPUT.FORMAT}, values 0 to 255, padded right "
            "and below; N, H and W may vary, N may be 0",
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

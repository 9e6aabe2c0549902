"""A training of some hundredths of a second per iteration, with every source of randomness."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from fpn_plugin.errors import UserError

__all__ = ["make_new_folder", "make_squares", "tiny_options"]


def make_new_folder(folder: Path) -> None:
    """Makes the folder of --output.

    Raises:
        UserError: it exists already, or cannot be made.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError as error:
        raise UserError(f"{folder} exists already: name a new folder with --output") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a NUL
        message = getattr(error, "strerror", None) or error
        raise UserError(f"cannot make {folder}: {message}; name another with --output") from error


def make_squares(folder: Path, images: int = 12) -> str:
    """Makes a COCO-format dataset of bright squares on dark ground, some wide and some high.

    Args:
        folder: to make; ``images/*.png`` and ``squares.json`` are written to it.
        images: how many.

    Returns:
        What --dataset takes to register it as "squares".
    """
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    content: dict = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "square"}]}
    for number in range(images):
        width, height = (80, 64) if number % 3 else (64, 80)
        pixels = rng.integers(0, 60, (height, width, 3), dtype=np.uint8)
        x, y, side = (int(v) for v in rng.integers(8, 32, 3))
        pixels[y : y + side, x : x + side] = 220
        name = f"{number:04d}.png"
        Image.fromarray(pixels).save(folder / "images" / name)
        content["images"].append(
            {"id": number, "file_name": name, "width": width, "height": height}
        )
        content["annotations"].append(
            {"id": number + 1, "image_id": number, "category_id": 1, "bbox": [x, y, side, side],
             "area": side * side, "iscrowd": 0}
        )  # fmt: skip
    (folder / "squares.json").write_text(json.dumps(content))
    return f"squares={folder / 'squares.json'}:{folder / 'images'}"


def tiny_options(dataset: str, output: Path, workers: int = 1) -> list[str]:
    """Arguments of ``fpn-plugin train`` for a small Faster R-CNN on these squares, on the CPU.

    Scales and mirroring are drawn at random, images grouped by aspect ratio.

    Args:
        dataset: as :func:`make_squares` returns it.
        output: OUTPUT_DIR.
        workers: processes that load images.
    """
    return [
        "--config-file", "mini/faster_rcnn_R_18_FPN.yaml", "--dataset", dataset, "--resume",
        "MODEL.DEVICE", "cpu", "DATASETS.TRAIN", "('squares',)", "DATASETS.TEST", "('squares',)",
        "MODEL.ROI_HEADS.NUM_CLASSES", "1", "MODEL.FPN.OUT_CHANNELS", "16",
        "MODEL.ROI_BOX_HEAD.FC_DIM", "16", "INPUT.MIN_SIZE_TRAIN", "(48, 56, 64)",
        "INPUT.MIN_SIZE_TEST", "64", "INPUT.RANDOM_FLIP", "horizontal",
        "SOLVER.IMS_PER_BATCH", "2", "DATALOADER.NUM_WORKERS", str(workers),
        "MODEL.RPN.POST_NMS_TOPK_TRAIN", "50", "MODEL.RPN.POST_NMS_TOPK_TEST", "20",
        "OUTPUT_DIR", str(output),
    ]  # fmt: skip

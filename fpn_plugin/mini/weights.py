"""Initial weights of the mini rows of Tables 2 to 5: ``mini://R-18.pth``.

The paper's detectors start from networks that classify ImageNet (section 5). These replace them
without a download: ResNets that classify windows around the digits of ``mini_train``. Training them
takes a few minutes, on first use.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import build_resnet_backbone
from detectron2.modeling.roi_heads import Res5ROIHeads
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import PathHandler, file_lock
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from fpn_plugin.errors import UserError, near_names

from .dataset import ensure_mini, mini_root

logger = logging.getLogger(__name__)

__all__ = ["MINI_WEIGHTS", "Schedule", "ensure_mini_weights", "register_mini_weights"]

MINI_WEIGHTS = "mini://"
_DEPTHS = {"R-18.pth": 18, "R-34.pth": 34}
_WINDOW_PX = 64
_CLASSES = 10  # digits; the class of a disc depends on what lies outside a window
_MARGIN = (1.1, 2.5)  # least and largest side of a window over the digit's longer side
_WINDOWS_EACH = 2
_KEPT_EVERY = 50  # iterations


class Schedule:
    """How the network is trained: SGD, with a learning rate that rises and falls in one cycle."""

    iterations = 500
    batch = 64
    learning_rate = 0.08


def register_mini_weights() -> None:
    """Lets Detectron2 read names that begin with ``mini://``. Safe to call twice."""
    PathManager.register_handler(_MiniWeights(), allow_override=True)


class _MiniWeights(PathHandler):
    """Reads ``mini://R-18.pth``, which is made if it is not there."""

    def _get_supported_prefixes(self) -> list[str]:
        return [MINI_WEIGHTS]

    def _get_local_path(self, path: str, force: bool = False, **kwargs: Any) -> str:
        return str(ensure_mini_weights(path.removeprefix(MINI_WEIGHTS)))

    def _open(self, path: str, mode: str = "r", **kwargs: Any) -> Any:
        return open(self._get_local_path(path), mode)


def _fingerprint() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]


def ensure_mini_weights(name: str, *, root: Path | None = None) -> Path:
    """The file of weights, which is made if it is not there, with a progress bar.

    Several processes may call it at once: one makes the file, the others wait. An interrupted
    training continues.

    Args:
        name: ``R-18.pth`` or ``R-34.pth``.
        root: folder of the mini dataset to train on, which is made if it is not there;
            :func:`mini_root` by default.

    Returns:
        A checkpoint with the names of Detectron2's ResNets. It also has the conv5 of Res5ROIHeads,
        row (a) of Tables 2 and 3, trained on the same C4.

    Raises:
        UserError: there is no such name, or the folder cannot be written.
    """
    if name not in _DEPTHS:
        raise UserError(f"no weights {MINI_WEIGHTS + name!r}: {near_names(name, _DEPTHS)}")
    root = mini_root() if root is None else root
    path = root.with_name(f"{root.name}-{_fingerprint()}-{name}")
    if path.is_file():
        return path
    ensure_mini(root=root)
    try:
        with file_lock(str(path)):
            if not path.is_file():  # another process may have made it while this one waited
                _make(path, _DEPTHS[name], root)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {error.strerror or error}; set DETECTRON2_DATASETS to a folder "
            "that can be written"
        ) from error
    return path


def _config(depth: int) -> CfgNode:
    """Keys of the network, as in configs/mini/Base-Mini.yaml."""
    cfg = get_cfg()
    cfg.MODEL.PIXEL_STD = [57.0, 57.0, 57.0]
    node = cfg.MODEL.RESNETS
    node.DEPTH, node.RES2_OUT_CHANNELS, node.WIDTH_PER_GROUP, node.NORM = depth, 64, 16, "BN"
    node.OUT_FEATURES = ["res4", "res5"]
    cfg.MODEL.BACKBONE.FREEZE_AT = 0
    return cfg


class _Classifier(nn.Module):
    """A ResNet, and row (a)'s conv5 on the same C4; each predicts the digit."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        cfg = _config(depth)
        self.resnet = build_resnet_backbone(cfg, ShapeSpec(channels=3))
        self.conv5, channels = Res5ROIHeads._build_res5_block(cfg)
        self.linears = nn.ModuleList(nn.Linear(channels, _CLASSES) for _ in range(2))
        for kind in ("mean", "std"):
            value = torch.tensor(getattr(cfg.MODEL, f"PIXEL_{kind.upper()}")).view(3, 1, 1)
            self.register_buffer(kind, value, persistent=False)

    def forward(self, windows: Tensor) -> list[Tensor]:
        """Two logits ``(N, 10)`` of windows, uint8 RGB ``(N, H, W, 3)``."""
        pixels = windows.permute(0, 3, 1, 2).flip(1).float()  # BGR, as the detectors read it
        maps = self.resnet((pixels - self.mean) / self.std)
        ends = (maps["res5"], self.conv5(maps["res4"]))
        return [linear(c5.mean((2, 3))) for linear, c5 in zip(self.linears, ends, strict=True)]

    def weights(self) -> dict[str, Any]:
        """A checkpoint that Detectron2 matches with any backbone."""
        conv5 = {f"roi_heads.res5.{key}": value for key, value in self.conv5.state_dict().items()}
        return {"model": {**self.resnet.state_dict(), **conv5}, "matching_heuristics": True}


def _make(path: Path, depth: int, root: Path) -> None:
    windows, labels = _windows(root, "train")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _Classifier(depth)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    parts = {"model": model, "optimizer": optimizer}
    partial = path.with_name(path.name + ".partial")
    done = _restore(partial, parts)
    # The state of a schedule is in the optimizer's rates.
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, Schedule.learning_rate, Schedule.iterations, last_epoch=done - 1
    )
    model.train()
    bar = tqdm(total=Schedule.iterations, initial=done, unit="it", smoothing=0.02)
    bar.set_description(f"{MINI_WEIGHTS}R-{depth}.pth learns digits, once")
    with bar:
        for iteration in range(done, Schedule.iterations):
            if iteration > done and iteration % _KEPT_EVERY == 0:
                state = {key: part.state_dict() for key, part in parts.items()}
                _write({**state, "done": iteration}, partial)
            # Seeded by the iteration, so that an interrupted training gives the same weights.
            generator = torch.Generator().manual_seed(iteration)
            batch = torch.randint(len(windows), (Schedule.batch,), generator=generator)
            loss = sum(F.cross_entropy(logits, labels[batch]) for logits in model(windows[batch]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            bar.set_postfix_str(f"loss {loss.item() / 2:.2f}", refresh=False)
            bar.update()
    accuracy = _accuracy(model.eval(), *_windows(root, "val"))
    logger.info("%sR-%d.pth: %.0f %% of mini_val's digits right", MINI_WEIGHTS, depth, accuracy)
    _write({**model.weights(), "accuracy": accuracy}, path)
    partial.unlink(missing_ok=True)


@torch.no_grad()
def _accuracy(model: nn.Module, windows: Tensor, labels: Tensor) -> float:
    """The accuracy of the ResNet's own conv5, in percent."""
    batches = zip(windows.split(Schedule.batch), labels.split(Schedule.batch), strict=True)
    right = sum(int((model(images)[0].argmax(1) == of).sum()) for images, of in batches)
    return 100 * right / len(labels)


def _restore(partial: Path, parts: dict[str, Any]) -> int:
    """Restores an interrupted training; returns its number of iterations."""
    if not partial.is_file():
        return 0
    kept = torch.load(partial, weights_only=True)
    for key, part in parts.items():
        part.load_state_dict(kept[key])
    return kept["done"]


def _write(content: dict[str, Any], path: Path) -> None:
    aside = path.with_name(path.name + ".aside")
    torch.save(content, aside)
    os.replace(aside, path)


def _windows(root: Path, split: str) -> tuple[Tensor, Tensor]:
    """Windows around a split's digits, uint8 RGB ``(N, 64, 64, 3)``, and the digits, ``(N,)``."""
    content = json.loads((root / f"{split}.json").read_text())
    files = {image["id"]: root / split / image["file_name"] for image in content["images"]}
    digits: dict[int, list[dict[str, Any]]] = {}
    for annotation in content["annotations"]:
        if annotation["category_id"] <= _CLASSES:
            digits.setdefault(annotation["image_id"], []).append(annotation)
    rng = np.random.default_rng(0)
    windows, labels = [], []
    for image_id, in_image in digits.items():
        with Image.open(files[image_id]) as file:
            image = file.convert("RGB")
        for annotation in in_image:
            x, y, width, height = annotation["bbox"]
            longer = max(width, height)
            for margin in np.exp(rng.uniform(*np.log(_MARGIN), _WINDOWS_EACH)):
                side = longer * margin
                shift = rng.uniform(-0.5, 0.5, 2) * (side - longer)
                left = x + (width - side) / 2 + shift[0]
                top = y + (height - side) / 2 + shift[1]
                window = image.transform(
                    (_WINDOW_PX, _WINDOW_PX),
                    Image.Transform.EXTENT,
                    (left, top, left + side, top + side),
                    Image.Resampling.BILINEAR,
                )
                windows.append(np.asarray(window))
                labels.append(annotation["category_id"] - 1)
    return torch.from_numpy(np.stack(windows)), torch.tensor(labels)

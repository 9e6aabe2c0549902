"""The packaged configs, by name: ``"COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"``."""

from __future__ import annotations

from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

from .config import add_fpn_config
from .errors import UserError, near_names

__all__ = ["get", "get_config", "get_config_file", "lazy_names", "names"]


def _configs_root() -> Path:
    """The configs' folder: inside the installed package, or next to it in a checkout."""
    here = Path(__file__).resolve().parent
    installed = here / "configs"
    return installed if installed.is_dir() else here.parent / "configs"


def names() -> list[str]:
    """Names of all packaged configs, bases left out."""
    root = _configs_root()
    found = (path.relative_to(root).as_posix() for path in root.rglob("*.yaml"))
    return sorted(name for name in found if not Path(name).name.startswith("Base"))


def lazy_names() -> list[str]:
    """Names of the packaged lazy configs in Python; YAML configs have lazy forms too."""
    root = _configs_root()
    return sorted(path.relative_to(root).as_posix() for path in (root / "lazy").rglob("*.py"))


def get_config_file(name: str) -> str:
    """Path of a packaged config.

    Args:
        name: for example ``"COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"``.

    Raises:
        UserError: there is none of that name; lists near names.
    """
    path = _configs_root() / name
    if not path.is_file():
        known = [*names(), *lazy_names()]
        raise UserError(f"no config {name!r} in the package: {near_names(name, known)}")
    return str(path)


def get_config(name: str) -> CfgNode:
    """A packaged config over Detectron2's defaults and the plugin's.

    Args:
        name: see :func:`get_config_file`.
    """
    cfg = get_cfg()
    add_fpn_config(cfg)
    cfg.merge_from_file(get_config_file(name), allow_unsafe=False)
    return cfg


def get(name: str, device: str | None = None) -> nn.Module:
    """The model of a packaged config, with random weights, in training mode.

    Args:
        name: see :func:`get_config_file`.
        device: "cpu", "cuda", ...; by default a GPU if there is one, else the CPU.
    """
    cfg = get_config(name)
    cfg.MODEL.DEVICE = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return build_model(cfg)

"""Lazy configs, made from a YAML or read from a Python file."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import LazyConfig
from omegaconf import DictConfig

from fpn_plugin import model_zoo
from fpn_plugin.engine.settings import load_config
from fpn_plugin.errors import UserError

from .checking import check_arguments, check_override_keys, check_override_types
from .model import config_of, model_node
from .training import dataloader_node, optimizer_node, schedule_node, train_node

__all__ = ["get_config", "load_lazy_config"]


def get_config(name: str) -> DictConfig:
    """The lazy config of a model, made from its YAML.

    Args:
        name: path of a YAML, or name of a packaged one, such as
            ``"COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"``. A packaged name may end in ``.py``,
            and begin with ``lazy/`` or ``configs/``. FCOS has no YAML; its name is
            ``"COCO-Detection/fcos_R_50_FPN_1x.py"``.

    Returns:
        Nodes ``model``, ``optimizer``, ``lr_multiplier``, ``dataloader`` and ``train``, in this
        order.

    Raises:
        UserError: there is no such YAML, or a part of it has no lazy form here.
    """
    if name.endswith(".py") or not Path(name).is_file():
        name = name.removeprefix("./").removeprefix("configs/").removeprefix("lazy/")
        stem = name.removesuffix(".py").removesuffix(".yaml")
        if f"{stem}.yaml" not in model_zoo.names() and f"lazy/{stem}.py" in model_zoo.lazy_names():
            return LazyConfig.load(model_zoo.get_config_file(f"lazy/{stem}.py"))
        name = f"{stem}.yaml"
    cfg = load_config(name)
    return config_of(
        {
            "model": model_node(cfg),
            "optimizer": optimizer_node(cfg),
            "lr_multiplier": schedule_node(cfg),
            "dataloader": dataloader_node(cfg),
            "train": train_node(cfg),
        }
    )


def load_lazy_config(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """A lazy config from a .py file or :func:`get_config`, with overrides.

    This runs the .py file and what it imports: load files only if you trust their authors.

    Args:
        name: path of a .py file, or a name for :func:`get_config`.
        overrides: ``["train.max_iter=100", ...]``.

    Raises:
        UserError: there is no such config, an override does not fit, or a node has an argument
            that its class does not take.
    """
    for override in overrides:
        if override.startswith("--"):
            raise UserError(f"{override} is among the config options: give it before key=value")
        if "=" not in override:
            raise UserError(f"{override!r}: lazy configs take key=value, such as train.max_iter=9")
    is_own = name.endswith(".py") and Path(name).is_file()
    cfg = LazyConfig.load(name) if is_own else get_config(name)
    missing = [part for part in ("model", "dataloader", "train") if part not in cfg]
    if missing:
        raise UserError(f"{name} does not configure a training: it has no {', '.join(missing)}")
    check_override_keys(cfg, overrides)
    before = copy.deepcopy(cfg)
    try:
        cfg = LazyConfig.apply_overrides(cfg, list(overrides))
        check_override_types(before, cfg, overrides)
    except UserError:
        raise
    except Exception as error:  # hydra, if it is installed, has exceptions of its own
        raise UserError(f"{' '.join(str(error).split())} (in {list(overrides)})") from error
    check_arguments(cfg)
    return cfg

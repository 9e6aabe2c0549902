"""Lazy configs: made from a YAML, or a user's own Python file."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import LazyConfig
from omegaconf import DictConfig, OmegaConf

from fpn_plugin import model_zoo
from fpn_plugin.engine.settings import load_config
from fpn_plugin.errors import UserError

from .checking import check_arguments, check_override_keys, check_override_types
from .model import model_node
from .training import dataloader_node, optimizer_node, schedule_node, train_node

__all__ = ["get_config", "load_lazy_config"]


def get_config(name: str) -> DictConfig:
    """The lazy config of a model, made from its YAML.

    Args:
        name: path of a YAML, or name of a packaged one, as
            ``"COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"``. In a packaged one's name, ``.py`` is
            taken for ``.yaml``, and ``lazy/`` or ``configs/`` before it is left out. FCOS, which
            has no YAML, is ``"COCO-Detection/fcos_R_50_FPN_1x.py"``.

    Returns:
        Nodes ``model``, ``optimizer``, ``lr_multiplier``, ``dataloader`` and ``train``, in this
        order.

    Raises:
        UserError: there is no such YAML, or it has a part that has no lazy form here.
    """
    if name.endswith(".py") or not Path(name).is_file():
        name = name.removeprefix("./").removeprefix("configs/").removeprefix("lazy/")
        stem = name.removesuffix(".py").removesuffix(".yaml")
        if f"{stem}.yaml" not in model_zoo.names() and f"lazy/{stem}.py" in model_zoo.lazy_names():
            return LazyConfig.load(model_zoo.get_config_file(f"lazy/{stem}.py"))
        name = f"{stem}.yaml"
    cfg = load_config(name)
    nodes = {
        "model": model_node(cfg),
        "optimizer": optimizer_node(cfg),
        "lr_multiplier": schedule_node(cfg),
        "dataloader": dataloader_node(cfg),
        "train": train_node(cfg),
    }
    return OmegaConf.create(nodes, flags={"allow_objects": True})


def load_lazy_config(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """A lazy config, from a .py file or by :func:`get_config`, with overrides.

    A .py file is run, as are those that it imports: load only those whose author you trust.

    Args:
        name: path of a .py file, or see :func:`get_config`.
        overrides: ``["train.max_iter=100", ...]``.

    Raises:
        UserError: there is none; or an override that does not fit; or an argument that what it
            is given to does not take.
    """
    for override in overrides:
        if override.startswith("--"):
            raise UserError(f"{override} is among the config options: give it before key=value")
        if "=" not in override:
            raise UserError(
                f"option {override!r}: lazy configs take key=value, as train.max_iter=9"
            )
    is_own = name.endswith(".py") and Path(name).is_file()
    cfg = LazyConfig.load(name) if is_own else get_config(name)
    missing = [part for part in ("model", "dataloader", "train") if part not in cfg]
    if missing:
        raise UserError(f"{name} is no config of a training: it has no {', '.join(missing)}")
    check_override_keys(cfg, overrides)
    before = copy.deepcopy(cfg)
    try:
        cfg = LazyConfig.apply_overrides(cfg, list(overrides))
        check_override_types(before, cfg, overrides)
    except UserError:
        raise
    except Exception as error:  # hydra, if it is installed, has its own for what it cannot read
        raise UserError(f"{' '.join(str(error).split())} (in {list(overrides)})") from error
    check_arguments(cfg)
    return cfg

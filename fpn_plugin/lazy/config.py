"""Lazy configs: of a packaged model, by the name of its YAML, and of a user's own Python file."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

from detectron2.config import LazyConfig
from omegaconf import DictConfig, OmegaConf

from fpn_plugin import model_zoo
from fpn_plugin.errors import UserError, near_names

from .checking import check_arguments, check_override_keys, check_override_types
from .model import model_node
from .training import dataloader_node, optimizer_node, schedule_node, train_node

__all__ = ["get_config", "load_lazy_config"]


def get_config(name: str) -> DictConfig:
    """The lazy config of a packaged model, made from its YAML.

    Args:
        name: of the YAML, as ``"COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"``. ``configs/`` and
            ``lazy/`` before it are left out, and ``.py`` is taken for ``.yaml``. FCOS, which has
            no YAML, is ``"COCO-Detection/fcos_R_50_FPN_1x.py"``.

    Returns:
        Nodes ``model``, ``optimizer``, ``lr_multiplier``, ``dataloader`` and ``train``, in this
        order.

    Raises:
        UserError: there is none of that name, or it has a part that has no lazy form here.
    """
    stem = name.removeprefix("./").removeprefix("configs/").removeprefix("lazy/")
    stem = stem.removesuffix(".py").removesuffix(".yaml")
    known = model_zoo.names()
    if f"{stem}.yaml" in known:
        cfg = model_zoo.get_config(f"{stem}.yaml")
        nodes = {
            "model": model_node(cfg),
            "optimizer": optimizer_node(cfg),
            "lr_multiplier": schedule_node(cfg),
            "dataloader": dataloader_node(cfg),
            "train": train_node(cfg),
        }
        return OmegaConf.create(nodes, flags={"allow_objects": True})
    if f"lazy/{stem}.py" in model_zoo.lazy_names():
        return LazyConfig.load(model_zoo.get_config_file(f"lazy/{stem}.py"))
    known += [each.removeprefix("lazy/") for each in model_zoo.lazy_names()]
    raise UserError(
        f"no lazy config {name!r}, neither as a path nor in the package: {near_names(stem, known)}"
    )


def load_lazy_config(name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """A lazy config from a path or, failing that, the packaged one of that name.

    A lazy config is Python and is run, as are those that it imports: load only those whose author
    you trust.

    Args:
        name: path of a .py file, or see :func:`get_config`.
        overrides: ``["train.max_iter=100", ...]``.

    Raises:
        UserError: there is none; or an override that does not fit; or an argument that what it
            is given to does not take.
    """
    for override in overrides:
        if override.startswith("--"):
            raise UserError(f"{override} stands among config options: give it before key=value")
        if "=" not in override:
            raise UserError(
                f"option {override!r}: lazy configs take key=value, as train.max_iter=9"
            )
    is_file = Path(name).is_file()
    if is_file and not name.endswith(".py") and name not in model_zoo.names():
        # Detectron2 reads others with tags that run code, and calls what they name as _target_.
        raise UserError(
            f"{name} is not a .py file: a lazy config is Python or the name of a packaged model; "
            "a YAML of your own is for fpn-plugin train"
        )
    cfg = LazyConfig.load(name) if is_file and name.endswith(".py") else get_config(name)
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

"""The packaged models as LazyConfig, made from their yacs configs so that the two cannot drift.

Every node names the class or function that makes it, with its arguments, so that a user can
exchange or change any of them: ``cfg.model.backbone.out_channels = 128``.
"""

from __future__ import annotations

from typing import NamedTuple

from omegaconf import DictConfig

from fpn_plugin import model_zoo

from .model import build_network, model_node, with_pyramid
from .training import dataloader_node, optimizer_node, schedule_node, train_node

__all__ = ["Twin", "build_network", "model_node", "twin", "with_pyramid"]


class Twin(NamedTuple):
    """The nodes of a lazy config, in the order in which a config file names them."""

    model: DictConfig
    optimizer: DictConfig
    lr_multiplier: DictConfig
    dataloader: DictConfig
    train: DictConfig


def twin(name: str) -> Twin:
    """The lazy config of a packaged model.

    Args:
        name: of its yacs config, for example ``"COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"``.

    Raises:
        UserError: there is none of that name, or it has a part that has no lazy form here.
    """
    cfg = model_zoo.get_config(name)
    return Twin(
        model_node(cfg),
        optimizer_node(cfg),
        schedule_node(cfg),
        dataloader_node(cfg),
        train_node(cfg),
    )

"""The packaged models as LazyConfig, made from their yacs configs so that the two cannot drift.

Every node names the class or function that makes it, with its arguments, so that a user can
exchange or change any of them: ``cfg.model.backbone.out_channels = 128``.
"""

from .config import get_config, load_lazy_config
from .model import build_network, model_node, with_pyramid

__all__ = ["build_network", "get_config", "load_lazy_config", "model_node", "with_pyramid"]

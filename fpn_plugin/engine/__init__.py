"""What the tools share: config, launching, training, checkpoints. Detectron2's, put together."""

from .checkpoint import StrictCheckpointer
from .launch import run_tool
from .settings import find_config_file, load_config
from .trainer import FPNTrainer

__all__ = ["FPNTrainer", "StrictCheckpointer", "find_config_file", "load_config", "run_tool"]

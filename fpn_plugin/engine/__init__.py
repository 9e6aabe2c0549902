"""What the tools share: config, launching, training, checkpoints. Detectron2's, put together."""

from .checkpoint import FittingCheckpointer
from .launch import run_tool
from .settings import find_config_file, load_config
from .trainer import FPNTrainer

__all__ = ["FPNTrainer", "FittingCheckpointer", "find_config_file", "load_config", "run_tool"]

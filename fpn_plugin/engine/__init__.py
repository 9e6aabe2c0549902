"""Configs, launching, training and checkpoints: Detectron2's parts, composed."""

from .checkpoint import StrictCheckpointer
from .launch import run_tool
from .segment_evaluation import SegmentProposalEvaluator
from .settings import find_config_file, load_config
from .trainer import FPNTrainer

__all__ = [
    "FPNTrainer", "SegmentProposalEvaluator", "StrictCheckpointer", "find_config_file",
    "load_config", "run_tool",
]  # fmt: skip

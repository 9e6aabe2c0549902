"""One way to read what a run needs from a config of either kind, yacs or lazy."""

from __future__ import annotations

import functools
import operator
from typing import Any

from detectron2.config import CfgNode
from omegaconf import DictConfig, OmegaConf

from fpn_plugin.errors import UserError

from .settings import check_number, check_seed

__all__ = ["RunConfig"]

# A setting's name, its yacs key and its lazy key.
_KEYS = {
    "amp": ("SOLVER.AMP.ENABLED", "train.amp.enabled"),
    "amp_dtype": ("SOLVER.AMP.DTYPE", "train.amp.dtype"),
    "augmented_sizes": ("TEST.AUG.MIN_SIZES", "train.tta.min_sizes"),
    "augmented_test": ("TEST.AUG.ENABLED", "train.tta.enabled"),
    "batch_size": ("SOLVER.IMS_PER_BATCH", "dataloader.train.total_batch_size"),
    "checkpoint_period": ("SOLVER.CHECKPOINT_PERIOD", "train.checkpointer.period"),
    "compile": ("MODEL.FPN.COMPILE", "train.compile"),
    "device": ("MODEL.DEVICE", "train.device"),
    "expected_results": ("TEST.EXPECTED_RESULTS", "train.expected_results"),
    "learning_rate": ("SOLVER.BASE_LR", "optimizer.lr"),
    "level_stats_period": ("MODEL.FPN.LEVEL_STATS_PERIOD", "train.level_stats_period"),
    "max_iter": ("SOLVER.MAX_ITER", "train.max_iter"),
    "output_dir": ("OUTPUT_DIR", "train.output_dir"),
    "seed": ("SEED", "train.seed"),
    "test": ("DATASETS.TEST", "dataloader.test.dataset.names"),
    "test_proposals": ("DATASETS.PROPOSAL_FILES_TEST", "dataloader.test.dataset.proposal_files"),
    "train": ("DATASETS.TRAIN", "dataloader.train.dataset.names"),
    "train_proposals": ("DATASETS.PROPOSAL_FILES_TRAIN", "dataloader.train.dataset.proposal_files"),
    "weights": ("MODEL.WEIGHTS", "train.init_checkpoint"),
}
# What a lazy config may leave out.
_DEFAULTS = {"amp_dtype": "float16", "compile": False, "expected_results": [], "seed": -1}
_LEAST = {"max_iter": 1, "checkpoint_period": 1, "batch_size": 1, "learning_rate": 0}


class RunConfig:
    """The settings of a run, by names that are the same for yacs and lazy configs.

    Args:
        cfg: a config of either kind; it is kept, not copied.
    """

    def __init__(self, cfg: CfgNode | DictConfig) -> None:
        self.cfg = cfg
        self.is_lazy = OmegaConf.is_config(cfg)

    def key(self, name: str) -> str:
        """The config key of a setting, for messages."""
        return _KEYS[name][self.is_lazy]

    def __getitem__(self, name: str) -> Any:
        if not self.is_lazy:
            return functools.reduce(operator.getitem, self.key(name).split("."), self.cfg)
        value = OmegaConf.select(self.cfg, self.key(name))
        if value is None:
            return _DEFAULTS.get(name)
        return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value

    def __setitem__(self, name: str, value: Any) -> None:
        *nodes, last = self.key(name).split(".")
        functools.reduce(operator.getitem, nodes, self.cfg)[last] = value

    def names(self, split: str) -> list[str]:
        """Names of the datasets of a split, "train" or "test"."""
        names = self[split]
        return [names] if isinstance(names, str) else list(names)

    def check_solver(self) -> None:
        """Refuses numbers that no training could begin with.

        Raises:
            UserError: names the key, and what it is expected to be.
        """
        for name, least in _LEAST.items():
            if not self.is_lazy or self[name] is not None:  # a lazy config may leave it out
                check_number(self.key(name), self[name], least)
        if self.is_lazy:
            return
        key, batch = "SOLVER.REFERENCE_WORLD_SIZE", self["batch_size"]
        reference = self.cfg.SOLVER.REFERENCE_WORLD_SIZE
        check_number(key, reference, 0)
        if reference and batch % reference:
            raise UserError(
                f"{self.key('batch_size')} is {batch}, which {key} {reference} does not divide: "
                "processes have equal parts of a batch"
            )

    def check_seed(self) -> None:
        """Refuses a seed that no generator takes."""
        check_seed(self.key("seed"), self["seed"])

"""One way to read what a run needs from a config of either kind, yacs or lazy."""

from __future__ import annotations

import math
import sys
from typing import Any

from detectron2.config import CfgNode
from detectron2.modeling import GeneralizedRCNN, PanopticFPN
from omegaconf import DictConfig, OmegaConf

from fpn_plugin.config import value_at
from fpn_plugin.errors import UserError

__all__ = ["RunConfig"]

# A setting's name, its yacs key and its lazy key.
_KEYS = {
    "amp": ("SOLVER.AMP.ENABLED", "train.amp.enabled"),
    "amp_dtype": ("SOLVER.AMP.DTYPE", "train.amp.dtype"),
    "augmented_sizes": ("TEST.AUG.MIN_SIZES", "train.tta.min_sizes"),
    "augmented_test": ("TEST.AUG.ENABLED", "train.tta.enabled"),
    "batch_size": ("SOLVER.IMS_PER_BATCH", "dataloader.train.total_batch_size"),
    "best_metric": ("SOLVER.BEST_METRIC", "train.best_metric"),
    "checkpoint_period": ("SOLVER.CHECKPOINT_PERIOD", "train.checkpointer.period"),
    "compile": ("MODEL.FPN.COMPILE", "train.compile"),
    "device": ("MODEL.DEVICE", "train.device"),
    "epochs": ("SOLVER.EPOCHS", "train.epochs"),
    "eval_period": ("TEST.EVAL_PERIOD", "train.eval_period"),
    "expected_results": ("TEST.EXPECTED_RESULTS", "train.expected_results"),
    "learning_rate": ("SOLVER.BASE_LR", "optimizer.lr"),
    "level_stats_period": ("MODEL.FPN.LEVEL_STATS_PERIOD", "train.level_stats_period"),
    "max_iter": ("SOLVER.MAX_ITER", "train.max_iter"),
    "output_dir": ("OUTPUT_DIR", "train.output_dir"),
    "patience": ("SOLVER.PATIENCE", "train.patience"),
    "reference_batch": ("SOLVER.REFERENCE_BATCH", "train.reference_batch"),
    "seed": ("SEED", "train.seed"),
    "test": ("DATASETS.TEST", "dataloader.test.dataset.names"),
    "test_proposals": ("DATASETS.PROPOSAL_FILES_TEST", "dataloader.test.dataset.proposal_files"),
    "train": ("DATASETS.TRAIN", "dataloader.train.dataset.names"),
    "train_proposals": ("DATASETS.PROPOSAL_FILES_TRAIN", "dataloader.train.dataset.proposal_files"),
    "warmup": ("SOLVER.WARMUP_ITERS", "lr_multiplier.warmup_length"),
    "weights": ("MODEL.WEIGHTS", "train.init_checkpoint"),
}
# What a lazy config may leave out.
_DEFAULTS = {
    "amp_dtype": "float16", "best_metric": "", "compile": False, "epochs": 0, "eval_period": 0,
    "expected_results": [], "patience": 0, "reference_batch": 0, "seed": -1, "warmup": 0,
}  # fmt: skip
_LEAST = {
    "max_iter": 1, "checkpoint_period": 1, "batch_size": 1, "learning_rate": 0, "epochs": 0,
    "patience": 0, "reference_batch": 0,
}  # fmt: skip
_EVALUATIONS = 10  # of a training whose length is in epochs
_LARGEST_SEED = 2**32 - 2**10  # numpy takes 32 bits, and each process adds its rank


class RunConfig:
    """The settings of a run, by names that are the same for yacs and lazy configs.

    Its checks raise a :class:`UserError` that names the key and what is expected of it.

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
            return value_at(self.cfg, self.key(name))
        value = OmegaConf.select(self.cfg, self.key(name))
        if value is None:
            return _DEFAULTS.get(name)
        return OmegaConf.to_object(value) if OmegaConf.is_config(value) else value

    def __setitem__(self, name: str, value: Any) -> None:
        node, _, last = self.key(name).rpartition(".")
        value_at(self.cfg, node)[last] = value

    def names(self, split: str) -> list[str]:
        """Names of the datasets of a split, "train" or "test"."""
        names = self[split]
        return [names] if isinstance(names, str) else list(names)

    def check_solver(self) -> None:
        """Refuses numbers that no training can begin with."""
        for name, least in _LEAST.items():
            if not self.is_lazy or self[name] is not None:  # a lazy config may leave it out
                _check_number(self.key(name), self[name], least)
        evaluations = self.names("test") and self["eval_period"] + self["epochs"]
        if self["patience"] and not (self["best_metric"] and evaluations):
            raise UserError(
                f"{self.key('patience')} is {self['patience']}: it needs {self.key('best_metric')} "
                f"'bbox/AP' or the like, and evaluations, by {self.key('eval_period')} or "
                f"{self.key('epochs')}, of {self.key('test')}"
            )
        steps = "lr_multiplier.scheduler.milestones" if self.is_lazy else "SOLVER.STEPS"
        if self["epochs"] and self._has_steps():
            raise UserError(
                f"{self.key('epochs')} is {self['epochs']}, and the rate falls at {steps}, which "
                "are iterations: take the schedule WarmupCosineLR, which has none"
            )
        if self.is_lazy:
            return
        key, batch = "SOLVER.REFERENCE_WORLD_SIZE", self["batch_size"]
        reference = self.cfg.SOLVER.REFERENCE_WORLD_SIZE
        _check_number(key, reference, 0)
        if reference and batch % reference:
            raise UserError(
                f"{self.key('batch_size')} is {batch}, which {key} {reference} does not divide: "
                "processes have equal parts of a batch"
            )

    def _has_steps(self) -> bool:
        if self.is_lazy:
            return OmegaConf.select(self.cfg, "lr_multiplier.scheduler.milestones") is not None
        return self.cfg.SOLVER.LR_SCHEDULER_NAME != "WarmupCosineLR"

    def set_length(self, images: int) -> None:
        """Sets the iterations and evaluations of a training whose length is in epochs.

        The warm-up becomes a tenth of the training at most.

        Args:
            images: of the training sets.
        """
        if not self["epochs"]:
            return
        before, batch = self["max_iter"], self["batch_size"]
        length = self["max_iter"] = max(math.ceil(self["epochs"] * images / batch), 1)
        if not self["eval_period"]:
            self["eval_period"] = self["checkpoint_period"] = math.ceil(length / _EVALUATIONS)
        # Iterations of a yacs config; a part of the length of a lazy one, which may have none.
        if not self.is_lazy:
            self["warmup"] = min(self["warmup"], length // 10)
        elif self["warmup"]:
            self["warmup"] = min(self["warmup"] * before / length, 0.1)

    def scale_rate(self) -> str:
        """Scales the learning rate to the batch, if it is given for batches of another size.

        Returns:
            What is scaled, for the user; "" if nothing is.
        """
        rate, given, batch = self["learning_rate"], self["reference_batch"], self["batch_size"]
        if not given or given == batch:
            return ""
        self["learning_rate"], self["reference_batch"] = rate * batch / given, batch
        return (
            f"{self.key('learning_rate')} is {self['learning_rate']:g} for batches of {batch}: "
            f"{rate:g} is for {given} ({self.key('reference_batch')})"
        )

    def check_seed(self) -> None:
        """Refuses a seed that not every generator takes."""
        _check_number(self.key("seed"), self["seed"], -sys.maxsize, _LARGEST_SEED)

    def check_mixed_precision(self) -> None:
        """Refuses mixed precision on the CPU, where Detectron2's trainer has none."""
        device = self["device"]
        if self["amp"] and not device.startswith("cuda"):
            raise UserError(
                f"{self.key('amp')} is True: mixed precision trains on a GPU, not on {device!r}"
            )

    def check_augmented_test(self, model: object, *, keypoints: bool, proposals: bool) -> None:
        """Refuses test-time augmentation, if it is enabled, of models that Detectron2 has none for.

        Args:
            model: class of the model.
            keypoints: whether it has a keypoint head.
            proposals: whether it reads proposals from files.
        """
        if not self["augmented_test"]:
            return
        key, sizes, without = self.key("augmented_test"), self["augmented_sizes"], ""
        is_rcnn = isinstance(model, type) and issubclass(model, GeneralizedRCNN)
        if not is_rcnn or issubclass(model, PanopticFPN):
            without = getattr(model, "__name__", str(model))
        elif keypoints:
            without = "a model with keypoints"
        elif proposals:
            without = "a model that reads proposals from files"
        if without:
            raise UserError(
                f"{key} is True, and Detectron2 has no test-time augmentation for {without}, only "
                "for Faster, Mask and Cascade R-CNN: set it to False"
            )
        if not sizes or any(type(size) is not int or size < 1 for size in sizes):
            raise UserError(
                f"{key} is True, and {self.key('augmented_sizes')} is {list(sizes)}: expected one "
                "or more sizes in pixels"
            )

    def check_expected_results(self) -> None:
        """Refuses expected results that no evaluation can be compared with."""
        key, tests = self.key("expected_results"), self.names("test")
        for entry in self["expected_results"]:
            fits = isinstance(entry, list | tuple) and len(entry) == 4
            kinds = [type(part) in (int, float) for part in entry] if fits else []
            if kinds != [False, False, True, True]:
                raise UserError(
                    f"{key} has {entry!r}: expected [task, metric, value, tolerance], such as "
                    "['bbox', 'AP', 37.9, 0.5]"
                )
        if self["expected_results"] and len(tests) != 1:
            raise UserError(f"{key} is for one test set, and there are {len(tests)}")


def _check_number(key: str, value: Any, least: int, most: int = sys.maxsize) -> None:
    # NaN is in no range.
    if type(value) not in (int, float) or not least <= value <= most:
        at_least = "" if least == -sys.maxsize else f", {least} or more"
        at_most = "" if most == sys.maxsize else f", {most} at most"
        raise UserError(f"{key} is {value}, expected a number{at_least}{at_most}")

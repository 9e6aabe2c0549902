"""A run of training or evaluation, from its config to its results, for yacs and lazy configs."""

from __future__ import annotations

import argparse
import importlib.util
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import default_setup
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.utils import comm
from omegaconf import DictConfig
from torch import nn

from fpn_plugin.data import (
    Needs,
    check_augmentations,
    check_classes,
    check_datasets,
    check_keypoints,
    check_proposal_files,
    check_records,
    number_of_classes,
    registered_specs,
)
from fpn_plugin.errors import UserError
from fpn_plugin.mini import ensure_mini_datasets
from fpn_plugin.mini.dataset import MINI_NAMES
from fpn_plugin.modeling import without_network_weights
from fpn_plugin.utils.atomic import explained_full_disk, make_output_dir

from .changes import earlier_config_kept
from .checkpoint import StrictCheckpointer
from .class_names import match_datasets
from .config_files import is_for_mini
from .launch import launch
from .logs import set_up_loggers
from .results import finish, tensorboard
from .run_config import RunConfig
from .run_datasets import (
    describe_datasets,
    register_with_runs,
    run_datasets,
    run_folders,
    save_run_datasets,
)
from .settings import find_config_file, settled_device
from .threads import limit_threads
from .trainer import FPNTrainer

__all__ = ["Run", "YacsRun"]

_LOGGER = logging.getLogger(__name__)


class Run(ABC):
    """A training, or an evaluation, in one process or several.

    Args:
        cfg: its config, which :meth:`start` changes.
        args: of Detectron2's argument parser, with ``dataset``: a list of ``NAME=JSON:IMAGES``.
        optimize: makes the fast copy of a model that an evaluation runs, and can be pickled; None
            evaluates the model itself.

    Raises:
        UserError: a training is given ``optimize``.
    """

    def __init__(
        self,
        cfg: CfgNode | DictConfig,
        args: argparse.Namespace,
        optimize: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        if optimize is not None and not args.eval_only:
            raise UserError("--optimize is for --eval-only: an optimised model cannot be trained")
        self.config, self.args, self._optimize = RunConfig(cfg), args, optimize
        self.training = not args.eval_only

    # ---- what differs between yacs and lazy configs

    @abstractmethod
    def needs(self, split: str) -> Needs:
        """What model and loader need of the data of a split, "train" or "test"."""

    @abstractmethod
    def classes(self) -> tuple[str, int | None]:
        """The key of the model's number of classes, and that number; None for one without."""

    @abstractmethod
    def proposal_files(self, split: str) -> Sequence[str] | None:
        """Files of proposals that the loader of a split reads; None for none."""

    @abstractmethod
    def flips(self) -> Sequence[str]:
        """How training mirrors images: "horizontal", "vertical"."""

    @abstractmethod
    def keypoint_sigmas(self) -> Sequence[float] | None:
        """Sigmas that keypoints are evaluated by: empty for COCO's, None if they are not."""

    @abstractmethod
    def check_config(self) -> None:
        """Refuses what only this kind of config can have wrong; its datasets are registered."""

    @abstractmethod
    def model(self) -> nn.Module:
        """The model, with no weights loaded."""

    @abstractmethod
    def trainer(self) -> Callable[[], Any]:
        """Makes all of a training, with weights loaded; the function that it returns runs it."""

    @abstractmethod
    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        """Results of the test sets, and those with test-time augmentation if it is enabled."""

    # ---- what is the same

    def start(self) -> None:
        """Checks all that can be checked before a process starts, then starts the processes.

        Raises:
            UserError: something given cannot be used.
        """
        config, args = self.config, self.args
        config.check_seed()
        if self.training:
            config.check_solver()
        config.check_expected_results()
        if self._optimize is not None and config["augmented_test"]:
            key = config.key("augmented_test")
            raise UserError(f"{key} is True: --optimize has no test-time augmentation")
        key = config.key("device")
        named = any(word == key or word.startswith(f"{key}=") for word in args.opts)
        config["device"] = settled_device(config["device"], named, args.num_gpus, key)
        if self.training:
            config.check_mixed_precision()
        self._runs = run_folders(args.config_file, config["weights"])
        if args.resume:
            self._runs.append(Path(config["output_dir"]))
        # check_data() checks.
        specs = register_with_runs(args.dataset, *self._runs, checked=True)
        self.check_data()
        args.dataset = registered_specs(specs)
        self._match_datasets()
        make_output_dir(config["output_dir"], config.key("output_dir"))
        names = [*config.names("train"), *config.names("test")]
        ensure_mini_datasets(names)
        # Not in the started processes, which register repaired copies of JSONs.
        self._datasets = describe_datasets(names)
        if self.training and config["epochs"]:
            config.set_length(sum(len(DatasetCatalog.get(name)) for name in config.names("train")))
        if self.training and (line := config.scale_rate()):
            print(line, flush=True)
        launch(self.work, args, config["device"], ())

    def check_data(self) -> None:
        """Refuses datasets that the model cannot be trained or evaluated on.

        Raises:
            UserError: a dataset or a file of proposals does not exist, a dataset has another
                number of classes than the model, images cannot be prepared, or keypoints do not
                fit.
        """
        config = self.config
        splits = ("train", "test") if self.training else ("test",)
        names = {split: config.names(split) for split in splits}
        for split in splits:
            check_datasets(names[split], config.key(split))
        if self.training and not names["train"]:
            raise UserError(f"{config.key('train')} is empty: name a dataset to train on")
        self.check_config()
        for split in splits:
            files = self.proposal_files(split)
            if files is not None:
                check_proposal_files(names[split], files, config.key(f"{split}_proposals"))
        for split in splits:
            check_records(names[split], self.needs(split))
        keypoints, sigmas = self.needs("test").keypoints, self.keypoint_sigmas()
        if keypoints:
            check_keypoints(
                names.get("train", ()),
                () if sigmas is None else names["test"],
                keypoints,
                flips=self.flips(),
                sigmas=sigmas or (),
            )
        # The test sets of a training are matched with its training sets by name.
        check_classes(names[splits[0]], *self.classes())

    def _match_datasets(self) -> None:
        match_datasets(
            self.config.names("train"),
            self.config.names("test"),
            self.config["weights"],
            self.config["output_dir"],
            resume=self.args.resume,
            training=self.training,
            classes=self.classes()[1],
        )

    def work(self) -> None:
        """The work of one process.

        Raises:
            UserError: something given cannot be used, or the disk is full.
        """
        config, folder = self.config, self.config["output_dir"]
        with explained_full_disk(f"to {folder}", "make room, then give the command again"):
            # A started process has registered only what an import registers.
            register_with_runs(self.args.dataset, *self._runs, checked=True)
            self._match_datasets()
            set_up_loggers(folder)
            curves = f"; curves: {tensorboard(folder)}" if self.training else ""
            _LOGGER.info("all log lines are in %s%s", Path(folder, "log.txt"), curves)
            if config["device"] == "cpu":
                limit_threads()
            with earlier_config_kept(folder, always=not self.training):
                default_setup(config.cfg, self.args)
                train = self.trainer() if self.training else None
            if comm.is_main_process():
                earlier = {} if self.training else run_datasets(folder)
                save_run_datasets(folder, {**earlier, **self._datasets})
            if train is not None:
                train()
                return
            model = self.model()
            checkpointer = StrictCheckpointer(model, folder, complete=True)
            checkpointer.resume_or_load(config["weights"], resume=self.args.resume)
            finish(config, self.evaluate(self._optimize(model) if self._optimize else model))


class YacsRun(Run):
    """A run of a yacs config."""

    def start(self) -> None:
        if self.args.config_file:
            given = self.args.config_file
            self.args.config_file = find_config_file(given)  # Detectron2 logs it
            self._report_mini(given)
        model = self.config.cfg.MODEL
        # The model's builder reports a name that is not registered.
        if model.META_ARCHITECTURE in META_ARCH_REGISTRY:
            self.config.check_augmented_test(
                META_ARCH_REGISTRY.get(model.META_ARCHITECTURE),
                keypoints=model.KEYPOINT_ON,
                proposals=model.LOAD_PROPOSALS,
            )
        super().start()

    def _report_mini(self, given: str) -> None:
        """Reports a config for the mini dataset that is to be trained on other data."""
        others = [name for name in self.config.names("train") if name not in MINI_NAMES]
        if self.training and others and is_for_mini(self.args.config_file):
            kind = "mask" if self.config.cfg.MODEL.MASK_ON else "faster"
            print(
                f"{given} is for the mini dataset: small images, no flips, few iterations. For "
                f"{others[0]} take --config-file own_data/{kind}_rcnn_R_18_FPN.yaml",
                flush=True,
            )

    def work(self) -> None:
        self.config.cfg.freeze()
        super().work()

    def needs(self, split: str) -> Needs:
        return Needs.of(self.config.cfg, training=split == "train")

    def classes(self) -> tuple[str, int | None]:
        return number_of_classes(self.config.cfg)

    def proposal_files(self, split: str) -> Sequence[str] | None:
        loads = self.config.cfg.MODEL.LOAD_PROPOSALS
        return self.config[f"{split}_proposals"] if loads else None

    def flips(self) -> Sequence[str]:
        flip = self.config.cfg.INPUT.RANDOM_FLIP
        return () if flip == "none" else (flip,)

    def keypoint_sigmas(self) -> Sequence[float]:
        return self.config.cfg.TEST.KEYPOINT_OKS_SIGMAS

    def check_config(self) -> None:
        cfg = self.config.cfg
        check_augmentations(cfg, training=self.training)
        for name in cfg.DATASETS.TEST:
            kind = MetadataCatalog.get(name).get("evaluator_type", "coco")
            if kind not in ("coco", "coco_panoptic_seg"):
                raise UserError(
                    f"DATASETS.TEST names {name!r}, which is evaluated as {kind!r}; this command "
                    "evaluates COCO-format detection and panoptic datasets"
                )
            if kind == "coco_panoptic_seg" and importlib.util.find_spec("panopticapi") is None:
                raise UserError(
                    f"DATASETS.TEST names {name!r}, whose evaluation needs panopticapi: pip "
                    "install 'git+https://github.com/cocodataset/panopticapi.git'"
                )

    def model(self) -> nn.Module:
        return FPNTrainer.build_model(without_network_weights(self.config.cfg))

    def trainer(self) -> Callable[[], Any]:
        trainer = FPNTrainer(self.config.cfg)
        trainer.resume_or_load(resume=self.args.resume)
        return trainer.train

    def evaluate(self, model: nn.Module) -> dict[str, Any]:
        results = FPNTrainer.test(self.config.cfg, model)
        if self.config["augmented_test"]:
            results = {**results, **FPNTrainer.test_with_TTA(self.config.cfg, model)}
        return results

"""Runs that go on with another config: each key is named, rates are those that config.yaml says."""

import json
import re
from pathlib import Path

import pytest
import torch
from detectron2.config import LazyConfig, instantiate
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.solver import build_lr_scheduler, build_optimizer
from omegaconf import OmegaConf
from torch import nn

from evidence.tiny import tiny_options
from fpn_plugin import UserError
from fpn_plugin.cli.train import lazy_main, train_main
from fpn_plugin.data import register_datasets
from fpn_plugin.engine import FPNTrainer, run
from fpn_plugin.engine.changes import changes, flat_config, summary
from fpn_plugin.engine.hooks import LossCurve
from fpn_plugin.engine.resume import ResumeState
from fpn_plugin.engine.settings import load_config
from fpn_plugin.lazy import load_lazy_config
from fpn_plugin.lazy.trainer import LazyRun
from tests.helpers.runs import LAZY, error_line, lazy_options


class Toy(nn.Module):
    """A convolution and its norm, whose loss grows without end where the rate is too high."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(1, 1, 1)
        self.norm = nn.BatchNorm2d(1)
        nn.init.ones_(self.layer.weight)

    def forward(self, batch):
        return {"loss": self.layer.weight.square().sum() + self.norm.weight.sum()}


class ToyTrainer(FPNTrainer):
    @classmethod
    def build_model(cls, cfg):
        model = Toy()
        model.layer.bias.requires_grad = cfg.MODEL.BACKBONE.FREEZE_AT == 0
        return model

    @classmethod
    def build_train_loader(cls, cfg):
        return [[{"file_name": "a.png"}]] * 100


@pytest.fixture
def used(monkeypatch) -> dict[int, list[float]]:
    """The rate of each parameter group in each iteration, of trainings of a toy."""
    rates: dict[int, list[float]] = {}

    def before_step(hook) -> None:
        rates[hook.trainer.iter] = [group["lr"] for group in hook._optimizer.param_groups]

    monkeypatch.setattr(ResumeState, "before_step", before_step)
    monkeypatch.setattr(run, "FPNTrainer", ToyTrainer)
    monkeypatch.setattr(LazyRun, "model", lambda run: Toy())
    monkeypatch.setattr(LazyRun, "_evaluate", lambda *_: {})
    monkeypatch.setattr("fpn_plugin.lazy.trainer.train_stream", ToyTrainer.build_train_loader)
    monkeypatch.setattr(run, "default_setup", write_config)
    monkeypatch.setattr(LossCurve, "after_train", lambda hook: None)
    yield rates
    for catalog in (DatasetCatalog, MetadataCatalog):
        catalog.pop("squares", None)


def write_config(cfg, args) -> None:
    """Of Detectron2's default_setup, which takes its time, what matters here."""
    if OmegaConf.is_config(cfg):
        LazyConfig.save(cfg, f"{cfg.train.output_dir}/config.yaml")
    else:
        Path(cfg.OUTPUT_DIR, "config.yaml").write_text(cfg.dump())


def train(squares: str, output: Path, *opts: object) -> None:
    few = ["SOLVER.MAX_ITER", 6, "SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.WARMUP_ITERS", 3]
    few += ["SOLVER.STEPS", "()", "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"]
    args = [*tiny_options(squares, output, 0), "DATASETS.TEST", "()", *few, *opts]
    train_main([str(arg) for arg in args])


def lazy_train(squares: str, output: Path, *overrides: str) -> None:
    few = ["train.max_iter=6", "train.checkpointer.period=2"]
    lazy_main(lazy_options(squares, output, *few, *overrides))


def rates_of(config: Path) -> list[list[float]]:
    """The rates that Detectron2 has for a config, from its first iteration on."""
    cfg = load_config(str(config))
    optimizer = build_optimizer(cfg, Toy())
    schedule = build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(cfg.SOLVER.MAX_ITER):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return rates


def told(caplog) -> list[str]:
    found = [r.getMessage() for r in caplog.records if r.getMessage().startswith("resumed at")]
    caplog.clear()
    return found


@pytest.mark.parametrize(
    "opts",
    [
        ["SOLVER.BASE_LR", 0.001, "SOLVER.STEPS", "(7, 9)", "SOLVER.GAMMA", 0.5],
        ["SOLVER.WARMUP_ITERS", 9, "SOLVER.WARMUP_FACTOR", 0.1, "SOLVER.MOMENTUM", 0.0],
        ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.BASE_LR_END", 0.004,
         "SOLVER.WEIGHT_DECAY", 0.01, "SOLVER.MOMENTUM", 0.5, "SOLVER.NESTEROV", True],
        [],
    ],
)  # fmt: skip
def test_each_iterations_rate_is_the_one_that_config_yaml_says(
    squares, tmp_path, used, caplog, opts
):
    train(squares, tmp_path)
    assert [used[i] for i in range(6)] == rates_of(tmp_path / "config.yaml")
    momentum = torch.load(tmp_path / "model_final.pth")["trainer"]["_trainer"]["optimizer"]
    used.clear()
    caplog.clear()
    longer = ["SOLVER.MAX_ITER", 12, *opts]
    train(squares, tmp_path, *longer)
    expected = rates_of(tmp_path / "config.yaml")
    assert used == {i: expected[i] for i in range(6, 12)}
    (line,) = told(caplog)
    assert line.startswith("resumed at iteration 6 with another config than the checkpoint's; from")
    assert "SOLVER.MAX_ITER 12 (was 6)" in line
    for key in opts[::2]:
        assert f"{key} " in line
    saved = torch.load(tmp_path / "model_final.pth")["trainer"]["_trainer"]["optimizer"]
    cfg = load_config(str(tmp_path / "config.yaml"))
    for group, fresh in zip(
        saved["param_groups"], build_optimizer(cfg, Toy()).param_groups, strict=True
    ):
        names = ("momentum", "weight_decay", "nesterov")
        assert {name: group[name] for name in names} == {name: fresh[name] for name in names}
    assert momentum["state"].keys() == saved["state"].keys()
    if not opts:  # the same config again, and there is nothing to name
        train(squares, tmp_path, *longer)
        assert told(caplog) == []


def test_what_is_advised_after_divergence_goes_on_from_the_last_checkpoint(
    squares, tmp_path, used, caplog, capfd
):
    # Each step multiplies the weight by -2 * rate: its square is no float32 after four.
    opts = ["SOLVER.BASE_LR", 1e5, "SOLVER.WARMUP_ITERS", 0, "SOLVER.MOMENTUM", 0.0]
    opts += ["SOLVER.CHECKPOINT_PERIOD", 3]
    error = error_line(capfd, train, squares, tmp_path, *opts)
    assert "--resume and a SOLVER.BASE_LR below 100000, a longer SOLVER.WARMUP_ITERS" in error
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000002.pth"
    with pytest.raises(UserError):
        train(squares, tmp_path, *opts)
    assert max(used) == 4  # in the same iteration again
    used.clear()
    caplog.clear()
    train(squares, tmp_path, *opts, "SOLVER.BASE_LR", 0.001)
    assert used == {i: [0.001] * len(used[3]) for i in range(3, 6)}
    assert told(caplog) == [
        "resumed at iteration 3 with another config than the checkpoint's; from here on: "
        "SOLVER.BASE_LR 0.001 (was 100000.0)"
    ]


@pytest.mark.parametrize(
    ("start", "opts", "message"),
    [
        (train, ["SOLVER.BIAS_LR_FACTOR", 2.0], r"kept with it: SOLVER.BIAS_LR_FACTOR 2.0 \(was"),
        (train, ["SOLVER.WEIGHT_DECAY_NORM", 0.1],
         "SOLVER.WEIGHT_DECAY_NORM 0.1 .*Give the earlier"),
        (train, ["SOLVER.MAX_ITER", 5], "checkpoint has 6 iterations, and SOLVER.MAX_ITER is 5"),
        (train, ["MODEL.BACKBONE.FREEZE_AT", 2],
         r"group.*differ from the checkpoint.s: MODEL.BACKBONE.FREEZE_AT 2 \(was"),
        (lazy_train, ["optimizer.params.bias_lr_factor=2.0"],
         r"optimizer.params.bias_lr_factor 2.0 \(was 1.0\)"),
        (lazy_train, ["train.max_iter=5"],
         "checkpoint has 6 iterations, and train.max_iter is 5"),
    ],
)  # fmt: skip
def test_what_a_run_cannot_go_on_with_is_one_line_and_config_yaml_stays(
    squares, tmp_path, used, start, opts, message, capfd
):
    start(squares, tmp_path)
    before = (tmp_path / "config.yaml").read_bytes()
    assert re.search(message, error_line(capfd, start, squares, tmp_path, *opts))
    assert (tmp_path / "config.yaml").read_bytes() == before


def test_an_evaluation_leaves_the_config_of_a_training(squares, tmp_path, used):
    train(squares, tmp_path)
    before = (tmp_path / "config.yaml").read_bytes()
    train(squares, tmp_path, "SOLVER.BASE_LR", 0.5)  # nothing is left to train
    assert load_config(str(tmp_path / "config.yaml")).SOLVER.BASE_LR == 0.5
    (tmp_path / "config.yaml").write_bytes(before)
    args = [*tiny_options(squares, tmp_path, 0), "DATASETS.TEST", "()", "SOLVER.BASE_LR", "0.5"]
    train_main(["--eval-only", *args])
    assert (tmp_path / "config.yaml").read_bytes() == before
    args[-1] = str(0.25)
    weights = ["MODEL.WEIGHTS", str(tmp_path / "model_final.pth")]
    train_main(["--eval-only", *args, "OUTPUT_DIR", str(tmp_path / "other"), *weights])
    assert load_config(str(tmp_path / "other" / "config.yaml")).SOLVER.BASE_LR == 0.25


def test_a_checkpoint_without_its_config_says_so(squares, tmp_path, used, caplog):
    train(squares, tmp_path)
    path = tmp_path / "model_final.pth"
    content = torch.load(path)
    del content["trainer"]["hooks"]["ExactResume"]  # as plain Detectron2's
    torch.save(content, path)
    caplog.clear()
    train(squares, tmp_path, "SOLVER.MAX_ITER", 8, "SOLVER.BASE_LR", 0.001)
    assert used[6] == used[7] == [0.001] * len(used[7])
    (line,) = told(caplog)
    assert "without a config; from here on this one holds, with its schedule" in line


@pytest.mark.parametrize(
    "overrides",
    [
        ["optimizer.lr=0.001", "lr_multiplier.scheduler.end_value=0.5"],
        ["optimizer.momentum=0.5", "lr_multiplier.warmup_length=0.9"],
    ],
)
def test_a_lazy_runs_rates_are_those_that_config_yaml_says(
    squares, tmp_path, used, caplog, overrides
):
    def expected() -> list[float]:
        cfg = LazyConfig.load(str(tmp_path / "config.yaml"))
        factor = instantiate(cfg.lr_multiplier)
        length = cfg.train.max_iter
        return [cfg.optimizer.lr * factor(i / length) for i in range(length)]

    lazy_train(squares, tmp_path)
    assert [used[i][0] for i in range(6)] == expected()
    used.clear()
    caplog.clear()
    lazy_train(squares, tmp_path, "train.max_iter=12", *overrides)
    assert {i: rates[0] for i, rates in used.items()} == {i: expected()[i] for i in range(6, 12)}
    (line,) = told(caplog)
    for override in ("train.max_iter=12", *overrides):
        assert f"{override.replace('=', ' ')} (was " in line


def test_a_lazy_runs_advice_has_its_own_keys(squares, tmp_path, used, capfd):
    line = error_line(capfd, lazy_train, squares, tmp_path, "optimizer.lr=1e18")
    assert "--resume and a lower optimizer.lr or a longer lr_mult" in line


# ---- what becomes of a key


def changed(*opts: object) -> str:
    before, now = load_config(), load_config("", [str(opt) for opt in opts])
    return summary(changes(flat_config(before), flat_config(now)))


@pytest.mark.parametrize(
    ("opts", "line"),
    [
        ([], ""),
        (["OUTPUT_DIR", "elsewhere"], ""),
        (["MODEL.MASK_ON", True], "from here on: MODEL.MASK_ON True (was False)"),
        (["SOLVER.IMS_PER_BATCH", 4], "from here on: SOLVER.IMS_PER_BATCH 4 (was 16)"),
        (["INPUT.MIN_SIZE_TRAIN", "(9,)"], "from here on: INPUT.MIN_SIZE_TRAIN [9] (was [800])"),
        (
            ["MODEL.WEIGHTS", "a.pth"],
            "not read, because weights are the checkpoint's: MODEL.WEIGHTS 'a.pth' (was '')",
        ),
        (["SEED", 7], "from here on, with images in a new order: SEED 7 (was -1)"),
        (
            ["SOLVER.AMP.ENABLED", True],
            "the optimizer's state cannot be kept with it: SOLVER.AMP.ENABLED True (was False)",
        ),
        (
            ["MODEL.WEIGHTS", "a", "SOLVER.GAMMA", 0.5, "TEST.EVAL_PERIOD", 9],
            "not read, because weights are the checkpoint's: MODEL.WEIGHTS 'a' (was ''); from here "
            "on: SOLVER.GAMMA 0.5 (was 0.1), TEST.EVAL_PERIOD 9 (was 0)",
        ),
    ],
)
def test_each_key_is_named_with_what_becomes_of_it(opts, line):
    assert changed(*opts) == line


@pytest.mark.parametrize(
    ("key", "before", "now", "refused"),
    [
        ("SOLVER.AMP.ENABLED", True, False, False),
        ("train.amp.enabled", False, True, True),
        ("optimizer._target_", "torch.optim.SGD", "torch.optim.AdamW", True),
        ("optimizer.params.base_lr", "${..lr}", 0.1, False),
        ("optimizer.params.lr_factor_func", None, "f", True),
    ],
)
def test_what_changes_the_optimizers_state_is_refused(key, before, now, refused):
    (change,) = changes({key: before}, {key: now})
    assert change.fate.refused is refused


def test_every_key_that_differs_is_found():
    before = flat_config(load_config())
    for key, value in before.items():
        found = changes(before, {**before, key: [value, "other"]})
        assert [change.key for change in found] == ([key] if key != "OUTPUT_DIR" else [])


def test_a_config_is_kept_as_plain_values():
    for cfg in (load_config("mini/mask_rcnn_R_18_FPN.yaml"), load_lazy_config(LAZY)):
        flat = flat_config(cfg)
        assert json.loads(json.dumps(flat)) == flat
    assert flat["optimizer.lr"] == 0.014
    assert flat["model.backbone.out_channels"] == 64
    assert flat["dataloader.train.mapper.augmentations.0.max_size"] == 1333
    assert not any(" at 0x" in str(value) for value in flat.values())


@pytest.mark.parametrize(
    ("opts", "new_order"),
    [
        (["SEED", 9], True),
        (["DATASETS.TRAIN", "('squares', 'squares')"], True),
        (["DATALOADER.NUM_WORKERS", 1, "SOLVER.BASE_LR", 0.1], False),
        (["SEED", -1], False),
    ],
)
def test_images_are_drawn_anew_where_a_key_asks_for_it(squares, tmp_path, opts, new_order):
    register_datasets([squares])
    options = tiny_options(squares, tmp_path, 0)

    def hook(*more: object) -> ResumeState:
        cfg = load_config(options[1], [*options[5:], "SEED", "3", *map(str, more)])
        optimizer = build_optimizer(cfg, Toy())
        stream = FPNTrainer.build_train_loader(cfg)
        return ResumeState(cfg.SEED, stream, str(tmp_path), cfg, optimizer)

    saved, resumed = hook(), hook(*opts)
    drawn = resumed._stream.state_dict()
    resumed.load_state_dict(saved.state_dict())
    assert resumed._stream.state_dict() == (drawn if new_order else saved._stream.state_dict())
    assert drawn != saved._stream.state_dict()
    assert resumed._seed == (9 if opts == ["SEED", 9] else 3)

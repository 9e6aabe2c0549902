"""Trainings whose length is in epochs, that keep their best model and end in time."""

import json
import math
from contextlib import nullcontext

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.engine.hooks import PeriodicCheckpointer
from torch import nn

from evidence.tiny import tiny_options
from fpn_plugin import UserError, model_zoo
from fpn_plugin.cli.train import train_main
from fpn_plugin.engine import StrictCheckpointer
from fpn_plugin.engine.hooks import BestModel, JointEvalHook, TrainingHooks
from fpn_plugin.engine.run_config import RunConfig
from fpn_plugin.lazy import get_config
from tests.helpers.runs import Cut

COSINE = ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"]
MINI = "mini/faster_rcnn_R_18_FPN.yaml"


def config_of(output, **settings) -> RunConfig:
    cfg = model_zoo.get_config(MINI)
    cfg.OUTPUT_DIR = str(output)
    config = RunConfig(cfg)
    best = {"best_metric": "bbox/AP", "eval_period": 2, "max_iter": 20}
    for name, value in (best | settings).items():
        config[name] = value
    return config


@pytest.mark.parametrize("get", [model_zoo.get_config, get_config])
@pytest.mark.parametrize(
    ("epochs", "images", "expected"),
    [(3, 205, 308), (0.5, 10, 3), (1, 1, 1), (50, 10_000, 250_000)],
)
def test_epochs_are_iterations_of_all_images(get, epochs, images, expected):
    config = RunConfig(get(MINI))
    config["epochs"], config["learning_rate"] = epochs, 0.1
    config.check_solver()
    config.set_length(images)
    assert config["max_iter"] == expected
    assert config["eval_period"] == config["checkpoint_period"] == math.ceil(expected / 10)
    in_iterations = config["warmup"] * (expected if config.is_lazy else 1)
    tenth = expected / 10 if config.is_lazy else expected // 10
    assert in_iterations == pytest.approx(min(150, tenth))


@pytest.mark.parametrize("get", [model_zoo.get_config, get_config])
def test_a_rate_for_another_batch_is_scaled_once(get):
    config = RunConfig(get(MINI))
    config["learning_rate"], config["batch_size"] = 0.02, 2
    assert not config.scale_rate()  # nothing says which batch it is for
    config["reference_batch"] = 8
    line = config.scale_rate()
    assert config["learning_rate"] == pytest.approx(0.005)
    assert line.startswith(f"{config.key('learning_rate')} is 0.005 for batches of 2: 0.02 is for ")
    # A run's config.yaml, which is stored after it, gives the same training.
    assert not config.scale_rate()
    assert config["learning_rate"] == pytest.approx(0.005)


def test_a_lazy_schedule_without_warm_up_keeps_its_arguments():
    config = RunConfig(get_config(MINI))
    del config.cfg.lr_multiplier.warmup_length
    config["epochs"] = 3
    config.set_length(10)
    assert "warmup_length" not in config.cfg.lr_multiplier


def test_without_epochs_the_length_stays():
    config = RunConfig(model_zoo.get_config(MINI))
    config.set_length(7)
    assert config["max_iter"] == 720
    assert config["eval_period"] == 0


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"epochs": -1}, "SOLVER.EPOCHS is -1, expected a number, 0 or more"),
        ({"patience": 2}, "SOLVER.PATIENCE is 2: it needs SOLVER.BEST_METRIC 'bbox/AP'"),
        ({"patience": 2, "best_metric": "bbox/AP"}, "evaluations, by TEST.EVAL_PERIOD or SOLVER.E"),
        ({"patience": 2, "best_metric": "bbox/AP", "epochs": 1, "test": ()}, "of DATASETS.TEST$"),
    ],
)
def test_settings_that_do_nothing_are_refused(settings, expected):
    config = RunConfig(model_zoo.get_config(MINI))
    for name, value in settings.items():
        config[name] = value
    with pytest.raises(UserError, match=expected):
        config.check_solver()


def test_epochs_and_steps_in_iterations_are_refused():
    config = RunConfig(model_zoo.get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"))
    config["epochs"] = 12
    with pytest.raises(UserError, match="SOLVER.EPOCHS is 12, and the rate falls at SOLVER.STEPS"):
        config.check_solver()
    lazy = RunConfig(get_config("COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"))
    lazy["epochs"] = 12
    with pytest.raises(UserError, match="train.epochs is 12.* lr_multiplier.scheduler.milestones"):
        lazy.check_solver()


class Counter(nn.Module):
    """Its weight is the number of its training steps."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def forward(self, batch):
        return {"loss": -self.weight}


def train(config: RunConfig, values: dict[int, float], cut: int = 20, start: int = 0):
    """Trains, with ``values`` as the results after so many iterations, until ``cut``."""
    model = Counter()
    loader = [[{"file_name": "a.png"}]] * 100
    trainer = SimpleTrainer(model, loader, torch.optim.SGD(model.parameters(), 1.0))
    checkpointer = StrictCheckpointer(model, config["output_dir"], trainer=trainer)

    def results():
        return {"bbox": {"AP": values[min(trainer.iter + 1, 20)], "AP50": 1.0}}

    evaluation = JointEvalHook(config["eval_period"], results)
    hooks = [PeriodicCheckpointer(checkpointer, 2), evaluation, BestModel(checkpointer, config)]
    trainer.register_hooks(hooks)
    if start:
        checkpointer.resume_or_load("", resume=True)
        assert trainer.iter + 1 == start
    around = TrainingHooks(trainer, config)
    trainer.register_hooks([Cut(cut)])
    is_cut = pytest.raises(KeyboardInterrupt) if cut < 20 else nullcontext()
    with is_cut, around.explained():
        trainer.train(start, 20)
    return trainer


def weight(path) -> float:
    return torch.load(path)["model"]["weight"].item()


RISING_THEN_NOT = {2: 10.0, 4: 30.0, 6: math.nan, 8: 20.0, 10: 29.9, 12: 40.0, 20: 1.0}


def test_the_best_model_is_kept_and_the_last_is_resumed(tmp_path):
    values = dict.fromkeys(range(2, 21, 2), 5.0) | RISING_THEN_NOT
    train(config_of(tmp_path), values)
    assert weight(tmp_path / "model_best.pth") == 12
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    kept = json.loads((tmp_path / "best.json").read_text())["bbox/AP"]
    assert list(map(int, kept)) == list(range(1, 20, 2))


@pytest.mark.parametrize("cut", [20, 5, 8])
def test_a_training_ends_when_it_does_not_improve(tmp_path, cut):
    config = config_of(tmp_path, patience=3)
    start = 0
    if cut < 20:
        train(config, RISING_THEN_NOT, cut)
        assert (tmp_path / "last_checkpoint").read_text() != "model_best.pth"
        start = int(torch.load(tmp_path / f"model_{(cut // 2) * 2 - 1:07d}.pth")["iteration"]) + 1
    trainer = train(config, RISING_THEN_NOT, start=start)
    assert trainer.iter == 9  # the third evaluation in a row that was not better
    assert weight(tmp_path / "model_best.pth") == 4
    assert weight(tmp_path / "model_final.pth") == 10
    # It has ended. A resumed run says so instead of training on, as often as it is resumed.
    for _ in range(2):
        assert train(config, RISING_THEN_NOT, start=10).iter == 10
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == 9


def test_a_failure_in_the_last_iteration_is_what_is_reported(tmp_path):
    train(config_of(tmp_path), dict.fromkeys(range(2, 21, 2), 5.0), cut=19)
    assert "19" not in json.loads((tmp_path / "best.json").read_text())["bbox/AP"]


def test_a_result_that_is_no_number_is_never_the_best(tmp_path):
    train(config_of(tmp_path), dict.fromkeys(range(2, 21, 2), math.nan))
    assert not (tmp_path / "model_best.pth").exists()


def test_a_file_of_results_that_cannot_be_read_is_named(tmp_path):
    config = config_of(tmp_path)
    train(config, RISING_THEN_NOT, cut=5)
    (tmp_path / "best.json").write_text("[]")
    with pytest.raises(UserError, match="best.json has no results of evaluations: delete it"):
        train(config, RISING_THEN_NOT, start=4)


def test_a_metric_that_is_not_there_is_named(tmp_path):
    config = config_of(tmp_path, best_metric="bbox/APx")
    with pytest.raises(UserError, match="'bbox/APx', and the evaluation has no such.*bbox/AP"):
        train(config, RISING_THEN_NOT)


def test_a_run_without_a_test_set_has_no_best_model(squares, tmp_path):
    opts = ["SOLVER.MAX_ITER", "1", "SOLVER.BEST_METRIC", "bbox/AP", "DATASETS.TEST", "()"]
    train_main([*tiny_options(squares, tmp_path, 0), *opts])
    assert (tmp_path / "model_final.pth").is_file()
    assert not (tmp_path / "model_best.pth").exists()


def test_a_run_of_epochs_keeps_its_best_model(squares, tmp_path):
    options = tiny_options(squares, tmp_path, 0)
    train_main([*options, "SOLVER.EPOCHS", "2", "SOLVER.BEST_METRIC", "bbox/AP", *COSINE])
    best = json.loads((tmp_path / "best.json").read_text())["bbox/AP"]
    assert list(map(int, best)) == list(range(8))  # 8 images in batches of 2, each evaluated
    at = max(best, key=best.get)
    assert torch.load(tmp_path / "model_best.pth")["iteration"] == int(at)
    last = json.loads((tmp_path / "results.json").read_text())["bbox"]["AP"]
    assert best["7"] == pytest.approx(last)

"""Numbers that are not finite stop a training with what is needed to find out why."""

import json
import types

import pytest
import torch
from detectron2.engine import SimpleTrainer
from torch import nn

from evidence.tiny import tiny_options
from fpn_plugin.cli.train import lazy_main, train_main
from fpn_plugin.data import register_datasets
from fpn_plugin.engine import FPNTrainer, StrictCheckpointer
from fpn_plugin.engine.nonfinite import NonFiniteCheck, SkippedSteps
from fpn_plugin.engine.settings import load_config
from fpn_plugin.errors import NonFiniteError, UserError
from tests.helpers.runs import error_line, lazy_options


class Toy(nn.Module):
    """Two losses; the second has the value that the batch asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, batch):
        return {
            "loss_cls": self.weight * 2,
            "loss_rpn_loc": self.weight * sum(record["value"] for record in batch),
        }


def trainer_over(values, optimizer_of=lambda model: torch.optim.SGD(model.parameters(), 0.1)):
    data = [
        [{"file_name": f"{i}_{j}.jpg", "value": value} for j in range(2)]
        for i, value in enumerate(values)
    ]
    model = Toy()
    return SimpleTrainer(model, data, optimizer_of(model))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_that_is_not_finite_names_itself_the_iteration_and_the_files(value):
    trainer = trainer_over([1.0, 0.5, value, 1.0])
    watch = NonFiniteCheck(trainer.model)
    trainer.register_hooks([watch])
    weights = []
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: (step(), weights.append(trainer.model.weight.item()))
    with pytest.raises(NonFiniteError) as raised, watch.explained():
        trainer.train(0, 4)
    told = str(raised.value)
    assert told.startswith("iteration 2: loss_rpn_loc not finite (loss_cls ")
    assert "2_0.jpg, 2_1.jpg" in told
    assert "1_0.jpg" not in told
    assert isinstance(raised.value, UserError)
    assert isinstance(raised.value, FloatingPointError)
    assert len(weights) == 2
    assert trainer.model.weight.item() == weights[-1], "the step was not taken"


def test_what_a_model_finds_not_finite_is_told_with_the_files():
    class Diverged(Toy):
        def forward(self, batch):
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.\nDiverged.")

    model = Diverged()
    data = [[{"file_name": "a.jpg"}]]
    trainer = SimpleTrainer(model, data, torch.optim.SGD(model.parameters(), 0.1))
    watch = NonFiniteCheck(model)
    trainer.register_hooks([watch])
    told = r"^iteration 0: Predicted .* Diverged.; batch: a.jpg"
    with pytest.raises(NonFiniteError, match=told), watch.explained():
        trainer.train(0, 1)


class Scaled(SimpleTrainer):
    """AMPTrainer's order of calls, with a scaler that a CPU has."""

    scaler: torch.amp.GradScaler

    def run_step(self):
        losses = self.model(next(self._data_loader_iter))
        self.optimizer.zero_grad()
        self.scaler.scale(sum(losses.values())).backward()
        self._write_metrics(losses, 0.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()


class Half(Toy):
    """A weight whose gradient passes through float16, where 65,504 is the largest number."""

    def forward(self, batch):
        half = (self.weight * batch[0]["value"]).half()
        return {"loss": half.float()}


def scaled_trainer(values, scale):
    model = Half()
    trainer = Scaled(
        model, [[{"value": value}] for value in values], torch.optim.SGD(model.parameters(), 0.0)
    )
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    skipped = SkippedSteps(trainer.optimizer, trainer.scaler)
    trainer.register_hooks([skipped])
    return trainer, skipped


def test_steps_whose_gradients_overflow_are_skipped_and_counted(caplog):
    # 2^18 overflows float16 twice: 2^16 is beyond its largest number too, 2^15 is not.
    trainer, skipped = scaled_trainer([1.0] * 6, 2.0**17)
    trainer.train(0, 6)
    assert skipped.skipped == 2
    assert trainer.scaler.get_scale() == 2.0**15
    assert trainer.storage.history("skipped_steps").values()[-1][0] == 2
    warned = [r.getMessage() for r in caplog.records if "gradients overflowed" in r.getMessage()]
    assert warned == [
        "iteration 0: gradients overflowed, step skipped (1 so far); loss scale now 65536",
        "iteration 1: gradients overflowed, step skipped (2 so far); loss scale now 32768",
    ]
    _, other = scaled_trainer([1.0], 1.0)
    other.load_state_dict(skipped.state_dict())
    assert other.skipped == 2


def test_steps_that_are_all_skipped_end_the_training():
    trainer, skipped = scaled_trainer([1.0] * 40, 2.0**100)
    with pytest.raises(NonFiniteError, match="iteration 31: .* in each of the last 32 iter"):
        trainer.train(0, 40)
    assert skipped.skipped == 32


def test_mixed_precision_on_a_cpu_is_refused(squares, tmp_path):
    opts = [*tiny_options(squares, tmp_path / "out"), "SOLVER.AMP.ENABLED", "True"]
    with pytest.raises(UserError, match="SOLVER.AMP.ENABLED is True"):
        train_main(opts)
    with pytest.raises(UserError, match="train.amp.enabled is True"):
        lazy_main(lazy_options(squares, tmp_path / "lazy", "train.amp.enabled=True"))


def test_weights_that_are_not_finite_are_not_written(tmp_path):
    model = nn.Linear(2, 2)
    checkpointer = StrictCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000001")
    model.bias.data[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"bias .*the last one is .*model_0000001.pth"):
        checkpointer.save("model_0000003")
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000001.pth"
    assert sorted(p.name for p in tmp_path.glob("model*")) == ["model_0000001.pth"]


def test_a_detector_that_diverges_stops_in_one_line(squares, tmp_path, capfd):
    args = tiny_options(squares, tmp_path / "out", workers=0)
    args += ["SOLVER.MAX_ITER", "30", "SOLVER.WARMUP_ITERS", "0", "SOLVER.BASE_LR", "1e6"]
    args += ["SOLVER.CHECKPOINT_PERIOD", "1000", "DATASETS.TEST", "()"]
    line = error_line(capfd, train_main, args)
    assert line.startswith("error: iteration ")
    assert ".png" in line
    assert "SOLVER.BASE_LR" in line


def test_the_trainer_names_the_loss_of_a_real_detector(squares, tmp_path, monkeypatch):
    options = tiny_options(squares, tmp_path / "out", workers=0)
    config, opts = options[1], options[5:]
    register_datasets([squares])
    cfg = load_config(config, [*opts, "SOLVER.MAX_ITER", "3", "DATASETS.TEST", "()"])
    trainer = FPNTrainer(cfg)
    rpn = trainer.model.proposal_generator
    losses = rpn.losses
    seen = []

    def third_is_nan(*args):
        seen.append(1)
        found = losses(*args)
        return {k: v * (float("nan") if len(seen) == 3 else 1) for k, v in found.items()}

    monkeypatch.setattr(rpn, "losses", third_is_nan)
    with pytest.raises(NonFiniteError, match="iteration 2: loss_rpn_cls and loss_rpn_loc not fin"):
        trainer.train()
    rows = [json.loads(line) for line in (tmp_path / "out/metrics.json").read_text().splitlines()]
    assert all(row["iteration"] < 3 for row in rows)


def test_explained_needs_the_trainer_alone():
    watch = NonFiniteCheck(Toy())
    watch.trainer = types.SimpleNamespace(iter=7)
    with pytest.raises(NonFiniteError, match="iteration 7: x;"), watch.explained():
        raise FloatingPointError("x")

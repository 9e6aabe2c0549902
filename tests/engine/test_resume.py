"""Runs that are cut go on as if they had not been, and checkpoints are whole or not there."""

import errno
import functools
import json
import os
import resource
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.engine import DefaultTrainer
from detectron2.utils.env import seed_all_rng
from torch import nn

from evidence.kill_and_resume import differing_tensors, kill_and_resume
from evidence.tiny import tiny_options
from fpn_plugin import UserError
from fpn_plugin.cli.train import lazy_main
from fpn_plugin.data import register_datasets
from fpn_plugin.engine import FPNTrainer, StrictCheckpointer
from fpn_plugin.engine.resume import ResumeState, _drop_rows_from
from fpn_plugin.engine.settings import load_config
from fpn_plugin.utils.atomic import explained_full_disk, written_whole
from tests.helpers.runs import Cut, Stock, lazy_options

LENGTH = 7


def config(squares: str, output: Path, *opts: str, workers: int = 0):
    register_datasets([squares])
    options = tiny_options(squares, output, workers)
    length = ["SOLVER.MAX_ITER", str(LENGTH), "SOLVER.CHECKPOINT_PERIOD", "2"]
    output.mkdir(exist_ok=True)
    return load_config(options[1], [*options[5:], *length, "SOLVER.WARMUP_ITERS", "3", *opts])


def train(cfg, cut_at: int | None = None) -> FPNTrainer:
    seed_all_rng(0)  # as default_setup does for SEED 0
    trainer = FPNTrainer(cfg)
    trainer.resume_or_load(resume=True)
    if cut_at is None:
        trainer.train()
    else:
        trainer.register_hooks([Cut(cut_at)])
        with pytest.raises(KeyboardInterrupt):
            trainer.train()
    return trainer


@pytest.fixture(scope="module")
def uncut(squares, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("uncut")
    train(config(squares, output))
    return output / "model_final.pth"


@pytest.mark.parametrize(
    ("cuts", "workers", "opts"),
    [
        ([1], 0, []),  # before the first checkpoint
        ([2, 3, 6], 0, []),
        ([5], 2, []),
        ([4], 0, ["TEST.EVAL_PERIOD", "2"]),  # evaluation comes after the checkpoint
    ],
)
def test_a_cut_run_is_the_uncut_one_bit_for_bit(squares, tmp_path, uncut, cuts, workers, opts):
    for cut in [*cuts, None]:
        train(config(squares, tmp_path, *opts, workers=workers), cut)
        torch.rand(7)  # a new process has drawn other numbers
    assert differing_tensors(uncut, tmp_path / "model_final.pth") == []


def test_a_run_that_resumes_with_other_threads_is_reported(squares, tmp_path, monkeypatch, caplog):
    number = torch.get_num_threads()
    cfg = config(squares, tmp_path)
    train(cfg, 3)
    FPNTrainer(cfg).resume_or_load(resume=True)
    assert "other threads" not in caplog.text
    monkeypatch.setattr(torch, "get_num_threads", lambda: number + 1)
    FPNTrainer(cfg).resume_or_load(resume=True)
    [line] = [each for each in caplog.messages if "other threads" in each]
    assert f"({number + 1}, was {number})" in line
    assert line.endswith(f"OMP_NUM_THREADS={number} gives the same bits")


def test_detectron2_0_6_saves_no_optimizer_and_the_plugin_does(
    squares, tmp_path, uncut, monkeypatch, caplog
):
    monkeypatch.delattr(DefaultTrainer, "state_dict")
    monkeypatch.delattr(DefaultTrainer, "load_state_dict")
    cfg = config(squares, tmp_path)
    train(cfg, 3)
    train(cfg)
    assert differing_tensors(uncut, tmp_path / "model_final.pth") == []
    last = torch.load(tmp_path / "model_0000003.pth")
    del last["trainer"]["_trainer"]
    torch.save(last, tmp_path / "model_0000003.pth")
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    caplog.clear()
    trainer = FPNTrainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 4
    (line,) = [r.getMessage() for r in caplog.records if "optimizer" in r.getMessage()]
    assert line.endswith("holds no optimizer (Detectron2 0.6 saved none): momentum begins at 0")


def test_the_comparison_sees_one_bit(uncut, tmp_path):
    state = torch.load(uncut)
    bias = state["model"]["backbone.fpn_lateral5.bias"]
    bias[3] = torch.nextafter(bias[3], torch.tensor(9.0))
    torch.save(state, tmp_path / "other.pth")
    found = differing_tensors(uncut, tmp_path / "other.pth")
    assert found == [".model.backbone.fpn_lateral5.bias"]


def test_a_drawn_seed_is_resumed(squares, tmp_path):
    cfg = config(squares, tmp_path, "SEED", "-1")
    first = train(cfg, 3)
    seed_all_rng(1)
    second = FPNTrainer(cfg)
    seeds = [next(h for h in t._hooks if isinstance(h, ResumeState)) for t in (first, second)]
    assert seeds[0].state_dict() != seeds[1].state_dict()
    second.resume_or_load(resume=True)
    assert seeds[0].state_dict() == seeds[1].state_dict()


def test_a_checkpoint_of_plain_detectron2_is_resumed_at_its_place(squares, tmp_path):
    cfg = config(squares, tmp_path, "DATASETS.TEST", "()")
    stock = Stock(cfg)
    stock.register_hooks([Cut(5)])
    with pytest.raises(KeyboardInterrupt):
        stock.train()
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000003.pth"
    trainer = FPNTrainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 4
    trainer.train()
    assert trainer._trainer.data_loader.start == 4
    assert torch.load(tmp_path / "model_final.pth")["iteration"] == LENGTH - 1
    # And back.
    other = Stock(cfg)
    DetectionCheckpointer(other.model, trainer=other).load(str(tmp_path / "model_0000005.pth"))
    assert other.iter == 5


def test_a_cut_lazy_run_is_the_uncut_one(squares, tmp_path, monkeypatch):
    def run(output: Path) -> None:
        few = ["train.max_iter=5", "train.checkpointer.period=2", "train.eval_period=0"]
        few += ["dataloader.train.num_workers=1", "dataloader.test.num_workers=0"]
        size = "dataloader.train.mapper.augmentations.0.short_edge_length=[48,64]"
        lazy_main(lazy_options(squares, output, *few, size))

    monkeypatch.setattr("fpn_plugin.lazy.trainer.LazyRun._evaluate", lambda *_: {})
    run(tmp_path / "uncut")
    steps: list[int] = []
    before_step = ResumeState.before_step

    def cut(hook) -> None:
        steps.append(hook.trainer.iter)
        if steps == [0, 1, 2, 3]:
            raise KeyboardInterrupt
        before_step(hook)

    monkeypatch.setattr(ResumeState, "before_step", cut)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut")
    run(tmp_path / "cut")
    assert steps == [0, 1, 2, 3, 2, 3, 4]
    final = [tmp_path / name / "model_final.pth" for name in ("uncut", "cut")]
    assert differing_tensors(*final) == []
    # Of the one class that was asked for, and the background.
    predictor = torch.load(final[0])["model"]["roi_heads.box_predictor.cls_score.weight"]
    assert predictor.shape == (2, 512)


@pytest.mark.parametrize("kills", [4, pytest.param(30, marks=pytest.mark.long)])
def test_killed_in_writes_and_elsewhere_it_resumes_to_the_same_weights(tmp_path, kills):
    report = kill_and_resume(tmp_path / "run", kills=kills)
    assert report["differing_tensors"] == []
    assert report["unreadable_checkpoints"] == 0
    assert sum(report["kills"].values()) == kills
    assert report["half_written"] >= 2
    assert report["resumed_at"][-1] > 0


@pytest.mark.parametrize(("mode", "old", "new"), [("w", "old", "new"), ("wb", b"old", b"new")])
def test_a_write_that_fails_leaves_what_was_there(tmp_path, mode, old, new):
    path = tmp_path / "file"
    with written_whole(str(path), mode) as file:
        file.write(old)
    with pytest.raises(ZeroDivisionError), written_whole(str(path), mode) as file:
        file.write(new)
        raise ZeroDivisionError
    assert path.read_bytes() == b"old"
    with written_whole(str(path), mode) as file:
        file.write(new)
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["file"]


@pytest.fixture
def full_disk(monkeypatch):
    """Files of more than a megabyte cannot be written, as where the disk is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_earlier_checkpoint_and_is_told(tmp_path, full_disk):
    model = nn.Linear(100, 100)
    StrictCheckpointer(model, str(tmp_path)).save("model_0000001")
    large = StrictCheckpointer(nn.Linear(1000, 1000), str(tmp_path))
    with pytest.raises(UserError) as raised:
        large.save("model_0000003")
    told = str(raised.value)
    assert told.startswith(f"cannot write checkpoint model_0000003.pth in {tmp_path}: File too")
    assert f"continue with --resume from {tmp_path}/model_0000001.pth" in told
    assert sorted(os.listdir(tmp_path)) == ["last_checkpoint", "model_0000001.pth"]
    restored = nn.Linear(100, 100)
    StrictCheckpointer(restored, str(tmp_path)).resume_or_load("", resume=True)
    assert torch.equal(restored.weight, model.weight)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_other_files_of_a_full_disk_are_told_too(number):
    explained = functools.partial(explained_full_disk, "to here", "make room")
    with pytest.raises(UserError, match="cannot write to here: .*; make room"), explained():
        raise OSError(number, "full")
    with pytest.raises(PermissionError), explained():
        raise PermissionError(errno.EACCES, "no")


def test_a_last_checkpoint_that_cannot_be_read_names_the_others(tmp_path):
    model = nn.Linear(2, 2)
    checkpointer = StrictCheckpointer(model, str(tmp_path))
    checkpointer.save("model_0000001")
    checkpointer.save("model_0000003")
    path = tmp_path / "model_0000003.pth"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=r"cannot resume: .*others there: model_0000001.pth"):
        checkpointer.resume_or_load("", resume=True)


def test_metrics_that_will_be_written_again_are_dropped(tmp_path):
    path = tmp_path / "metrics.json"
    rows = [json.dumps({"iteration": i, "total_loss": 1.0}) + "\n" for i in (19, 39, 59)]
    path.write_text("".join(rows) + '{"iteration": 79, "tot')
    _drop_rows_from(path, 60)
    assert path.read_text() == "".join(rows)
    with open(path, "a") as writer:  # as Detectron2's has it open
        _drop_rows_from(path, 40)
        writer.write(rows[2])
    assert path.read_text() == "".join(rows)
    _drop_rows_from(tmp_path / "nowhere.json", 3)

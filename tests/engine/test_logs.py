"""What a run shows on a terminal and elsewhere, and what is in its log.txt."""

import os
import pty
import re
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from detectron2.utils.events import EventStorage

import fpn_plugin
from fpn_plugin.engine import progress
from fpn_plugin.engine.progress import ProgressLine, TrainingProgress

ESCAPE = "\x1b"


def on_pty(monkeypatch: pytest.MonkeyPatch, call: Callable[[], object]) -> str:
    """What a call writes to a terminal."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("CI", raising=False)
    ours, theirs = pty.openpty()
    parts: list[bytes] = []

    def read() -> None:
        while part := _read(ours):
            parts.append(part)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        with monkeypatch.context() as patch, open(theirs, "w") as terminal:
            patch.setattr(sys, "stdout", terminal)
            call()
    finally:
        reader.join()  # the end of the terminal ends it
        os.close(ours)
    return b"".join(parts).decode().replace("\r\n", "\n")


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except OSError:  # Linux's end of a terminal
        return b""


def train(squares: str, output: Path) -> None:
    opts = [
        "MODEL.DEVICE", "cpu", "DATASETS.TRAIN", ("squares",), "DATASETS.TEST", ("squares",),
        "MODEL.ROI_HEADS.NUM_CLASSES", 1, "MODEL.FPN.OUT_CHANNELS", 16, "SOLVER.IMS_PER_BATCH", 2,
        "MODEL.ROI_BOX_HEAD.FC_DIM", 16, "INPUT.MIN_SIZE_TRAIN", (48,), "INPUT.MIN_SIZE_TEST", 48,
        "DATALOADER.NUM_WORKERS", 0, "SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 2,
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0, "OUTPUT_DIR", output,
    ]  # fmt: skip
    fpn_plugin.train("mini/faster_rcnn_R_18_FPN.yaml", dataset=squares, opts=opts)


def test_a_terminal_has_one_line_of_progress_and_few_others(squares, tmp_path, monkeypatch):
    shown = on_pty(monkeypatch, lambda: train(squares, tmp_path))
    before, _, after = shown.partition("training 0/4 ")
    assert before.count("\n") <= 30
    assert f"tensorboard --logdir {tmp_path}\n" in before
    assert f"tensorboard --logdir {tmp_path}\n" in after
    assert "no GPU" not in after
    [line] = [line for line in shown.split("\n") if "training " in line]
    states = [state for state in line.split(f"\r{ESCAPE}[K") if state.startswith("training ")]
    last = states[-1]
    result = r"loss \d+\.\d+, AP \d+\.\d \((the )?best.*\), 00:00 left"
    assert re.match(rf"training 4/4 .*, {result}", last)
    assert all(len(state) <= 80 + len(f"{ESCAPE}[0m") for state in states)
    assert line.count("evaluating 0/8 ") == 2  # after two iterations, and after four
    for other in ("Running with full config", "GeneralizedRCNN(", "Average Precision", "copypaste"):
        assert other not in shown
    assert "|   AP |" in after  # results.md
    text = (tmp_path / "log.txt").read_text()
    for line in ("Running with full config", "GeneralizedRCNN(", "Average Precision", "total_loss"):
        assert line in text
    assert ESCAPE not in text


def test_elsewhere_lines_are_detectron2s_without_codes(squares, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    train(squares, tmp_path)
    printed, text = capsys.readouterr().out, (tmp_path / "log.txt").read_text()
    for part in (
        "Running with full config", "GeneralizedRCNN(", "total_loss: ", "Average Precision",
        "Loss curve in", "fpn_plugin.engine.run",
    ):  # fmt: skip
        assert part in printed
        assert part in text
    assert text.count("fpn_plugin.engine.hooks INFO: Loss curve in") == 1
    assert printed.count("Loss curve in") == 1
    for each in (printed, text):
        assert ESCAPE not in each
        assert "training 0/4" not in each


def test_a_resumed_training_knows_its_earlier_results(tmp_path, monkeypatch):
    rows = (
        '{"bbox/AP": 41.5, "iteration": 9, "total_loss": 3.0}\n'
        '{"bbox/AP": 44.25, "iteration": 19}\n{"bbox/AP": 12.0, "iteration": 20}\n'
    )
    (tmp_path / "metrics.json").write_text(rows.rpartition('{"bbox/AP": 12')[0])
    monkeypatch.setattr(progress, "on_terminal", lambda: True)

    def run() -> None:
        with EventStorage(20) as storage:
            hook = TrainingProgress("", str(tmp_path))
            hook.trainer = SimpleNamespace(iter=20, max_iter=40, storage=storage)
            hook.before_train()
            storage.put_scalars(total_loss=2.0, **{"fpn_rois/p2": 9.0, "bbox/AP50": 70.0})
            hook.after_step()
            storage.put_scalar("bbox/AP", 43.0)
            hook.after_train()

    shown = on_pty(monkeypatch, run)
    assert "training 20/40 " in shown
    assert shown.endswith("\n")
    last = shown.rpartition("\r")[2]
    assert "training 21/40 " in last
    assert "loss 2.000, AP 43.0 (best 44.2)" in last


def test_no_line_is_shown_where_no_command_found_a_terminal(capsys):
    line = ProgressLine("evaluating", 3)
    line.update(2)
    line.close()
    assert capsys.readouterr() == ("", "")

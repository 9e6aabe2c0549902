"""A run of several processes that was cut goes on as if it had not been."""

import sys
from pathlib import Path

import pytest
import torch

from evidence.kill_and_resume import differing_tensors
from fpn_plugin.engine import FPNTrainer

sys.path.insert(0, str(Path(__file__).parent))
from exact import LENGTH, config


def resumed_as(dataset: str, folder: Path, *opts: str) -> FPNTrainer:
    """A trainer of one process that is about to go on from a folder's last checkpoint."""
    trainer = FPNTrainer(config(dataset, folder, *opts))
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == LENGTH
    return trainer


@pytest.mark.parametrize(
    ("how", "processes"),
    [
        # With three or more the order of summation is a matter of its own.
        ("launch", 4),
        *(
            pytest.param(*way, marks=pytest.mark.processes)
            for way in (("torchrun", 4), ("launch", 2), ("torchrun", 2))
        ),
    ],
)
def test_a_cut_run_of_several_processes_is_the_uncut_one_bit_for_bit(
    start, squares, tmp_path, caplog, how, processes
):
    args = ("--folder", str(tmp_path), "--dataset", squares)
    status, _, err = start("exact.py", *args, how=how, processes=processes)
    assert status == 0, err[-3000:]
    final = [tmp_path / name / "model_final.pth" for name in ("uncut", "cut")]
    assert differing_tensors(*final) == []
    # That it ends equal is not because nothing moved it.
    assert differing_tensors(final[0], tmp_path / "uncut" / "model_0000003.pth") != []
    # One process would go on with other images: that is told.
    resumed_as(squares, tmp_path / "cut")
    (warning,) = [r.getMessage() for r in caplog.records if "another run" in r.getMessage()]
    assert f"(processes: 1, was {processes}): it continues with other images" in warning


def test_another_batch_is_told_and_an_older_checkpoint_is_not(squares, tmp_path, caplog):
    trainer = FPNTrainer(config(squares, tmp_path))
    trainer.iter = LENGTH - 1
    trainer.checkpointer.save("model_0000004", iteration=LENGTH - 1)

    def warned() -> list[str]:
        found = [r.getMessage() for r in caplog.records if "another run" in r.getMessage()]
        caplog.clear()
        return found

    resumed_as(squares, tmp_path)
    assert warned() == []
    resumed_as(squares, tmp_path, "SOLVER.IMS_PER_BATCH", "2")
    (told,) = warned()
    assert told.startswith("resumed as another run than the one that was cut (images a batch: 2, ")
    assert "2, was 4): " in told
    path = tmp_path / "model_0000004.pth"
    content = torch.load(path, weights_only=True)
    del content["trainer"]["hooks"]["ExactResume"]["sizes"]
    torch.save(content, path)
    resumed_as(squares, tmp_path, "SOLVER.IMS_PER_BATCH", "2")
    assert warned() == []

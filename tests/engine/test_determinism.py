"""The same seed gives the same bits: of a dataset, of weights, of results."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from evidence.kill_and_resume import differing_tensors
from evidence.tiny import tiny_options

_MAKE = """
import sys
from pathlib import Path
from fpn_plugin.mini import ensure_mini
ensure_mini({"train": 4, "val": 2}, Path(sys.argv[1]))
"""
_TRAIN = """
from fpn_plugin.engine import run_tool
from fpn_plugin.cli.train import train_main
run_tool(train_main)
"""


def run(program: str, *args: str, hash_seed: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", program, *args],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONHASHSEED": str(hash_seed), "OMP_NUM_THREADS": "2"},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_two_processes_make_the_same_dataset(tmp_path):
    for number in (1, 2):
        run(_MAKE, str(tmp_path / str(number)), hash_seed=number)
    made = digests(tmp_path / "1")
    assert len(made) == 8
    assert made == digests(tmp_path / "2")


@pytest.fixture(scope="module")
def trained(squares, tmp_path_factory) -> list[Path]:
    """Output folders of a training in each of two processes, with other numbers of workers."""
    folders = []
    for number, workers in ((1, 0), (2, 2)):
        output = tmp_path_factory.mktemp(f"run{number}")
        more = ["SOLVER.MAX_ITER", "5", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
        args = [*tiny_options(squares, output, workers), *more]
        run(_TRAIN, *args, hash_seed=number)
        folders.append(output)
    return folders


def test_two_processes_train_the_same_weights(trained):
    assert differing_tensors(*(folder / "model_final.pth" for folder in trained)) == []


@pytest.mark.parametrize("name", ["results.json", "inference/coco_instances_results.json"])
def test_two_processes_evaluate_to_the_same_results(trained, name):
    one, other = ((folder / name).read_bytes() for folder in trained)
    assert len(one) > 50
    assert one == other


def test_another_seed_trains_other_weights(squares, trained, tmp_path):
    more = ["SOLVER.MAX_ITER", "5", "SEED", "1", "DATASETS.TEST", "()"]
    run(_TRAIN, *tiny_options(squares, tmp_path, 0), *more, hash_seed=1)
    assert differing_tensors(trained[0] / "model_final.pth", tmp_path / "model_final.pth")

"""A process that dies ends the others, and the command, with an error."""

import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from joint import SMALL, make_data

TINY = [
    *SMALL, "MODEL.ROI_HEADS.NUM_CLASSES", "1", "INPUT.MIN_SIZE_TRAIN", "(48,)",
    "INPUT.MIN_SIZE_TEST", "48", "SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "3",
    "DATASETS.TRAIN", "('own',)", "DATASETS.TEST", "('own',)",
]  # fmt: skip

WAYS = [
    ("launch", "train kill", 2),
    ("launch", "last raise", 2),
    ("torchrun", "evaluation kill", 2),
]
MORE_WAYS = [
    (how, f"{where} {death}", 4)
    for how in ("launch", "torchrun")
    for where in ("train", "last", "evaluation")
    for death in ("kill", "raise")
]


@pytest.mark.parametrize(
    ("how", "death", "processes"),
    [*WAYS, *(pytest.param(*way, marks=pytest.mark.processes) for way in MORE_WAYS)],
)
def test_a_process_that_dies_ends_the_others(start, tmp_path, how, death, processes):
    make_data(tmp_path, 7)
    output, died = tmp_path / "out", tmp_path / "died"
    status, _, err = start(
        "dying.py",
        *("--config-file", "mini/faster_rcnn_R_18_FPN.yaml"),
        *("--dataset", f"own={tmp_path / '7.coco.json'}:{tmp_path}"),
        *(*TINY, "OUTPUT_DIR", str(output)),
        how=how,
        processes=processes,
        env={"FPN_TEST_DEATH": death, "FPN_TEST_DIED": str(died)},
    )
    assert died.exists(), err[-3000:]
    # Not asserted, as machines differ: what hangs waits for minutes, see PATIENCE.
    print(f"{how}, {processes} processes, {death}: {time.time() - died.stat().st_mtime:.1f} s")
    assert not (output / "results.json").exists()
    assert (output / "model_final.pth").exists() == death.startswith("evaluation")
    if death.endswith("raise"):
        assert status == 1
        assert "ValueError: process 1 was told to fail" in err
    elif how == "launch":
        assert status == 137
        told = "error: process 1 was ended by SIGKILL (out of memory?); the others were stopped"
        assert told in err
    else:
        assert status == 1
        assert "Signal 9 (SIGKILL)" in err

"""A process that dies ends the others, and the command, with an error."""

import math
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from joint import SMALL, make_data

IMAGES = 8  # two batches
TINY = [
    *SMALL, "MODEL.ROI_HEADS.NUM_CLASSES", "1", "INPUT.MIN_SIZE_TRAIN", "(48,)",
    "INPUT.MIN_SIZE_TEST", "48", "SOLVER.IMS_PER_BATCH", "4", "SOLVER.MAX_ITER", "3",
    "SOLVER.CHECKPOINT_PERIOD", "1", "DATASETS.TRAIN", "('own',)", "DATASETS.TEST", "('own',)",
]  # fmt: skip
MINUTE = 60  # seconds that a command may outlive a process of its own

WAYS = [
    ("launch", "1 train kill", 2),
    ("launch", "0 last raise", 2),
    ("torchrun", "0 evaluation kill", 2),
    ("torchrun", "1 train refuse", 2),
]
MORE_WAYS = [
    (how, f"{rank} {where} {death}", 4)
    for how in ("launch", "torchrun")
    for rank in (0, 1)
    for where in ("train", "last", "evaluation")
    for death in ("kill", "raise", "refuse")
    if death != "refuse" or where == "train"
]


def more(ways: list[tuple]) -> list:
    return [pytest.param(*way, marks=pytest.mark.processes) for way in ways]


@pytest.fixture
def dying(start, tmp_path):
    """Runs dying.py and gives its exit status, its errors and by how many seconds it outlived the
    death.
    """

    def dying(how: str, death: str, processes: int) -> tuple[int, str, float]:
        make_data(tmp_path, IMAGES)
        status, _, err = start(
            "dying.py",
            *("--config-file", "mini/faster_rcnn_R_18_FPN.yaml"),
            *("--dataset", f"own={tmp_path / f'{IMAGES}.coco.json'}:{tmp_path}"),
            *(*TINY, "OUTPUT_DIR", str(tmp_path / "out")),
            how=how,
            processes=processes,
            env={"FPN_TEST_DEATH": death, "FPN_TEST_DIED": str(tmp_path / "died")},
        )
        assert (tmp_path / "died").exists(), err[-3000:]
        outlived = time.time() - (tmp_path / "died").stat().st_mtime
        print(f"{how}, {processes} processes, {death}: {outlived:.1f} s")
        return status, err, outlived

    return dying


@pytest.mark.parametrize(("how", "death", "processes"), [*WAYS, *more(MORE_WAYS)])
def test_a_process_that_dies_ends_the_others(dying, tmp_path, how, death, processes):
    status, err, outlived = dying(how, death, processes)
    assert outlived < MINUTE
    rank, where, death = death.split()
    assert not (tmp_path / "out" / "results.json").exists()
    assert (tmp_path / "out" / "model_final.pth").exists() == (where == "evaluation")
    told = {
        "raise": f"ValueError: process {rank} was told to fail",
        "refuse": f"error: process {rank} was told to fail",
        "kill": f"error: process {rank} was ended by SIGKILL (out of memory?); the others were "
        "stopped",
    }
    if how == "launch":
        assert status == {"raise": 1, "refuse": 2, "kill": 137}[death]
    else:  # torchrun has one status
        assert status == 1
        told["kill"] = "Signal 9 (SIGKILL)"
    assert told[death] in err
    if death == "refuse":
        assert "UserError" not in err, "told in one line, without a traceback"


@pytest.mark.parametrize(
    ("how", "rank", "processes"),
    [
        ("launch", 1, 2),
        *more([("launch", 0, 2), ("torchrun", 1, 2), ("launch", 3, 4), ("torchrun", 2, 4)]),
    ],
)
def test_a_loss_of_one_process_that_is_not_finite_stops_all(dying, tmp_path, how, rank, processes):
    status, err, _ = dying(how, f"{rank} train nan", processes)
    assert status == {"launch": 2, "torchrun": 1}[how], err[-3000:]
    lines = {line for line in err.splitlines() if line.startswith("error: ")}
    assert len(lines) == 1, err[-3000:]
    (line,) = lines
    rpn = f"iteration 1: loss_rpn_cls and loss_rpn_loc not finite in process {rank} (loss_cls "
    assert rpn in line
    assert math.isfinite(float(line.partition("(loss_cls ")[2].partition(",")[0]))
    for other in range(processes):
        names = (tmp_path / f"batch_{other}").read_text().splitlines()
        assert len(names) == 4 // processes
        assert all((f"{name}," in line or f"{name}. " in line) == (other == rank) for name in names)
        # Gradients were averaged before: all would have stepped to NaN.
        assert (tmp_path / f"steps_{other}").read_text() == "0\n"
    checkpoints = sorted(path.name for path in (tmp_path / "out").glob("*.pth"))
    assert checkpoints == ["model_0000000.pth"]
    weights = torch.load(tmp_path / "out" / checkpoints[0], weights_only=True)["model"]
    assert all(w.isfinite().all() for w in weights.values())


@pytest.mark.processes
@pytest.mark.parametrize("how", ["launch", "torchrun"])
def test_norms_that_want_a_gpu_are_refused_in_one_line(start, tmp_path, how):
    make_data(tmp_path, IMAGES)
    told = {}
    for norm in ("SyncBN", "naiveSyncBN"):
        status, out, err = start(
            "../../tools/train_net.py",
            *("--config-file", "mini/faster_rcnn_R_18_FPN.yaml"),
            *("--dataset", f"own={tmp_path / f'{IMAGES}.coco.json'}:{tmp_path}"),
            *(*TINY, "MODEL.RESNETS.NORM", norm, "OUTPUT_DIR", str(tmp_path / norm)),
            how=how,
        )
        told[norm] = status, [line for line in err.splitlines() if line.startswith("error: ")]
        assert "Traceback" not in out + err or (how == "torchrun" and norm == "SyncBN"), err
    refused, [line] = told["SyncBN"]
    assert refused != 0
    assert "is a SyncBN, which torch runs only on GPUs" in line and "naiveSyncBN" in line
    assert told["naiveSyncBN"] == (0, [])

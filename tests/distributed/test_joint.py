"""Several processes train and evaluate as one does, whichever launcher starts them."""

import math
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from joint import FASTER, FEW, FROZEN, MASK, ROWS, UNEVEN, evaluated, make_data

# float64, relative to a tensor's largest entry: sums in another order, about 1e-15 each.
CLOSE = 1e-12
# Proposals are float32 boxes: 1e-15 in what an RPN gives becomes 1e-7 where one is rounded the
# other way, and so in what is pooled from it.
CLOSE_ON_PROPOSALS = 1e-6
# What sums of float64 that cancel leave of a gradient that is none stays far below.
LEAST = 1e-9


@pytest.fixture(scope="module")
def joined(start, tmp_path_factory):
    """Starts joint.py and gives what it found and the folder; each combination once."""
    done = {}

    def joined(how: str, processes: int, every_row: bool) -> tuple[dict, Path]:
        case = (how, processes, every_row)
        if case not in done:
            folder = tmp_path_factory.mktemp("joint")
            for count in (1, 7):
                make_data(folder, count)
            more = ["--every-row"] if every_row else []
            status, _, err = start(
                "joint.py", "--folder", str(folder), *more, how=how, processes=processes
            )
            assert status == 0, err[-3000:]
            found = torch.load(folder / "joint.pth", weights_only=False)
            assert found["world"] == processes
            done[case] = found, folder
        return done[case]

    return joined


CASES = pytest.mark.parametrize(
    ("how", "processes", "every_row"),
    [
        ("launch", 2, False),
        pytest.param("torchrun", 2, False, marks=pytest.mark.processes),
        *(
            pytest.param(how, processes, True, marks=pytest.mark.processes)
            for how in ("launch", "torchrun")
            for processes in (2, 4)
        ),
    ],
)


def furthest(ours: dict, theirs: dict) -> float:
    """The largest difference of losses and gradients, relative to the largest entry of each."""
    assert set(ours["losses"]) == set(theirs["losses"])
    assert set(ours["gradients"]) == set(theirs["gradients"])
    largest = 0.0
    for kind in ("losses", "gradients"):
        for name, expected in theirs[kind].items():
            assert expected.dtype == torch.float64, f"{name}: rounded to 1e-7, whatever is compared"
            difference = (ours[kind][name] - expected).abs().max().item()
            scale = expected.abs().max().item()
            assert math.isfinite(difference), name
            if difference:
                largest = max(largest, difference / scale if scale else math.inf)
    return largest


@CASES
def test_losses_and_gradients_are_the_mean_over_the_processes_images(
    joined, how, processes, every_row
):
    alone, _ = joined("alone", 1, every_row)
    together, _ = joined(how, processes, every_row)
    distances = {
        name: furthest(found, alone["steps"][f"{name} in {processes}"])
        for name, found in together["steps"].items()
    }
    if every_row:
        assert set(ROWS) < set(distances)
    assert sum(": " in name for name in distances) == 2 * len(UNEVEN)
    print(f"{how}, {processes}: {len(distances)} cases, largest {max(distances.values()):.1e}")
    assert max(distances.values()) < CLOSE, distances


@CASES
def test_every_parameter_gets_a_gradient_that_is_not_zero(joined, how, processes, every_row):
    together, _ = joined(how, processes, every_row)
    for row in ROWS if every_row else FEW:
        gradients = together["steps"][row]["gradients"]
        largest = {name: sums.abs().max().item() for name, sums in gradients.items()}
        name, least = min(largest.items(), key=lambda item: item[1])
        print(f"{how}, {processes}: {row}: {len(gradients)} parameters, least {least:.1e} {name}")
        assert least > LEAST, (row, [n for n, value in largest.items() if value <= LEAST])


@CASES
def test_with_frozen_statistics_they_are_those_of_one_process_with_all_images(
    joined, how, processes, every_row
):
    alone, _ = joined("alone", 1, every_row)
    together, _ = joined(how, processes, every_row)
    for row in FROZEN if every_row else FROZEN[:1]:
        name = f"frozen {row}"
        distance = furthest(together["steps"][name], alone["steps"][f"{name} in 1"])
        print(f"{how}, {processes}: {name}: {distance:.1e}")
        assert distance < (CLOSE_ON_PROPOSALS if row in (MASK, FASTER) else CLOSE), name
    # Batch statistics are each process's own: the comparison can tell.
    assert furthest(together["steps"][MASK], alone["steps"][f"{MASK} in 1"]) > 1e-3


@CASES
@pytest.mark.parametrize("count", [1, 7])
@pytest.mark.parametrize("kind", ["boxes", "proposals"])
def test_evaluation_merges_to_what_one_process_finds(
    joined, how, processes, every_row, kind, count
):
    alone, alone_in = joined("alone", 1, every_row)
    together, together_in = joined(how, processes, every_row)
    name = f"{kind}_{count}"
    ours, theirs = predictions(together_in / name), predictions(alone_in / name)
    assert [one["image_id"] for one in ours] == list(range(1, count + 1))
    assert text(ours) == text(theirs)
    assert repr(together["results"][name]) == repr(alone["results"][name])  # some are NaN


@CASES
def test_a_training_evaluates_what_its_checkpoint_holds(
    joined, how, processes, every_row, tmp_path
):
    together, folder = joined(how, processes, every_row)
    weights = ("MODEL.WEIGHTS", str(folder / "trained" / "model_final.pth"))
    again = evaluated(folder, 7, *weights, "OUTPUT_DIR", str(tmp_path))
    assert text(predictions(folder / "trained")) == text(predictions(tmp_path))
    assert repr(together["results"]["trained"]) == repr(again)


def predictions(output: Path) -> list[dict]:
    found = torch.load(output / "inference" / "instances_predictions.pth", weights_only=False)
    for one in found:
        assert len(one.get("instances", one.get("proposals"))) > 0
    return found


def text(found: list[dict]) -> str:
    """Every digit of predictions."""
    plain = [
        {
            key: [one[key].proposal_boxes.tensor.tolist(), one[key].objectness_logits.tolist()]
            if key == "proposals"
            else one[key]
            for key in one
        }
        for one in found
    ]
    return repr(plain)

"""fpn-plugin optimize, and --optimize of fpn-plugin detect and evaluate."""

import json

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.structures import Boxes, Instances
from PIL import Image

from evidence.benchmark.report import write_report
from evidence.benchmark.timing import Comparison, compare
from fpn_plugin import UserError
from fpn_plugin.cli.detect import detect_main
from fpn_plugin.cli.optimize import optimize_main
from fpn_plugin.cli.train import train_main
from fpn_plugin.deploy import optimize
from fpn_plugin.deploy.comparison import Agreement


@pytest.fixture
def run(detector, config_of, images, tmp_path) -> list[str]:
    """--config-file of a trained model, with MODEL.WEIGHTS and pictures beside it."""
    cfg: CfgNode = config_of("faster")
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    torch.save({"model": detector("faster").state_dict()}, cfg.MODEL.WEIGHTS)
    (tmp_path / "config.yaml").write_text(cfg.dump())
    for index, each in enumerate(images[:2]):
        pixels = each["image"].permute(1, 2, 0).numpy()[:, :, ::-1]
        Image.fromarray(np.ascontiguousarray(pixels)).save(tmp_path / f"{index}.png")
    return ["--config-file", str(tmp_path / "config.yaml")]


def test_the_demo_gives_the_same_detections_optimised(run, tmp_path, capsys):
    found = {}
    for name, opts in (("plain", []), ("fast", ["--optimize", "float32"])):
        detect_main(
            [*run, "--input", str(tmp_path / "0.png"), "--output", str(tmp_path / name), *opts]
        )
        (only,) = json.loads((tmp_path / name / "detections.json").read_text())
        found[name] = only["detections"]
        said = capsys.readouterr().out
        assert ("optimised, float32:\n  folding: 20 batch norms" in said) == (name == "fast")
    assert len(found["plain"]) == len(found["fast"]) > 0
    for theirs, ours in zip(found["plain"], found["fast"], strict=True):
        np.testing.assert_allclose(ours["bbox"], theirs["bbox"], atol=0.02)
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-4)
        assert ours["level"] == theirs["level"]


def test_optimize_says_that_detections_are_the_same(run, tmp_path, capsys):
    optimize_main([*run, "--input", str(tmp_path), "--dtypes", "float32"])
    said = capsys.readouterr().out
    assert "folding: 20 batch norms into their convolutions, 0 left" in said
    rows = [line.split("|")[1:-1] for line in said.splitlines() if line.startswith("| float32")]
    _, made, first, median, _, same, missing, extra, box, score = [c.strip() for c in rows[0]]
    assert "first call (s)" in said
    assert min(map(float, (made, first, median))) > 0
    assert int(same) > 0
    assert missing == extra == "0"
    assert float(box) < 0.02
    assert float(score) < 1e-4


def test_optimize_names_a_row_by_what_ran(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(optimize, "can_fuse", lambda dtype, _: dtype == torch.float32)
    optimize_main([*run, "--input", str(tmp_path / "0.png"), "--dtypes", "bfloat16"])
    said = capsys.readouterr().out
    assert "optimised, float32:" in said
    assert "skipped torch.bfloat16: this CPU or this torch has no convolutions in it" in said
    assert "| float32 (bfloat16 skipped) |" in said


@pytest.mark.parametrize(
    ("path", "message"), [("nowhere", "neither a file nor a folder"), ("empty", "without images")]
)
def test_optimize_names_images_that_are_not_there(run, tmp_path, path, message):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        optimize_main([*run, "--input", str(tmp_path / path)])


def test_an_optimised_model_is_evaluated_to_the_same_ap(run, scenes, tmp_path, capsys):
    """fpn-plugin train --eval-only: COCOEvaluator takes the copy as it takes the original."""
    opts = ["DATASETS.TEST", "('scenes',)", "INPUT.MIN_SIZE_TEST", "160", "DATASETS.TRAIN", "()"]
    opts += ["DATALOADER.NUM_WORKERS", "0", "OUTPUT_DIR", str(tmp_path / "out")]
    results = {}
    for dtype in (None, "float32"):
        more = [] if dtype is None else ["--optimize", dtype]
        train_main([*run, "--eval-only", "--dataset", scenes, *more, *opts])
        results[dtype] = json.loads((tmp_path / "out" / "results.json").read_text())["bbox"]
        assert ("optimised, float32:\n  folding: " in capsys.readouterr().out) == bool(dtype)
    assert results[None]["AP"] > 10
    assert results["float32"] == pytest.approx(results[None], abs=0.02, nan_ok=True)


def detections(boxes, classes, scores):
    found = Instances((50, 50))
    found.pred_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
    found.pred_classes, found.scores = torch.tensor(classes), torch.tensor(scores)
    return found


def test_agreement_counts_partners_of_the_same_class_and_place():
    agreement = Agreement()
    theirs = detections(
        [[0, 0, 10, 10], [20, 20, 40, 40], [0, 30, 9, 40]], [1, 2, 3], [0.9, 0.8, 0.1]
    )
    ours = detections(
        [[20, 20.5, 40, 40], [0, 0, 10, 10], [0, 30, 9, 40]], [2, 1, 1], [0.7, 0.9, 0.1]
    )
    partners, own = agreement.add(theirs, ours)
    assert dict(zip(partners.tolist(), own.tolist(), strict=True)) == {0: 1, 1: 0}
    assert (agreement.matched, agreement.missing, agreement.extra) == (2, 1, 1)
    assert agreement.box_px == 0.5
    assert agreement.score == pytest.approx(0.1)
    agreement.add(theirs[:0], ours)
    assert (agreement.matched, agreement.missing, agreement.extra) == (2, 1, 4)
    agreement.add(theirs, ours[:0])
    assert (agreement.matched, agreement.missing, agreement.extra) == (2, 4, 4)
    # Nothing matches: nothing to take a difference of.
    agreement.add(theirs[:1], ours[:1])
    assert (agreement.matched, agreement.missing, agreement.extra) == (2, 5, 5)
    assert agreement.box_px == 0.5


def test_agreement_gives_each_detection_one_partner():
    agreement = Agreement()
    once = detections([[0, 0, 10, 10]], [1], [0.9])
    twice = detections([[0, 1, 10, 10], [0, 0, 10, 10]], [1, 1], [0.5, 0.9])
    agreement.add(once, twice)
    assert (agreement.matched, agreement.missing, agreement.extra) == (1, 0, 1)
    assert (agreement.box_px, agreement.score) == (0, 0)  # the nearer of the two
    agreement.add(twice, once)
    assert (agreement.matched, agreement.missing, agreement.extra) == (2, 1, 1)


def test_pairs_are_taken_in_turn_and_the_first_is_not_counted():
    order = []
    taken = compare("a", "b", lambda: order.append("b"), lambda: order.append("a"), pairs=3)
    assert "".join(order) == "abbaabba"
    assert len(taken.seconds) == len(taken.baseline_seconds) == 3


def test_the_report_has_medians_and_spread(tmp_path):
    comparison = Comparison("neck", "stock", [2.0, 4.0, 9.0], [1.0, 2.0, 3.0], target=1.5)
    assert comparison.ratio == 2.0
    scaling = {"batch": {1: {"stock": 1.0, "optimised": 0.5}, 2: {"stock": 2.0, "optimised": 0.9}}}
    content = {"environment": {"threads": "2"}, "scaling": scaling}
    text = write_report(tmp_path, content, {"comparisons": [comparison]}).read_text()
    cells = [cell.strip() for cell in text.split("| neck")[1].splitlines()[0].split("|")[1:-1]]
    times = ["4.000 (2.000-9.000)", "2.000 (1.000-3.000)"]
    assert cells == ["stock", *times, "2.00 (2.00-3.00)", ">= 1.5"]
    assert json.loads((tmp_path / "benchmark.json").read_text())["comparisons"][0]["ratio"] == 2.0
    assert (tmp_path / "batch.png").stat().st_size > 1000

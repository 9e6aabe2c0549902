"""The comparison of a config with its fitted sibling; its trainings are replaced."""

import json
from pathlib import Path

import pytest
from detectron2.data import MetadataCatalog

from evidence import compare_fitted as compare
from evidence.compare_fitted import compare_main
from fpn_plugin import UserError
from fpn_plugin.mini import ensure_mini

TINY = ("SOLVER.MAX_ITER", "2", "MODEL.FPN.OUT_CHANNELS", "16", "DATALOADER.NUM_WORKERS", "0")


def finish(tasks, at_once) -> None:
    """Stands for trainings: every run finds all objects, but for the first image's by default."""
    for task in tasks:
        folder = task.folder
        folder.claim()
        [name] = folder.config().DATASETS.TEST
        truth = json.loads(Path(MetadataCatalog.get(name).json_file).read_text())
        first = truth["images"][0]["id"]
        found = [
            {key: a[key] for key in ("image_id", "category_id", "bbox")} | {"score": 0.9}
            for a in truth["annotations"]
            if folder.run.name == "fitted" or a["image_id"] != first
        ]
        (folder.path / "inference").mkdir()
        inference = folder.path / "inference"
        (inference / "coco_instances_results.json").write_text(json.dumps(found))
        (inference / "speed.json").write_text('{"median_seconds_per_call": 0.5}')
        (folder.path / "metrics.json").write_text(
            '{"iteration": 1, "total_loss": 1.0, "time": 0.25}\n'
        )
        ap = dict.fromkeys(("AP", "AP50", "AP75", "APs"), 40.0 + folder.seed)
        ap |= {"APm": float("nan"), "APl": float("nan"), "AP-0": 3.0}
        if folder.run.name == "fitted":
            ap["AP"] += 2
        (folder.path / "results.json").write_text(json.dumps({"bbox": ap}))


def test_runs_are_compared_and_not_run_again(tmp_path, monkeypatch, capsys):
    ensure_mini({"train": 12, "val": 6}, kind="small")
    begun = []
    monkeypatch.setattr(compare, "run_tasks", lambda tasks, n: begun.append(len(tasks)))
    args = ["small", "--seeds", "0", "1", "--output", str(tmp_path), "--opts", *TINY]
    compare_main([*args[: -len(TINY) - 1], "--dry-run", "--opts", *TINY])
    assert capsys.readouterr().out.count("to run") == 4
    assert not begun
    monkeypatch.setattr(compare, "run_tasks", finish)
    compare_main(args)
    text = (tmp_path / "report.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| small")]
    default, fitted = ([cell.strip() for cell in row.split("|")[3:-1]] for row in rows)
    assert default[:2] == ["0,1", "40.5 ± 0.7"]
    assert fitted[:2] == ["0,1", "42.5 ± 0.7"]
    assert fitted[5:8] == ["-", "-", "100.0 ± 0.0"]  # APm, APl, AR
    assert 0 < float(default[7].split()[0]) < 100
    assert "AP +2.0 (higher with 2 of 2 seeds)" in text
    assert "Fitting changes input size." in text
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    content = json.loads((tmp_path / "report.json").read_text())
    assert content["data"][0]["runs"]["fitted"]["1"]["AP"] == 43
    assert content["data"][0]["runs"]["fitted"]["1"]["APm"] is None
    with pytest.raises(UserError, match="another config"):
        compare_main([*args, "SOLVER.BASE_LR", "0.5"])


def test_own_data_is_compared_and_finished_runs_outlive_an_interrupt(tmp_path, monkeypatch, capsys):
    """The JSONs and images of a mini dataset stand for a folder of one's own."""
    root = ensure_mini({"train": 12, "val": 6}, kind="small")
    cells = tmp_path / "cells"
    cells.mkdir()
    for split in ("train", "val"):
        content = json.loads((root / f"{split}.json").read_text())
        for image in content["images"]:
            image["file_name"] = f"{split}/{image['file_name']}"
        (cells / f"{split}.json").write_text(json.dumps(content))
    (cells / "images").symlink_to(root, target_is_directory=True)
    commands = []

    def interrupted(tasks, at_once):
        commands.extend(task.command(1) for task in tasks)
        finish(tasks[:3], at_once)
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "run_tasks", interrupted)
    args = ["cells", "--cells", str(cells), "--seeds", "0", "1", "--device", "cpu"]
    with pytest.raises(KeyboardInterrupt):
        compare_main([*args, "--output", str(tmp_path / "out"), "--opts", *TINY])
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| cells")]
    assert [[cell.strip() for cell in row.split("|")[2:4]] for row in rows] == [
        ["default", "0,1"], ["fitted", "0"],
    ]  # fmt: skip
    text = (tmp_path / "out" / "report.md").read_text()
    assert "AP +2.0, AR" in text  # of the seed that has both
    for command in commands:
        files = [command[at + 1] for at, word in enumerate(command) if word == "--dataset"]
        assert files == [f"cells_{s}={cells}/{s}.json:{cells}/images" for s in ("train", "val")]
        assert command[command.index("MODEL.DEVICE") + 1] == "cpu"
        assert command[command.index("MODEL.ROI_HEADS.NUM_CLASSES") + 1] == "10"


def test_unknown_data_is_told():
    with pytest.raises(UserError, match="did you mean small"):
        compare_main(["smal"])
    with pytest.raises(UserError, match="--cells does not name"):
        compare_main(["cells"])

"""The way of docs/own_data.md from photographs to an exported model, on a part of its data."""

import json
import logging
import math
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from evidence.tiny import make_squares
from fpn_plugin.cli.train import train_main
from fpn_plugin.engine import load_config
from tests.helpers.commands import ROOT, main_of
from tests.helpers.datasets import forgotten
from tests.helpers.label_folders import voc, write_labels

CELLS = ROOT.parent / "shared" / "data" / "cells"
# What is added to a command: no connection, and a short training on small images.
MORE = {
    "fit": ["MODEL.TIMM.PRETRAINED", "False"],
    "train": [
        "MODEL.TIMM.WEIGHTS", "lite0.pth", "SOLVER.EPOCHS", "1", "DATALOADER.NUM_WORKERS", "0",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "SOLVER.IMS_PER_BATCH", "4",
        "INPUT.MIN_SIZE_TRAIN", "(96,)", "INPUT.MIN_SIZE_TEST", "96",
    ],
}  # fmt: skip


def commands() -> list[list[str]]:
    page = (ROOT / "docs" / "own_data.md").read_text()
    way = page.partition("## From photographs to a model\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```\n(.*?)^```$", way, re.M | re.S)
    return [shlex.split(line) for b in blocks for line in b.replace("\\\n", " ").splitlines()]


def clone(folder: Path) -> None:
    """What git clones, with few of its photographs."""
    (folder / "ImageSets/Main").mkdir(parents=True)
    (folder / "JPEGImages").mkdir()
    for split, count in {"train": 8, "val": 4, "test": 1}.items():
        coco = json.loads((CELLS / f"{split}.json").read_text())
        coco["images"] = coco["images"][:count]
        write_labels(voc, coco, folder / "Annotations")
        names = [Path(image["file_name"]).stem for image in coco["images"]]
        (folder / f"ImageSets/Main/{split}.txt").write_text("\n".join(names))
        for name in names:
            shutil.copy(CELLS / f"images/{name}.jpg", folder / "JPEGImages")


@pytest.fixture(scope="module")
def masks(tmp_path_factory) -> str:
    """What --dataset takes to register eight images of squares with polygons."""
    folder = tmp_path_factory.mktemp("masks") / "data"
    named = make_squares(folder, 8)
    content = json.loads((folder / "squares.json").read_text())
    for each in content["annotations"]:
        x, y, w, h = each["bbox"]
        each["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    (folder / "squares.json").write_text(json.dumps(content))
    return named.replace("squares=", "masks=")


# The others are the bases of those with masks.
@pytest.mark.parametrize("name", ["faster_rcnn_lite0", "mask_rcnn_R_18", "mask_rcnn_R_50"])
def test_a_config_for_own_data_trains(name, masks, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(logging, "raiseExceptions", False)  # of streams that an earlier test had
    name = f"own_data/{name}_FPN.yaml"
    sizes = ["INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64"]
    opts = ["MODEL.TORCHVISION.WEIGHTS", "", "MODEL.TIMM.PRETRAINED", "False", *sizes]
    opts += ["DATASETS.TRAIN", "('masks',)", "DATASETS.TEST", "('masks',)"]
    opts += ["MODEL.ROI_HEADS.NUM_CLASSES", "1", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    opts += ["DATALOADER.NUM_WORKERS", "0", "TEST.DETECTIONS_PER_IMAGE", "5"]
    opts += ["SOLVER.IMS_PER_BATCH", "4", "SOLVER.EPOCHS", "1", "OUTPUT_DIR", str(tmp_path)]
    with forgotten():
        train_main(["--config-file", name, "--dataset", masks, *opts])
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == ({"bbox", "segm"} if "mask" in name else {"bbox"})
    cfg = load_config(name)
    rate = cfg.SOLVER.BASE_LR * 4 / cfg.SOLVER.IMS_PER_BATCH
    stored = load_config(str(tmp_path / "config.yaml"))
    assert math.isclose(stored.SOLVER.BASE_LR, rate)
    assert f"SOLVER.BASE_LR is {rate:g} for batches of 4" in capfd.readouterr().out


@pytest.mark.long  # the export to ONNX takes a minute
@pytest.mark.skipif(not CELLS.is_dir(), reason=f"there are no photographs in {CELLS}")
def test_the_way_from_photographs_to_an_exported_model(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript", reason="torch writes ONNX with it")
    monkeypatch.chdir(tmp_path)
    torch.save(timm.create_model("tf_efficientnet_lite0").state_dict(), "lite0.pth")
    shutil.copy(CELLS / "images/BloodImage_00007.jpg", "photo.jpg")
    done = []
    with forgotten():
        for program, *words in commands():
            done.append(words[0] if program == "fpn-plugin" else program)
            if program == "git":
                clone(Path("BCCD_Dataset/BCCD"))
            elif program == "python":
                run = subprocess.run([sys.executable, *words], capture_output=True, text=True)
                assert run.returncode == 0, run.stderr
            else:
                main_of(words[0])([*words[1:], *MORE.get(words[0], [])])
    assert set(done) == {
        "git", "check", "fit", "train", "evaluate", "report", "detect", "export", "python"
    }  # fmt: skip
    # The best model is what is evaluated.
    best = json.loads(Path("output/bccd/best.json").read_text())["bbox/AP"]
    results = json.loads(Path("output/bccd/results.json").read_text())
    assert results["bbox"]["AP"] == pytest.approx(max(best.values()))
    of_test = json.loads(Path("output/bccd_test/results.json").read_text())
    assert "AP-Platelets" in of_test["bbox"]
    assert Path("output/bccd/report.html").is_file() and Path("output/fit/fitted.yaml").is_file()
    found = json.loads(run.stdout)
    assert found["file"] == "photo.jpg"
    classes = {each["class"] for each in found["detections"]}
    assert classes and classes <= {"RBC", "WBC", "Platelets"}

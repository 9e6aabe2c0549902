"""The way of docs/own_data.md from photographs to an exported model, on a part of its data."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from tests.helpers.commands import ROOT, main_of
from tests.helpers.datasets import forgotten
from tests.helpers.label_folders import voc, write_labels

CELLS = ROOT.parent / "shared" / "data" / "cells"
# What is added to a command: no connection, and a short training.
MORE = {
    "fit": ["MODEL.TIMM.PRETRAINED", "False"],
    "train": [
        "MODEL.TIMM.WEIGHTS", "lite0.pth", "SOLVER.EPOCHS", "1", "DATALOADER.NUM_WORKERS", "0",
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0",
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
    best = json.loads(Path("output/cells/best.json").read_text())["bbox/AP"]
    results = json.loads(Path("output/cells/results.json").read_text())
    assert results["bbox"]["AP"] == pytest.approx(max(best.values()))
    of_test = json.loads(Path("output/cells_test/results.json").read_text())
    assert "AP-Platelets" in of_test["bbox"]
    assert Path("output/cells/report.html").is_file() and Path("output/fit/fitted.yaml").is_file()
    found = json.loads(run.stdout)
    assert found["file"] == "photo.jpg"
    classes = {each["class"] for each in found["detections"]}
    assert classes and classes <= {"RBC", "WBC", "Platelets"}

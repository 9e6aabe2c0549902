"""``fpn-plugin fit``: the files that it writes, and that they train."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from detectron2.data import MetadataCatalog
from matplotlib.figure import Figure

from fpn_plugin import UserError
from fpn_plugin.cli.fit import fit_main
from fpn_plugin.cli.train import train_main
from fpn_plugin.engine import FPNTrainer, find_config_file, load_config
from fpn_plugin.fitting import read_ground_truth
from fpn_plugin.mini import ensure_mini

FEW = {"train": 12, "val": 6}
CONFIG = "mini/faster_rcnn_R_18_FPN.yaml"
# Seconds instead of minutes: few iterations, little width.
TINY = (
    "SOLVER.MAX_ITER", "2", "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.ROI_BOX_HEAD.FC_DIM", "16",
    "DATALOADER.NUM_WORKERS", "0", "MODEL.RPN.POST_NMS_TOPK_TEST", "30",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def data() -> None:
    ensure_mini(FEW, kind="small")


def test_a_fitted_config_is_written_and_trains(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    opts = ["DATASETS.TRAIN", "('mini_small_train',)", "DATASETS.TEST", "('mini_small_val',)"]
    opts += ["MODEL.ROI_HEADS.NUM_CLASSES", "10", *TINY]
    fit_main(["--config-file", CONFIG, "--output", "fit", *opts])
    told = capsys.readouterr().out
    assert "input size: change" in told and "anchors: keep" in told
    for name in ("levels", "shapes", "anchors", "input_sizes"):
        assert (tmp_path / "fit" / f"{name}.png").stat().st_size > 10_000
    report = json.loads((tmp_path / "fit" / "report.json").read_text())
    assert report["images"] == 12
    assert report["after"]["mean_iou"] >= report["before"]["mean_iou"]
    size = report["recommendations"][0]
    assert (size["subject"], size["changes"]["INPUT.MIN_SIZE_TEST"]) == ("input size", 512)

    fitted = load_config("fit/fitted.yaml")
    assert fitted.SOLVER.MAX_ITER == 2  # options given beside the config hold in it
    assert fitted.INPUT.MIN_SIZE_TRAIN == (512,)
    train_main(["--config-file", "fit/fitted.yaml", "OUTPUT_DIR", "run"])
    assert "bbox" in json.loads(Path("run/results.json").read_text())


def test_the_base_of_a_config_in_the_same_folder_is_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/own.yaml").write_text(f"_BASE_: {find_config_file(CONFIG)}\nSEED: 5\n")
    args = ["--config-file", "mine/own.yaml", "--data", "mini_small_train", "--output", "a/b"]
    fit_main(args)
    content = yaml.safe_load(Path("a/b/fitted.yaml").read_text())
    assert content["_BASE_"] == "../../mine/own.yaml"
    assert load_config("a/b/fitted.yaml").SEED == 5


def test_a_fitted_config_is_not_overwritten_by_a_fit_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["--data", "mini_small_train", "--config-file"]
    fit_main([*args, CONFIG, "--output", "fit"])
    before = Path("fit/fitted.yaml").read_text()
    monkeypatch.setattr("fpn_plugin.cli.fit.read_ground_truth", None)  # it is told before
    Path("own.yaml").write_text("_BASE_: [fit/fitted.yaml]\nSEED: 5\n")
    for config in ("fit/fitted.yaml", "own.yaml"):
        with pytest.raises(UserError, match="would be overwritten.* another --output than fit"):
            fit_main([*args, config, "--output", "fit"])
    assert Path("fit/fitted.yaml").read_text() == before
    monkeypatch.setattr("fpn_plugin.cli.fit.read_ground_truth", read_ground_truth)
    fit_main([*args, "fit/fitted.yaml", "--output", "again"])
    assert load_config("again/fitted.yaml").MODEL.FPN == load_config("fit/fitted.yaml").MODEL.FPN


@pytest.mark.parametrize("backbone", ["build_fpn_backbone", "build_retinanet_resnet_fpn_backbone"])
def test_a_level_reported_for_small_objects_can_be_built(tmp_path, monkeypatch, backbone):
    """The plugin's backbone, and Detectron2's, which has to be told of stages."""
    monkeypatch.chdir(tmp_path)
    opts = ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
    opts += ["MODEL.RESNETS.NORM", "BN", "MODEL.FPN.OUT_CHANNELS", "16", "MODEL.WEIGHTS", ""]
    opts += ["INPUT.MIN_SIZE_TRAIN", "(256,)", "MODEL.DEVICE", "cpu"]
    opts += ["MODEL.BACKBONE.NAME", backbone]
    args = ["--config-file", "COCO-Detection/retinanet_R_50_FPN_1x.yaml", "--output", "fit"]
    fit_main([*args, "--data", "mini_small_train", *opts])
    found = json.loads(Path("fit/report.json").read_text())["recommendations"]
    [levels] = [each["untried"] for each in found if each["subject"] == "levels"]
    cfg = load_config("fit/fitted.yaml", [str(word) for pair in levels.items() for word in pair])
    model = FPNTrainer.build_model(cfg)
    assert next(iter(model.backbone.output_shape())) == "p2"
    assert model.head_in_features[0] == "p2"
    shapes = [model.backbone.output_shape()[name] for name in model.head_in_features]
    assert model.anchor_generator.num_anchors == [
        len(sizes) * len(cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS[0])
        for sizes in cfg.MODEL.ANCHOR_GENERATOR.SIZES
    ]
    assert len(shapes) == 6


def _square_boxes(side: float, count: int = 120) -> list[list[float]]:
    return [[1.0, 1.0, side, side]] * count


def test_how_to_train_on_data_that_the_config_does_not_name_is_told(tmp_path, capsys):
    small = MetadataCatalog.get("mini_small_train")
    args = ["--config-file", CONFIG, "--output", str(tmp_path / "fit")]
    fit_main([*args, "--data", small.json_file])
    told = capsys.readouterr().out
    data = f"--dataset train={small.json_file}:IMAGES DATASETS.TRAIN \"('train',)\""
    others = 'MODEL.ROI_HEADS.NUM_CLASSES 10 DATASETS.TEST "()"'  # where the config has 14
    assert f"fitted.yaml {data} {others}` (IMAGES: the folder of its images) It evaluates" in told
    dataset = f"told_of={small.json_file}:{small.image_root}"
    fit_main([*args, "--dataset", dataset, "--data", "told_of"])
    told = capsys.readouterr().out
    assert f"fitted.yaml --dataset {dataset} DATASETS.TRAIN \"('told_of',)\" {others}` " in told
    [command] = re.findall(r"`fpn-plugin train (.*)`", told)
    train_main([*shlex.split(command), *TINY, "OUTPUT_DIR", str(tmp_path / "run")])
    assert (tmp_path / "run" / "model_final.pth").is_file()
    fit_main([*args, "DATASETS.TRAIN", "('mini_small_train',)"])
    assert "fitted.yaml`\n" in capsys.readouterr().out


def test_data_that_no_anchor_fits_is_told_and_drawn(coco_json, tmp_path, capsys, monkeypatch):
    """Boxes in shares of the image, which are far below a pixel, read as pixels."""
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, path: (figures.append(self), save(self, path))
    )
    args = ["--config-file", CONFIG, "--output", str(tmp_path / "fit")]
    fit_main([*args, "--data", str(coco_json(_square_boxes(0.01)))])
    told = capsys.readouterr().out
    assert "fits this data as it is" not in told
    assert "an anchor overlaps 0% of objects by 0.5" in told
    assert "are boxes in pixels, not in shares of 1?" in told
    size = 0.01 * 256 / 100
    anchors = load_config(CONFIG).MODEL.ANCHOR_GENERATOR.SIZES
    levels, shapes, curves, _ = figures
    for axes in (levels.axes[0], shapes.axes[0]):
        low, high = axes.get_xlim()
        assert low < size and high > max(map(max, anchors))
    assert curves.axes[0].get_xlim()[0] < size < curves.axes[0].get_xlim()[1]


def test_images_that_stay_as_they_are_are_told_so(coco_json, tmp_path, capsys):
    """And sizes of a RetinaNet, thirds of octaves, in few digits."""
    args = ["--config-file", "COCO-Detection/retinanet_R_50_FPN_1x.yaml"]
    args += ["--data", str(coco_json(_square_boxes(12))), "--output", str(tmp_path / "fit")]
    fit_main([*args, "INPUT.MIN_SIZE_TRAIN", "(0,)"])
    told = capsys.readouterr().out
    assert "Images stay as they are (INPUT.MIN_SIZE_TRAIN 0)." in told
    assert "| as they are      | 1.00 " in told
    assert "[[16.0, 20.16, 25.4], [32.0, 40.32, 50.8]," in told
    assert "cells of its level, which is that of its best anchor." in told
    assert "Pooled" not in told


def test_no_data_and_no_place_to_write_are_told(tmp_path):
    with pytest.raises(UserError, match="no data: give --data"):
        fit_main(["--config-file", CONFIG, "DATASETS.TRAIN", "()"])
    (tmp_path / "file").write_text("")
    args = ["--config-file", CONFIG, "--data", "mini_small_train"]
    with pytest.raises(UserError, match="argument --output: .* cannot be made"):
        fit_main([*args, "--output", str(tmp_path / "file" / "fit")])

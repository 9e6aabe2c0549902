"""The report: what stands in it, and that it needs no other file."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from evidence.level_statistics_cost import cost_main
from fpn_plugin import UserError, model_zoo
from fpn_plugin.cli.report import report_main
from fpn_plugin.cli.visualize import visualize_main
from fpn_plugin.engine import load_config
from fpn_plugin.mini import dataset as mini
from fpn_plugin.utils.metrics import level_rows, loss_rows
from fpn_plugin.visualization.run_page import run_page


@pytest.fixture
def run(tmp_path):
    """A run's folder as training leaves it, with one image of two objects, one of them found."""
    folder = tmp_path / "run <1>"
    (folder / "inference").mkdir(parents=True)
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (200, 300, 3), np.uint8)).save(tmp_path / "a.png")
    objects = [(1, [10, 10, 50, 50]), (2, [100, 20, 20, 20])]
    truth = {
        "images": [{"id": 1, "file_name": "a.png", "height": 200, "width": 300}],
        "categories": [{"id": 1, "name": "cell & co"}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": 1, "bbox": box, "area": box[2] * box[3],
             "iscrowd": 0} for n, box in objects
        ],
    }  # fmt: skip
    (tmp_path / "val.json").write_text(json.dumps(truth))
    found = [
        {"image_id": 1, "category_id": 1, "bbox": [10, 10, 50, 50], "score": 0.9},
        {"image_id": 1, "category_id": 1, "bbox": [200, 100, 64, 64], "score": 0.8},
    ]
    (folder / "inference" / "coco_instances_results.json").write_text(json.dumps(found))
    precision = {"bbox": np.full((10, 101, 1), 0.5), "classes": np.array(["cell & co"])}
    np.savez(folder / "inference" / "precision.npz", **precision)
    results = {"bbox": {"AP": 51.25, "AP50": 70.04, "APs": float("nan"), "AP-cell & co": 33.33}}
    (folder / "results.json").write_text(json.dumps(results))
    rows = [
        {"iteration": i, "total_loss": 2.0 - i / 100, "lr": 0.01,
         "fpn_rois/p2": 80.0 + i, "fpn_rois/p3": 20.0, "fpn_share/p2": 0.75}
        for i in (19, 39, 59, 79)
    ]  # fmt: skip
    (folder / "metrics.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = model_zoo.get_config("mini/faster_rcnn_R_18_FPN.yaml")
    cfg.DATASETS.TEST = (f"val_of_{tmp_path.name}",)
    (folder / "config.yaml").write_text(cfg.dump())
    return folder, ["--dataset", f"{cfg.DATASETS.TEST[0]}={tmp_path / 'val.json'}:{tmp_path}"]


def rows_of(html):
    """Cells of each row of each table."""
    rows = re.findall(r"<tr>(.*?)</tr>", html)
    return [re.findall(r"<t[dh]>(.*?) *</t[dh]>", row) for row in rows]


def test_a_report_is_whole_and_needs_no_other_file(run, tmp_path):
    folder, dataset = run
    report_main([str(folder), *dataset])
    html = (folder / "report.html").read_text()
    assert "<h1>Run run &lt;1&gt;</h1>" in html
    # Nothing is fetched: every source is data, every link is into the page.
    sources = re.findall(r"""(?:src|href|srcset|data|action)\s*=\s*["']([^"']*)""", html)
    assert sources
    assert all(s.startswith(("data:image/png;base64,", "#s")) for s in sources)
    without_data = re.sub(r"base64,[A-Za-z0-9+/=]+", "", html)
    assert not re.search(r"https?:|//|@import|url\(|<script|<link|<iframe", without_data)
    # precision, losses, levels, shares, confusion, misses, false alarms
    assert html.count("<img ") == 7
    assert "<p>Faster R-CNN on ResNet-18; k0 = 4 at 112 px; input 256 px; trained on" in html

    rows = rows_of(html)
    assert ["AP", "AP50", "APs"] in rows
    assert ["51.2", "70.0", "-"] in rows  # of 51.25, to the even digit
    assert ["cell &amp; co"] in rows
    assert ["RoIs an image", "159", "20"] in rows  # of the last quarter: iteration 79
    # Objects of 50 and 20 px at 200 -> 256 px: 64 px at P3, 25.6 px at P2 (56 px between them).
    assert ["small", "1", "1", "0", "0", "0", "1"] in rows
    assert ["medium", "1", "0", "0", "0", "0", "0"] in rows
    assert ["P2", "1", "1", "0", "0", "0", "1"] in rows
    # Detections of 50 and 64 px, the second on nothing.
    assert ["P3", "2", "1", "0", "0", "0", "1"] in rows
    assert "1 of 2 objects missed, 1 of 2 detections false" in html


def test_what_a_run_lacks_is_said(run, tmp_path):
    folder, dataset = run
    (folder / "results.json").unlink()
    (folder / "metrics.json").unlink()
    (folder / "inference" / "coco_instances_results.json").unlink()
    (folder / "inference" / "precision.npz").unlink()
    report_main([str(folder), *dataset, "--output", str(tmp_path / "new" / "r.html")])
    html = (tmp_path / "new" / "r.html").read_text()
    for told in (
        "Not evaluated",
        "No training is logged",
        "MODEL.FPN.LEVEL_STATS_PERIOD 20",
        "No detections",
        "No curves",
    ):
        assert told in html
    assert "<img" not in html


@pytest.mark.parametrize(
    ("config", "opts", "name"),
    [
        ("COCO-InstanceSegmentation/mask_rcnn_R_101_FPN_3x", [], "Mask R-CNN on ResNet-101; "),
        ("Misc/cascade_mask_rcnn_R_50_FPN_1x", [], "Cascade Mask R-CNN on ResNet-50; "),
        ("COCO-Detection/rpn_R_50_FPN_1x", [], "RPN on ResNet-50; "),
        (
            "mini/faster_rcnn_R_18_FPN",
            ["MODEL.FPN.BOTTOM_UP", "build_timm_backbone", "MODEL.TIMM.NAME", "convnext_tiny"],
            "Faster R-CNN on convnext_tiny of timm; ",
        ),
    ],
)
def test_a_report_names_the_model(config, opts, name, tmp_path):
    cfg = load_config(f"{config}.yaml", opts)
    cfg.DATASETS.TEST = ()
    assert f"<p>{name}" in run_page(tmp_path, cfg).html()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no config.yaml"):
        report_main([str(tmp_path)])


def test_rows_of_levels_are_read_as_a_resumed_run_has_them(tmp_path):
    rows = [
        {"iteration": 19, "total_loss": 1.0, "fpn_rois/p2": 1.0},
        {"iteration": 29, "fpn_rois/p2": 2.0, "fpn_rpn_recall/p6": 0.5},  # between two losses
        {"iteration": 39, "total_loss": 0.9, "fpn_rois/p2": 3.0},
        {"iteration": 29, "fpn_rois/p2": 4.0},  # went on from a checkpoint
    ]
    path = tmp_path / "metrics.json"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 49, "fpn')
    assert level_rows(path) == {"rois": {"p2": [(19, 1.0), (29, 4.0)]}}
    assert [row["iteration"] for row in loss_rows(path)] == [19, 39]
    assert level_rows(tmp_path / "none.json") == {}


@pytest.mark.parametrize("tool", ["report", "visualize", "cost"])
def test_the_mini_dataset_that_is_named_is_made(tool, run, monkeypatch):
    """Each kind is a dataset of its own, and making the default one takes half a minute."""

    def made(splits=None, root=None, kind=""):
        raise UserError(f"made {kind}")

    monkeypatch.setattr(mini, "ensure_mini", made)
    folder, _ = run
    cfg = load_config(str(folder / "config.yaml"))
    cfg.DATASETS.TEST = cfg.DATASETS.TRAIN = ("mini_small_val",)
    (folder / "config.yaml").write_text(cfg.dump())
    config = ["--config-file", str(folder / "config.yaml")]
    with pytest.raises(UserError, match="made small"):
        if tool == "report":
            report_main([str(folder)])
        elif tool == "visualize":
            visualize_main([*config, "--ground-truth", "mini_small_val"])
        else:
            cost_main(config)

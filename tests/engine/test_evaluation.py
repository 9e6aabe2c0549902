"""COCO's evaluation of models that may give more detections than COCO counts."""

import itertools
import json
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import Boxes, Instances, polygons_to_bitmask
from omegaconf import OmegaConf

from fpn_plugin import model_zoo
from fpn_plugin.engine.evaluation import DetectionEvaluator
from fpn_plugin.engine.results import results_table, save_results
from fpn_plugin.engine.trainer import FPNTrainer
from fpn_plugin.inspection.errors import find_errors
from fpn_plugin.lazy import load_lazy_config

SIDE = 40
CELLS, DISCS = 150, 10


def crowd() -> dict:
    """An image with a grid of squares, most of them cells; three keypoints in each."""
    width, height = 17 * 45, 10 * 45
    content = {
        "images": [{"id": 5, "file_name": "a.png", "width": width, "height": height}],
        "categories": [{"id": 3, "name": "cell"}, {"id": 8, "name": "disc"}],
        "annotations": [],
    }
    places = itertools.islice(itertools.product(range(17), range(10)), CELLS + DISCS)
    for number, (column, row) in enumerate(places):
        x, y = 45 * column, 45 * row
        corners = [x, y, x + SIDE, y, x + SIDE, y + SIDE, x, y + SIDE]
        content["annotations"].append(
            {"id": number + 1, "image_id": 5, "category_id": 3 if number < CELLS else 8,
             "bbox": [x, y, SIDE, SIDE], "area": SIDE**2, "iscrowd": 0, "segmentation": [corners],
             "keypoints": [x + 3, y + 3, 2, x + 20, y + 30, 2, x + 30, y + 9, 2],
             "num_keypoints": 3}
        )  # fmt: skip
    return content


@pytest.fixture
def crowded(tmp_path):
    """The name of a dataset of that image."""
    path = tmp_path / "crowd.json"
    path.write_text(json.dumps(crowd()))
    register_coco_instances("crowd", {}, str(path), str(tmp_path))
    yield "crowd"
    DatasetCatalog.remove("crowd")
    MetadataCatalog.remove("crowd")


def perfect(record: dict, *, masks: bool = True) -> Instances:
    """Detections that are the labels, with scores that fall."""
    labels = record["annotations"]
    found = Instances((record["height"], record["width"]))
    boxes = torch.tensor([label["bbox"] for label in labels], dtype=torch.float32)
    boxes[:, 2:] += boxes[:, :2]
    found.pred_boxes = Boxes(boxes)
    found.pred_classes = torch.tensor([label["category_id"] for label in labels])
    found.scores = torch.linspace(0.9, 0.5, len(labels))
    points = torch.tensor([label["keypoints"] for label in labels], dtype=torch.float32)
    found.pred_keypoints = points.reshape(len(labels), -1, 3)
    if masks:
        size = record["height"], record["width"]
        found.pred_masks = torch.stack(
            [torch.as_tensor(polygons_to_bitmask(label["segmentation"], *size)) for label in labels]
        )
    return found


def evaluated(name: str, output: Path, **options) -> dict:
    (record,) = DatasetCatalog.get(name)
    evaluator = DetectionEvaluator(name, output_dir=str(output), distributed=False, **options)
    evaluator.reset()
    evaluator.process([record], [{"instances": perfect(record)}])
    return evaluator.evaluate()


def figures(results: dict[str, float], names: str) -> list[float]:
    return [results[name] for name in names.split()]


@pytest.mark.parametrize(("limit", "called"), [(300, "300"), (-1, "all")])
def test_a_perfect_detector_of_many_objects_has_100(crowded, tmp_path, limit, called):
    results = evaluated(
        crowded, tmp_path, detections_per_image=limit, kpt_oks_sigmas=[0.1, 0.2, 0.1]
    )
    # Recall of cells ends at 100 or 20 of 150: precision is 1 at 67 or 14 of COCO's 101 recalls.
    of_cells = {"bbox": (6700 / 101, 100 / 1.5), "keypoints": (1400 / 101, 20 / 1.5)}
    of_cells["segm"] = of_cells["bbox"]
    assert list(results) == [*sorted(of_cells), *(f"{task}@{called}" for task in sorted(of_cells))]
    stored = np.load(tmp_path / "precision.npz")
    assert stored["classes"].tolist() == ["cell", "disc"]
    for task, (precision, recall) in of_cells.items():
        assert stored[task].shape == (10, 101, 2)
        assert 100 * stored[task].mean((0, 1)) == pytest.approx([precision, 100])
        cocos, beyond = results[task], results[f"{task}@{called}"]
        assert figures(cocos, "AP-cell AP-disc") == pytest.approx([precision, 100])
        mean = (precision + 100) / 2
        assert figures(cocos, "AP AP50 AP75 APm") == pytest.approx([mean] * 4)
        assert figures(cocos, "AR ARm") == pytest.approx([(recall + 100) / 2] * 2)
        assert set(beyond) == set(cocos)
        assert figures(beyond, "AP AP50 AP75 APm AR ARm AP-cell AP-disc") == pytest.approx(
            [100] * 8
        )
        assert beyond["APl"] != beyond["APl"]  # NaN: no large objects


def test_up_to_cocos_own_limit_results_are_detectron2s(crowded, tmp_path):
    results = evaluated(crowded, tmp_path, tasks=("bbox",), detections_per_image=100)
    assert list(results) == ["bbox"]
    assert set(results["bbox"]) == {
        "AP", "AP50", "AP75", "APs", "APm", "APl", "AP-cell", "AP-disc"
    }  # fmt: skip


def test_too_few_detections_for_the_objects_are_said(crowded, tmp_path, caplog, monkeypatch):
    # Detectron2's setup, in another test, keeps its log to itself.
    monkeypatch.setattr(logging.getLogger("detectron2"), "propagate", True)
    DetectionEvaluator(crowded, output_dir=str(tmp_path), detections_per_image=159)
    assert "1 images of 'crowd' have more objects than the 159 detections" in caplog.text
    assert "160 at most" in caplog.text
    caplog.clear()
    for enough in (160, -1):
        DetectionEvaluator(crowded, output_dir=str(tmp_path), detections_per_image=enough)
    assert "more objects" not in caplog.text


def test_nothing_detected_has_the_same_keys(crowded, tmp_path):
    (record,) = DatasetCatalog.get(crowded)
    evaluator = DetectionEvaluator(
        crowded, ("bbox",), False, str(tmp_path), detections_per_image=300
    )
    evaluator.reset()
    evaluator.process([record], [{"instances": perfect(record)[:0]}])
    (tmp_path / "precision.npz").write_text("of an evaluation before")
    results = evaluator.evaluate()
    assert list(results) == ["bbox", "bbox@300"]
    assert results["bbox@300"]["AP"] != results["bbox@300"]["AP"]
    assert not (tmp_path / "precision.npz").exists()


def test_the_trainer_evaluates_as_many_as_its_model_may_give(crowded, tmp_path):
    cfg = model_zoo.get_config("mini/faster_rcnn_R_18_FPN.yaml")
    cfg.TEST.DETECTIONS_PER_IMAGE = 200
    cfg.TEST.KEYPOINT_OKS_SIGMAS = [0.1, 0.2, 0.1]
    cfg.OUTPUT_DIR = str(tmp_path)
    evaluator = FPNTrainer.build_evaluator(cfg, crowded)
    (record,) = DatasetCatalog.get(crowded)
    evaluator.reset()
    evaluator.process([record], [{"instances": perfect(record, masks=False)}])
    results = evaluator.evaluate()
    for task in ("bbox@200", "keypoints@200"):
        assert results[task]["AP"] == pytest.approx(100)
    save_results(results, str(tmp_path))
    assert json.loads((tmp_path / "results.json").read_text())["keypoints@200"]["AR"] == 100
    text = (tmp_path / "results.md").read_text()
    assert "\nbbox@200\n\n|" in text
    assert "COCO's, which takes at most 100 detections of a category" in text
    assert "COCO's" not in results_table({"bbox": {"AP": 1.0}, "box_proposals": {"AR@100": 2.0}})


def test_results_have_a_row_for_each_class():
    bbox = {"AP": 50.0, "AP-7": 61.04, "AP-a|b": 40.0, "AP-non-cell": float("nan")}
    text = results_table({"bbox": bbox, "segm": {"AP": 20.0, "AP-7": 20.0}})
    rows = [line.split(" | ") for line in text.partition("| AP by class")[2].splitlines()[2:]]
    cells = [[cell.strip("| ") for cell in row] for row in rows]
    assert cells == [
        ["7", "61.0", "20.0"], ["a\\|b", "40.0", "-"], ["non-cell", "nan", "-"]
    ]  # fmt: skip
    assert "by class" not in results_table({"bbox": {"AP": 50.0}})


def test_a_report_on_errors_counts_all_detections():
    truth = crowd()
    results = [
        {"image_id": 5, "category_id": a["category_id"], "bbox": a["bbox"], "score": 0.9}
        for a in truth["annotations"]
    ]
    errors = find_errors(truth, results, lambda *_: "p2")
    assert not errors.misses
    assert sum(errors.detections.values()) == CELLS + DISCS


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("mini/mask_rcnn_R_18_FPN", "roi_heads.box_predictor.test_topk_per_image"),
        (
            "Misc/cascade_mask_rcnn_R_50_FPN_1x",
            "roi_heads.box_predictors.2.test_topk_per_image",
        ),
        ("COCO-Detection/retinanet_R_50_FPN_1x", "max_detections_per_image"),
        ("COCO-Detection/fcos_R_50_FPN_1x", "max_detections_per_image"),
        (
            "COCO-PanopticSegmentation/panoptic_fpn_R_50_1x",
            "roi_heads.box_predictor.test_topk_per_image",
        ),
    ],
)
def test_a_lazy_evaluator_follows_its_model(name, key):
    def limits(*overrides: str) -> list[int]:
        evaluators = load_lazy_config(f"lazy/{name}.py", overrides).dataloader.evaluator
        nodes = evaluators if OmegaConf.is_list(evaluators) else [evaluators]
        return [n.detections_per_image for n in nodes if n["_target_"] is DetectionEvaluator]

    assert limits() == [100]
    assert limits(f"model.{key}=300") == [300]

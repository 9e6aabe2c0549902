"""Test-time augmentation and expected results: what Detectron2's own train_net.py does of them."""

import json
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from detectron2.evaluation import COCOEvaluator
from detectron2.modeling import GeneralizedRCNNWithTTA, build_model

from evidence.tiny import tiny_options
from fpn_plugin import UserError
from fpn_plugin.cli.train import lazy_main, train_main
from fpn_plugin.data import register_datasets
from fpn_plugin.engine import FPNTrainer, StrictCheckpointer, run_tool
from fpn_plugin.engine.results import verify_expected
from fpn_plugin.engine.run_config import RunConfig
from fpn_plugin.engine.settings import load_config
from fpn_plugin.lazy import load_lazy_config
from fpn_plugin.lazy.trainer import LazyRun
from fpn_plugin.mini import ensure_mini
from tests.helpers.runs import Stock, error_line, lazy_options

MASK = "mini/mask_rcnn_R_18_FPN.yaml"
AUGMENTED = [
    "TEST.AUG.ENABLED", "True", "TEST.AUG.MIN_SIZES", "(64, 96)", "TEST.AUG.MAX_SIZE", "128",
]  # fmt: skip
# As a model of Detectron2's own: so the plugin's can be compared with it.
ALIKE = [
    "MODEL.DEVICE", "cpu", "MODEL.FPN.COARSEST_OUTPUT_CONV", "True", "INPUT.MIN_SIZE_TEST", "64",
    "MODEL.FPN.CANONICAL_BOX_SIZE", "224", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0",
    "MODEL.RPN.POST_NMS_TOPK_TEST", "20", "TEST.DETECTIONS_PER_IMAGE", "5",
    "DATALOADER.NUM_WORKERS", "0",
]  # fmt: skip


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> tuple[Path, dict]:
    """Weights of Detectron2's own Mask R-CNN, and what its test-time augmentation finds."""
    folder = tmp_path_factory.mktemp("stock")
    ensure_mini({"train": 6, "val": 4})
    names = ["MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"]
    names += ["MODEL.ROI_HEADS.NAME", "StandardROIHeads"]
    cfg = load_config(MASK, [*ALIKE, *AUGMENTED, *names])
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    torch.save({"model": model.state_dict()}, folder / "model.pth")
    evaluator = COCOEvaluator("mini_val", output_dir=str(folder))
    results = Stock.test(cfg, GeneralizedRCNNWithTTA(cfg, model), [evaluator])
    found = json.loads((folder / "coco_instances_results.json").read_text())
    assert len(found) == 4 * 5
    return folder / "model.pth", {"results": results, "found": found}


def assert_same(folder: Path, expected: dict) -> None:
    results = json.loads((folder / "results.json").read_text())
    assert list(results) == ["bbox", "segm", "bbox_TTA", "segm_TTA"]
    for task, metrics in expected["results"].items():
        ours = {metric: results[f"{task}_TTA"][metric] for metric in metrics}
        assert ours == pytest.approx(metrics, abs=1e-4, nan_ok=True)
    path = folder / "inference_TTA" / "coco_instances_results.json"
    found = json.loads(path.read_text())
    assert len(found) == len(expected["found"])
    for ours, theirs in zip(found, expected["found"], strict=True):
        for key in ("image_id", "category_id", "segmentation"):
            assert ours[key] == theirs[key]
        assert ours["score"] == pytest.approx(theirs["score"], abs=1e-5)
        assert ours["bbox"] == pytest.approx(theirs["bbox"], abs=1e-3)
    plain = json.loads((folder / "inference" / "coco_instances_results.json").read_text())
    assert [each["bbox"] for each in plain] != [each["bbox"] for each in found]


def test_augmented_boxes_and_masks_are_detectron2s(stock, tmp_path):
    weights, expected = stock
    opts = [*ALIKE, *AUGMENTED, "MODEL.WEIGHTS", str(weights), "OUTPUT_DIR", str(tmp_path)]
    train_main(["--eval-only", "--config-file", MASK, *opts])
    assert_same(tmp_path, expected)


def test_a_lazy_models_are_too(stock, tmp_path):
    weights, expected = stock
    heads = "model.roi_heads"
    overrides = [
        "train.device=cpu", f"train.output_dir={tmp_path}", f"train.init_checkpoint={weights}",
        "train.tta.enabled=True", "train.tta.min_sizes=[64,96]", "train.tta.max_size=128",
        "model.backbone.coarsest_output_conv=True", f"{heads}.box_pooler.canonical_box_size=224",
        f"{heads}.mask_pooler.canonical_box_size=224", f"{heads}.box_predictor.test_score_thresh=0",
        f"{heads}.box_predictor.test_topk_per_image=5", "dataloader.test.num_workers=0",
        "dataloader.test.mapper.augmentations.0.short_edge_length=64",
    ]  # fmt: skip
    cfg = load_lazy_config("lazy/mini/mask_rcnn_R_18_FPN.py")
    topk = [cfg.model.proposal_generator.post_nms_topk[0], 20]
    overrides.append(f"model.proposal_generator.post_nms_topk={topk}".replace(" ", ""))
    lazy_main(["--eval-only", "--config-file", "lazy/mini/mask_rcnn_R_18_FPN.py", *overrides])
    assert_same(tmp_path, expected)


def test_a_training_augments_once_when_it_ends(squares, tmp_path, monkeypatch):
    calls: list[int] = []
    evaluate = FPNTrainer.test_with_TTA.__func__

    def counted(cls, cfg, model):
        calls.append(1)
        return evaluate(cls, cfg, model)

    monkeypatch.setattr(FPNTrainer, "test_with_TTA", classmethod(counted))
    opts = [*AUGMENTED, "TEST.AUG.MIN_SIZES", "(48,)", "SOLVER.MAX_ITER", "2"]
    opts += ["TEST.EVAL_PERIOD", "1", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"]
    args = tiny_options(squares, tmp_path, 0)
    train_main([*args, *opts])
    assert len(calls) == 1
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results) == ["bbox", "bbox_TTA"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    (logged,) = [row["bbox_TTA/AP"] for row in rows if "bbox_TTA/AP" in row]
    assert logged == results["bbox_TTA"]["AP"]
    # The files and figures of the plain evaluation are of that alone.
    assert json.loads((tmp_path / "inference" / "speed.json").read_text())["calls"] == 8
    plain, augmented = tmp_path.glob("inference*/coco_instances_results.json")
    assert plain.read_text() != augmented.read_text()


@pytest.mark.parametrize(
    ("config", "opts", "message"),
    [
        ("COCO-Detection/retinanet_R_50_FPN_1x.yaml", [], "for RetinaNet, only for Faster, Mask"),
        ("COCO-Detection/rpn_R_50_FPN_1x.yaml", [], "for ProposalNetwork"),
        ("COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.yaml", [], "for PanopticFPN"),
        ("COCO-Keypoints/keypoint_rcnn_R_50_FPN_1x.yaml", [], "for a model with keypoints"),
        ("mini/table2_c_FPN.yaml", [], "for a model that reads proposals from files"),
        (MASK, ["TEST.AUG.MIN_SIZES", "()"], r"TEST.AUG.MIN_SIZES is \[\]: expected one or more"),
    ],
)
def test_what_has_no_augmentation_is_one_line_beforehand(config, opts, message):
    with pytest.raises(UserError, match=rf"TEST.AUG.ENABLED is True.*{message}") as error:
        train_main(["--config-file", config, *AUGMENTED, *opts])
    assert "\n" not in str(error.value)


def test_an_optimised_copy_has_no_augmentation():
    with pytest.raises(UserError, match="TEST.AUG.ENABLED is True: --optimize has no"):
        train_main(["--eval-only", "--optimize", "float32", "--config-file", MASK, *AUGMENTED])


def test_a_lazy_model_without_augmentation_is_one_line():
    node = load_lazy_config(
        "lazy/COCO-Detection/fcos_R_50_FPN_1x.py", ["train.tta.enabled=True", "train.device=meta"]
    )
    with torch.device("meta"), pytest.raises(UserError, match="train.tta.enabled .* for FCOS"):
        LazyRun(node, Namespace(eval_only=True)).model()


# ---- expected results

RESULTS = {"bbox": {"AP": 40.0, "AP50": float("nan")}, "segm": {"AP": 30.0}}


@pytest.mark.parametrize(
    ("expected", "message"),
    [
        ([], ""),
        ([["bbox", "AP", 40.4, 0.5]], ""),
        ([["bbox", "AP", 40.4, 0.5], ("segm", "AP", 30, 0)], ""),
        ([["bbox", "AP", 40.6, 0.5]], r"bbox AP is 40.0 \(expected 40.6 within 0.5\)"),
        ([["segm", "AP", 30, 1], ["bbox", "AP", 39.4, 0.5]], "segm AP is 30.0 .*bbox AP is 40.0"),
        ([["bbox", "AP50", 1, 99]], "AP50 is nan"),
        ([["bbox", "AP99", 1, 99]], "AP99 is missing"),
        ([["box", "AP", 40, 1]], "names 'box', no task here: did you mean bbox"),
    ],
)
def test_results_are_compared_as_detectron2_does(expected, message):
    if not message:
        verify_expected("KEY", expected, RESULTS)
        return
    with pytest.raises(UserError, match=f"^KEY .*{message}") as error:
        verify_expected("KEY", expected, RESULTS)
    assert "\n" not in str(error.value)


def check_expected(expected: list, tests: tuple[str, ...]) -> None:
    cfg = load_config()
    cfg.TEST.EXPECTED_RESULTS, cfg.DATASETS.TEST = expected, tests
    RunConfig(cfg).check_expected_results()


@pytest.mark.parametrize(
    "entry", ["bbox", ["bbox", "AP", 1], ["bbox", "AP", "1", 1], [1, "AP", 1, 1], 3]
)
def test_what_is_no_expectation_is_refused_beforehand(entry):
    with pytest.raises(UserError, match=r"RESULTS has .*: expected \[task, metric, value, "):
        check_expected([entry], ("set",))


def test_expectations_are_for_one_test_set():
    check_expected([], ())
    for names in ((), ("one", "other")):
        with pytest.raises(UserError, match=f"one test set, and there are {len(names)}"):
            check_expected([["bbox", "AP", 1, 1]], names)


@pytest.mark.parametrize("how", ["training", "eval-only", "lazy"])
@pytest.mark.parametrize("met", [True, False])
def test_results_that_are_not_met_are_a_status_and_are_written(
    squares, tmp_path, monkeypatch, capfd, how, met
):
    register_datasets([squares])
    monkeypatch.setattr("fpn_plugin.engine.run.default_setup", lambda cfg, args: None)
    monkeypatch.setattr(FPNTrainer, "test", classmethod(lambda *_: {"bbox": {"AP": 40.0}}))
    monkeypatch.setattr(LazyRun, "_evaluate", lambda *_: RESULTS)
    value = 40.0 if met else 50.0
    opts = ["TEST.EXPECTED_RESULTS", f"[['bbox', 'AP', {value}, 1.0]]", "SOLVER.MAX_ITER", "1"]
    args = [*tiny_options(squares, tmp_path, 0), *opts]
    if how == "lazy":
        expected = f"train.expected_results=[[bbox,AP,{value},1.0]]"
        args = lazy_options(squares, tmp_path, expected)
    if how != "training":
        monkeypatch.setattr(StrictCheckpointer, "load", lambda *_, **__: {})
        args = ["--eval-only", *args]
    main = lazy_main if how == "lazy" else train_main
    if met:
        run_tool(lambda: main(args))
    else:
        line = error_line(capfd, main, args)
        assert line.endswith("is not met: bbox AP is 40.0 (expected 50.0 within 1.0)")
    assert json.loads((tmp_path / "results.json").read_text())["bbox"]["AP"] == 40.0

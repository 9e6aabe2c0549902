"""Exported files give the detections of the model they were made of, whatever they are given."""

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from PIL import Image

from fpn_plugin import UserError, model_zoo, optimize_for_inference
from fpn_plugin.cli.export import export_main
from fpn_plugin.data import read_picture
from fpn_plugin.deploy.export import FORMATS, batched, export_graph, exportable, load_exported
from fpn_plugin.deploy.export_check import detection_differences
from fpn_plugin.engine.inference import Detector

KINDS = ("faster", "mask", "retinanet")
KIND_NAMES = [f"kind {number}" for number in range(14)]


@pytest.fixture(scope="module")
def cases(images) -> list[list[torch.Tensor]]:
    """Single images of several sizes, one without detections, batches of several and of none."""
    pictures = [each["image"] for each in images]
    blank = torch.zeros(3, 140, 200)
    return [*([picture] for picture in pictures), [blank], [*pictures, blank], []]


def with_one_detection(model, cases) -> tuple[torch.nn.Module, torch.Tensor]:
    """The model with a threshold that leaves one detection in an image, and that image."""
    best = []
    for (image,) in (case for case in cases if len(case) == 1):
        with torch.no_grad():
            scores = model([{"image": image}])[0]["instances"].scores[:2].tolist()
        if len(scores) == 2:
            best.append((scores[1], scores[0], image))
    # The image whose second score is least: others have two detections or more.
    second, first, image = min(best, key=lambda each: each[:2])
    threshold_owner(model).test_score_thresh = (first + second) / 2
    return model, image


def larger_than_a_cell(model, cases) -> list[list[torch.Tensor]]:
    """Cases of more than one cell on the coarsest level, which is one of its own to torch.export;
    the tool says so."""
    coarsest = max(shape.stride for shape in model.backbone.output_shape().values())
    large = [each for each in cases if min(batched(each, 1)[0].shape[2:]) > coarsest]
    assert len(large) >= 3
    return large


def threshold_owner(model) -> torch.nn.Module:
    return model.roi_heads.box_predictor if hasattr(model, "roi_heads") else model


def assert_the_models(model, exported, cases, *, box_px=0.05, score=1e-4):
    detections, other, box, by_score, mask = detection_differences(model, exported, cases).values()
    assert other == 0 and box <= box_px and by_score <= score and mask <= 10 * score
    return detections


@pytest.mark.parametrize("kind", KINDS)
def test_the_graph_is_the_model(kind, detector, cases):
    model = detector(kind)
    graph = exportable(model)
    # Folding rounds weights, which predictors of spread scores show 60 times as large.
    assert assert_the_models(model, graph, cases, box_px=1e-3, score=3e-5) > 100
    model, image = with_one_detection(model, cases)
    assert assert_the_models(model, exportable(model), [[image]], box_px=1e-3, score=3e-5) == 1


def test_masks_are_the_models(detector, cases):
    model = detector("mask")
    with torch.no_grad():
        (expected,) = model.inference([{"image": cases[1][0]}], do_postprocess=False)
        *_, masks = exportable(model)(*batched(cases[1]))
    assert len(expected) > 10
    torch.testing.assert_close(masks, expected.pred_masks[:, 0], atol=1e-4, rtol=0)


DYNAMIC = hasattr(torch.export.Dim, "DYNAMIC")
needs_dynamic = pytest.mark.skipif(not DYNAMIC, reason="this torch.export has no dynamic sizes")
ONNX, TORCH_EXPORT = (pytest.param(kind, marks=needs_dynamic) for kind in ("onnx", "torch_export"))


# Mask R-CNN does all that Faster R-CNN does.
@pytest.mark.parametrize("kind", ["mask", "retinanet"])
@pytest.mark.parametrize("format", ["torchscript", ONNX, TORCH_EXPORT])
def test_a_file_gives_the_models_detections(kind, format, detector, cases, tmp_path):
    model = detector(kind)
    if format == "torch_export":
        cases = larger_than_a_cell(model, cases)
    model, one = with_one_detection(model, cases)
    path = tmp_path / FORMATS[format]
    export_graph(exportable(model), format, path)
    exported = load_exported(path)
    counts = [assert_the_models(model, exported, [case]) for case in ([one], *cases)]
    assert 1 in counts and sum(counts) > 10
    empty = exported(torch.zeros(0, 3, 256, 256), torch.zeros(0, 2, dtype=torch.int64))
    shapes = [tuple(tensor.shape) for tensor in empty]
    assert shapes == [(0, 4), (0,), (0,), (0,), (0, 28, 28)][: 4 + (kind == "mask")]


@pytest.mark.parametrize(
    ("kind", "format"),
    [("faster", "torchscript"), pytest.param("mask", "onnx", marks=needs_dynamic),
     pytest.param("retinanet", "torch_export", marks=needs_dynamic)],
)  # fmt: skip
def test_a_file_that_detects_nothing(kind, format, detector, cases, tmp_path):
    model = detector(kind)
    threshold_owner(model).test_score_thresh = 1.1
    if format == "torch_export":
        cases = larger_than_a_cell(model, cases)
    path = tmp_path / FORMATS[format]
    export_graph(exportable(model), format, path)
    assert assert_the_models(model, load_exported(path), cases) == 0


@pytest.mark.parametrize("format", ["onnx", "torch_export"])
def test_a_torch_without_dynamic_sizes_is_told(format, detector, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.export, "Dim", object())
    with pytest.raises(UserError, match=f"{format} needs a torch whose .* or export torchscript"):
        export_graph(exportable(detector("faster")), format, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_padding_may_hold_anything(detector, cases):
    graph = exportable(detector("faster"))
    images, sizes = batched([cases[0][0], cases[1][0]])
    noisy = images.clone()
    noisy[0, :, sizes[0, 0] :] = 200
    noisy[0, :, :, sizes[0, 1] :] = torch.nan
    with torch.no_grad():
        for ours, theirs in zip(graph(noisy, sizes), graph(images, sizes), strict=True):
            assert torch.equal(ours, theirs)


@pytest.fixture(scope="module")
def exported(detector, config_of, images, tmp_path_factory) -> tuple[Path, CfgNode, str]:
    """A folder with exported files and a picture, the config of their model, and the output."""
    folder = tmp_path_factory.mktemp("exported")
    cfg: CfgNode = config_of("faster")
    cfg.MODEL.WEIGHTS = str(folder / "weights.pth")
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 224, 310
    content = {
        "model": detector("faster").state_dict(),
        "classes": KIND_NAMES,
    }
    torch.save(content, cfg.MODEL.WEIGHTS)
    (folder / "config.yaml").write_text(cfg.dump())
    picture = images[1]["image"].permute(1, 2, 0).numpy()[:, :, ::-1].copy()
    Image.fromarray(picture).save(folder / "picture.png")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        export_main(
            ["--config-file", str(folder / "config.yaml"), "--input", str(folder / "picture.png"),
             "--output", str(folder / "out"), "--formats", "onnx" if DYNAMIC else "torchscript"]
        )  # fmt: skip
    return folder, cfg, printed.getvalue()


def test_the_tool_compares_and_describes(exported):
    folder, _, said = exported
    kind = "onnx" if DYNAMIC else "torchscript"
    row = next(line for line in said.splitlines() if line.startswith(f"| {kind}"))
    *_, detections, other, box, score, _ = [cell.strip() for cell in row.split("|")[1:-1]]
    assert int(detections) > 20
    assert other == "0"
    assert float(box) < 0.05
    assert float(score) < 1e-4
    described = json.loads((folder / "out" / "model.json").read_text())
    assert described["input"]["images"].startswith(
        "float32 (N, 3, H, W), resized, in channel_order"
    )
    assert described["input_size"] == {"shorter_side": 224, "longer_side_at_most": 310}
    assert described["channel_order"] == "BGR"
    assert described["mean"] == [103.53, 116.28, 123.675]
    assert described["deviation"] == [57.0, 57.0, 57.0]
    assert described["classes"] == KIND_NAMES
    assert (folder / "out" / "onnx_runner.py").is_file() == DYNAMIC


# Runs as a user does who has only these packages, and reports what was imported.
ONLY = """
import importlib.abc, runpy, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("torch", "torchvision", "detectron2", "fpn_plugin", "cv2"):
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


# Upright; turned by EXIF, and limited by its longer side; so narrow that it is padded.
@pytest.mark.parametrize("case", ["upright", "turned", "narrow"])
@needs_dynamic
def test_the_runner_gives_the_models_detections(case, exported, tmp_path):
    folder, cfg, _ = exported
    box, turned = {
        "upright": ((0, 0, 250, 190), False), "turned": ((0, 0, 130, 250), True),
        "narrow": ((60, 0, 100, 256), False),
    }[case]  # fmt: skip
    path, exif = tmp_path / "photo.png", Image.Exif()
    if turned:
        exif[0x0112] = 6
    Image.open(folder / "picture.png").crop(box).save(path, exif=exif)
    done = subprocess.run(
        [sys.executable, "-c", ONLY, str(folder / "out" / "onnx_runner.py"), str(path)],
        capture_output=True, text=True, timeout=120, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    ours = json.loads(done.stdout)["detections"]
    theirs = Detector(cfg)(read_picture(cfg, path))
    assert len(ours) == len(theirs) > 5
    assert [d["class"] for d in ours] == [KIND_NAMES[i] for i in theirs.pred_classes.tolist()]
    np.testing.assert_allclose([d["score"] for d in ours], theirs.scores.numpy(), atol=1e-4)
    boxes = theirs.pred_boxes.tensor.numpy()
    np.testing.assert_allclose([d["box"] for d in ours], boxes, atol=0.05)


def test_a_difference_is_counted(detector, cases):
    model = detector("mask")
    graph = exportable(model)

    def changed(images, sizes):
        boxes, scores, classes, index, masks = graph(images, sizes)
        return boxes[1:] + 0.25, scores[1:], classes[1:], index[1:], masks[1:] * 0.75

    found = detection_differences(model, changed, cases[:1])
    assert found["other"] == 1
    assert found["box (px)"] >= 0.25
    assert 0.1 < found["mask"] <= 0.25

    def of_no_image(images, sizes):
        box = torch.tensor([[0.0, 0, 5, 5]])
        return box, torch.ones(1), *torch.zeros(2, 1, dtype=torch.int64), torch.zeros(1, 28, 28)

    assert detection_differences(model, of_no_image, [[]])["other"] == 1


AGNOSTIC = ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True]


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.KEYPOINT_ON", True], "a keypoint head cannot be exported"),
        (["MODEL.ROI_HEADS.NAME", "FPNCascadeROIHeads", *AGNOSTIC], "FPNCascadeROIHeads cannot"),
        (["MODEL.META_ARCHITECTURE", "ProposalNetwork"], "ProposalNetwork"),
        (["MODEL.META_ARCHITECTURE", "PanopticFPN", "MODEL.MASK_ON", True], "PanopticFPN cannot"),
        (["MODEL.PROPOSAL_GENERATOR.NAME", "PrecomputedProposals"], "Fast R-CNN, which reads"),
    ],
)
def test_what_has_no_graph_is_named(opts, message, config_of):
    cfg = config_of("faster")
    cfg.merge_from_list(opts)
    with pytest.raises(UserError, match=message):
        exportable(build_model(cfg))


def test_an_optimised_model_is_refused(detector):
    with pytest.raises(UserError, match="export the original"):
        exportable(optimize_for_inference(detector("faster")))


def test_what_a_format_cannot_carry_is_said(detector, tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise RuntimeError("while tracing\n\nno operator for roi_pool\n")

    monkeypatch.setattr(torch.jit, "trace", refuse)
    with pytest.raises(UserError, match="torchscript cannot carry this model: RuntimeError: no op"):
        export_graph(exportable(detector("faster")), "torchscript", tmp_path / "model.ts")


def test_without_onnx_the_command_is_named(detector, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"pip install 'fpn_plugin\[onnx\]'"):
        export_graph(exportable(detector("faster")), "onnx", tmp_path / "model.onnx")


def test_an_unknown_suffix_names_those_there_are(tmp_path):
    with pytest.raises(UserError, match=r"\.ts, \.pt2, \.onnx"):
        load_exported(tmp_path / "model.engine")


def test_zoo_configs_have_a_graph():
    for name in ("COCO-Detection/faster_rcnn_R_50_FPN_1x", "COCO-Detection/retinanet_R_50_FPN_1x",
                 "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x"):  # fmt: skip
        cfg = model_zoo.get_config(f"{name}.yaml")
        cfg.MODEL.DEVICE, cfg.MODEL.FPN.OUT_CHANNELS = "cpu", 16
        graph = exportable(build_model(cfg).eval())
        with torch.no_grad():
            boxes, *_ = graph(*batched([torch.zeros(3, 70, 90)]))
        assert boxes.shape[1] == 4

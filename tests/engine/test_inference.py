"""Detections say the level they were pooled from, and pictures show it."""

import json

import numpy as np
import pytest
import torch
import torchvision
from detectron2.modeling import build_model
from matplotlib.colors import to_rgb
from PIL import Image

from fpn_plugin import UserError, assign_levels, model_zoo
from fpn_plugin.engine import StrictCheckpointer
from fpn_plugin.engine.inference import Detector
from fpn_plugin.inspection.forward_trace import recorded_levels
from fpn_plugin.visualization import DrawnBox, draw_detections, level_color, plot_losses


def small_config(*opts):
    cfg = model_zoo.get_config("mini/faster_rcnn_R_18_FPN.yaml")
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    cfg.merge_from_list(list(opts))
    return cfg


@pytest.mark.parametrize("s0", [112, 56])
def test_the_level_recorded_is_that_of_the_proposal(s0):
    model = build_model(small_config("MODEL.FPN.CANONICAL_BOX_SIZE", s0)).eval()
    # Without regression a detection's box is its proposal's.
    torch.nn.init.zeros_(model.roi_heads.box_predictor.bbox_pred.weight)
    image = {"image": torch.randint(0, 256, (3, 256, 256)), "height": 512, "width": 512}
    with torch.no_grad(), recorded_levels(model):
        (found,) = model.inference([image], do_postprocess=False)
        (scaled,) = model([image])
    levels = assign_levels(found.pred_boxes.tensor, 2, 5, s0)
    assert len(levels.unique()) > 1
    assert torch.equal(found.pyramid_level, levels)
    # Boxes scaled to the original image keep the level they were pooled from at the network's.
    assert torch.equal(scaled["instances"].pyramid_level.sort()[0], levels.sort()[0])
    with torch.no_grad():
        assert not model([image])[0]["instances"].has("pyramid_level")


@pytest.mark.parametrize("arch", ["GeneralizedRCNN", "ProposalNetwork"])
def test_detector(arch, tmp_path):
    cfg = small_config("MODEL.META_ARCHITECTURE", arch, "OUTPUT_DIR", str(tmp_path))
    StrictCheckpointer(build_model(cfg), str(tmp_path)).save("weights")
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    image = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
    if arch == "ProposalNetwork":
        with pytest.raises(UserError, match="gives proposals"):
            Detector(cfg)(image)
        return
    found = Detector(cfg)(image)
    assert found.image_size == (120, 200)
    assert len(found) > 0
    assert set(found.pyramid_level.tolist()) <= {2, 3, 4, 5}


def test_a_trained_detector_needs_no_file_of_its_networks_first_weights(tmp_path):
    first = tmp_path / "first.pth"
    torch.save(torchvision.models.mobilenet_v3_small(weights=None).state_dict(), first)
    cfg = small_config(
        "MODEL.FPN.BOTTOM_UP", "build_torchvision_backbone", "MODEL.TORCHVISION.NAME",
        "mobilenet_v3_small", "MODEL.TORCHVISION.WEIGHTS", str(first),
    )  # fmt: skip
    model = build_model(cfg)
    StrictCheckpointer(model, str(tmp_path)).save("weights")
    first.unlink()
    with pytest.raises(UserError, match=r"no file .*first.pth'; MODEL.TORCHVISION.WEIGHTS '' "):
        build_model(cfg)
    cfg.MODEL.WEIGHTS = str(tmp_path / "weights.pth")
    for key, value in Detector(cfg).model.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key


def test_a_detector_without_weights_is_an_error():
    with pytest.raises(UserError, match="MODEL.WEIGHTS"):
        Detector(small_config())


def has_color(path, color: str) -> bool:
    pixels = np.asarray(Image.open(path).convert("RGB")) / 255
    return bool((np.abs(pixels - np.array(to_rgb(color))).max(axis=2) < 0.02).sum() > 50)


def test_boxes_are_drawn_in_the_colour_of_their_level(tmp_path):
    image = np.zeros((100, 120, 3), np.uint8)
    boxes = [DrawnBox((10, 10, 50, 60), "a", 2), DrawnBox((60, 20, 110, 90), "b", 4)]
    path = draw_detections(image, boxes, tmp_path / "new" / "picture.png")
    for level in range(2, 8):
        assert has_color(path, level_color(level)) == (level in (2, 4)), level
    truth = [DrawnBox((10, 10, 50, 60), "a")]
    beside = draw_detections(image, boxes, tmp_path / "beside.png", truth)
    assert Image.open(beside).size[0] > 1.8 * Image.open(path).size[0]
    assert has_color(beside, level_color(None))
    draw_detections(image, [], tmp_path / "nothing.png")


def test_a_label_is_seen_wherever_its_box_lies(tmp_path):
    image = np.zeros((100, 100, 3), np.uint8)

    def ink(top: int, text: str) -> int:
        box = [DrawnBox((20, top, 60, 90), text, 2)]
        pixels = np.asarray(Image.open(draw_detections(image, box, tmp_path / "x.png")))
        color = np.array(to_rgb(level_color(2))) * 255
        return int((np.abs(pixels[:, :, :3] - color).max(axis=2) < 30).sum())

    label = ink(40, "a long label") - ink(40, "")
    assert ink(0, "a long label") - ink(0, "") > 0.7 * label


def test_level_colors_differ():
    assert len({level_color(level) for level in (None, 2, 3, 4, 5, 6, 7)}) == 7


def test_losses_of_a_resumed_run_are_drawn_once(tmp_path, monkeypatch):
    drawn = {}

    def record(self, x, y, *args, **kwargs):
        if "label" in kwargs:
            drawn[kwargs["label"]] = (list(x), list(y))
        return plot(self, x, y, *args, **kwargs)

    from matplotlib.axes import Axes

    plot = Axes.plot
    monkeypatch.setattr(Axes, "plot", record)
    rows = [
        {"iteration": 19, "total_loss": 2.0, "loss_cls": 1.0, "lr": 0.1},
        {"iteration": 39, "total_loss": 1.5, "loss_cls": 0.8, "lr": 0.1},
        {"iteration": 39, "total_loss": 1.4, "loss_cls": 0.7, "lr": 0.1},
        {"iteration": 40, "bbox/AP": 12.0},
    ]
    before = [{"iteration": i, "total_loss": 9.0} for i in (19, 39, 59)]  # another run, here too
    metrics = tmp_path / "metrics.json"
    metrics.write_text("\n".join([*map(json.dumps, before), '{"iterat', *map(json.dumps, rows)]))
    assert Image.open(plot_losses(metrics, tmp_path / "losses.png")).size[0] > 500
    assert drawn == {"total_loss": ([19, 39], [2.0, 1.4]), "loss_cls": ([19, 39], [1.0, 0.7])}

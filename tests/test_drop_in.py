"""What docs/drop_in.md promises of the plugin in a pipeline that exists."""

import copy
import importlib.util
import json
import re
from pathlib import Path

import detectron2
import pytest
import torch
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import default_argument_parser
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage

from evidence.tiny import tiny_options
from fpn_plugin import FeaturePyramidNetwork, PyramidROIPooler, model_zoo
from tests.helpers.datasets import forgotten

PAGE = (Path(__file__).parents[1] / "docs" / "drop_in.md").read_text()
MINI = "mini/faster_rcnn_R_18_FPN.yaml"
TRAIN_NET = Path(detectron2.__file__).parents[1] / "tools" / "train_net.py"


def model_of(backbone: str, heads: str) -> torch.nn.Module:
    cfg = model_zoo.get_config(MINI)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.BACKBONE.NAME, cfg.MODEL.ROI_HEADS.NAME = backbone, heads
    cfg.MODEL.FPN.COARSEST_OUTPUT_CONV = True
    cfg.MODEL.FPN.CANONICAL_BOX_SIZE = 224
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    torch.manual_seed(0)
    return build_model(cfg)


def test_either_line_works_without_the_other():
    stock = model_of("build_resnet_fpn_backbone", "StandardROIHeads")
    backbone_alone = model_of("build_fpn_backbone", "StandardROIHeads")
    heads_alone = model_of("build_resnet_fpn_backbone", "FPNROIHeads")
    assert isinstance(backbone_alone.backbone, FeaturePyramidNetwork)
    assert not isinstance(backbone_alone.roi_heads.box_pooler, PyramidROIPooler)
    assert not isinstance(heads_alone.backbone, FeaturePyramidNetwork)
    assert isinstance(heads_alone.roi_heads.box_pooler, PyramidROIPooler)
    labels = Instances((128, 160))
    labels.gt_boxes = Boxes(torch.tensor([[10.0, 12, 60, 70], [50, 20, 150, 120]]))
    labels.gt_classes = torch.tensor([1, 3])
    image = torch.randint(0, 256, (3, 128, 160), dtype=torch.uint8)
    batch = [{"image": image, "instances": labels, "height": 128, "width": 160}]
    # Training moves the statistics of batch norms.
    state = copy.deepcopy(stock.state_dict())
    losses, found = [], []
    for model in (stock, backbone_alone, heads_alone):
        model.load_state_dict(state, strict=True)
        torch.manual_seed(1)
        with EventStorage(), torch.no_grad():
            losses.append(model.train()(batch))
            found.append(model.eval()(batch)[0]["instances"])
    for other_losses, other in zip(losses[1:], found[1:], strict=True):
        for name, expected in losses[0].items():
            torch.testing.assert_close(other_losses[name], expected, rtol=1e-5, atol=1e-5)
        assert len(other) == len(found[0]) > 10
        for field in ("scores", "pred_classes"):
            torch.testing.assert_close(other.get(field), found[0].get(field), rtol=1e-5, atol=1e-4)
        boxes = other.pred_boxes.tensor
        torch.testing.assert_close(boxes, found[0].pred_boxes.tensor, rtol=1e-5, atol=1e-4)


@pytest.mark.skipif(not TRAIN_NET.is_file(), reason="this Detectron2 came without its tools")
def test_detectron2s_train_net_trains_with_the_pages_setup(squares, tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("detectron2s_train_net", TRAIN_NET)
    train_net = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(train_net)
    [snippet] = [s for s in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "def setup" in s]
    page: dict[str, object] = {}
    exec(compile(snippet, "drop_in.md", "exec"), page)
    monkeypatch.setattr(train_net, "setup", page["setup"])

    annotations, images = squares.partition("=")[2].rsplit(":", 1)
    options = tiny_options(squares, tmp_path / "run", workers=0)
    options = options[options.index("MODEL.DEVICE") :]
    options += ["DATASETS.TRAIN", "('page',)", "DATASETS.TEST", "('page',)"]
    parsed = default_argument_parser().parse_args(
        ["--config-file", model_zoo.get_config_file(MINI), *options, "SOLVER.MAX_ITER", "2"]
    )
    with forgotten():
        register_coco_instances("page", {}, annotations, images)
        train_net.main(parsed)
    lines = (tmp_path / "run" / "metrics.json").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert any(0 < each.get("total_loss", 0) < 100 for each in rows)
    assert any(0 <= each.get("bbox/AP", -1) <= 100 for each in rows)
    state = torch.load(tmp_path / "run" / "model_final.pth", weights_only=False)["model"]
    assert "backbone.fpn_lateral2.weight" in state
    assert "backbone.fpn_output5.weight" not in state  # the plugin's reading, from its config

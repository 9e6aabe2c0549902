"""What is said of a model's work on an image is what the model did."""

import json
import math

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BoxMode
from PIL import Image
from torchvision.ops import box_iou

from fpn_plugin import UserError
from fpn_plugin.cli.visualize import visualize_main
from fpn_plugin.inspection.forward_trace import ForwardTrace, Regions, forward_trace
from fpn_plugin.visualization.contributions import contributions

FASTER = "mini/faster_rcnn_R_18_FPN.yaml"
BOXES = [[10.0, 12, 14, 18], [40, 30, 60, 50], [20, 10, 150, 110]]


@pytest.fixture
def image():
    """BGR, 120 x 160 px; the network sees it twice as large."""
    return np.random.default_rng(4).integers(0, 256, (120, 160, 3), np.uint8)


def annotations():
    crowd = {"bbox": [0, 0, 100, 100], "category_id": 1, "iscrowd": 1}
    objects = [{"bbox": box, "category_id": 2, "iscrowd": 0} for box in BOXES]
    return [{**record, "bbox_mode": BoxMode.XYWH_ABS} for record in [crowd, *objects]]


def detector(make_config, name, *opts):
    """A model whose random head detects something, and its config."""
    cfg: CfgNode = make_config(name, "INPUT.MIN_SIZE_TEST", 240, *opts)
    torch.manual_seed(3)
    model = build_model(cfg).eval()
    if "retinanet" not in name and getattr(model, "roi_heads", None) is not None:
        torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=2.0)
    torch.nn.init.normal_(model.backbone.fpn_lateral5.weight, std=0.1)
    return model, cfg


def by_hand(boxes, k0=4, s0=112):
    """Eq. (1), box by box, over P2 to P5."""
    sizes = [math.sqrt((x1 - x0) * (y1 - y0)) for x0, y0, x1, y1 in boxes.double().tolist()]
    return tuple(f"p{min(max(math.floor(k0 + math.log2(v / s0)), 2), 5)}" for v in sizes)


def test_levels_are_those_that_the_model_used(make_config, image):
    model, cfg = detector(make_config, FASTER, "MODEL.FPN.CANONICAL_BOX_SIZE", 48)
    torch.nn.init.normal_(model.proposal_generator.rpn_head.anchor_deltas.weight, std=0.5)
    kept = {}
    heads = model.roi_heads
    heads.box_pooler.register_forward_hook(lambda _, args, out: kept.update(boxes=args[1]))
    seen = forward_trace(model, cfg, image, annotations())
    assert seen.image.shape == (240, 320, 3)
    assert list(seen.features) == ["p2", "p3", "p4", "p5", "p6"]
    cells = {"p2": (60, 80), "p3": (30, 40), "p4": (15, 20), "p5": (8, 10), "p6": (4, 5)}
    assert {name: tuple(maps.shape[1:]) for name, maps in seen.features.items()} == cells

    pooled = kept["boxes"][0].tensor
    assert torch.equal(seen.pooled.boxes, pooled)
    assert seen.pooled.levels == by_hand(pooled, s0=48)
    assert torch.equal(seen.proposed.boxes, pooled)
    assert len(set(seen.pooled.levels)) > 1

    assert len(seen.detections) > 0
    assert set(seen.detections.levels) <= set(seen.pooled.levels)


def test_proposals_are_told_the_level_of_their_anchors(make_config, image):
    model, cfg = detector(make_config, "mini/table1_c_FPN.yaml")
    rpn = model.proposal_generator
    # Anchors are proposed as they are: the area of a proposal inside the image says its level.
    torch.nn.init.zeros_(rpn.rpn_head.anchor_deltas.weight)
    torch.nn.init.zeros_(rpn.rpn_head.anchor_deltas.bias)
    seen = forward_trace(model, cfg, image)
    boxes = seen.proposed.boxes
    inside = ((boxes > 0.01) & (boxes < torch.tensor([319.9, 239.9, 319.9, 239.9]))).all(dim=1)
    assert inside.sum() > 20
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    expected = [f"p{2 + round(math.log2(v / 16))}" for v in area[inside].sqrt().tolist()]
    assert list(seen.proposed.chosen(inside).levels) == expected
    assert "" not in seen.proposed.levels
    assert seen.pooled is None and seen.detections is None and seen.truths is None


def test_matched_anchors_and_truths(make_config, image):
    model, cfg = detector(make_config, FASTER)
    seen = forward_trace(model, cfg, image, annotations())
    truths = torch.tensor(BOXES)
    truths[:, 2:] += truths[:, :2]
    truths = (2 * truths).clamp(max=torch.tensor([320.0, 240, 320, 240]))
    assert torch.equal(seen.truths.boxes, truths)  # the crowd is no object

    maps = [torch.zeros(1, 1, 64 // 2**k, 80 // 2**k) for k in range(5)]  # padded to 256 x 320
    anchors = model.proposal_generator.anchor_generator(maps)
    every = torch.cat([level.tensor for level in anchors])
    overlaps = box_iou(truths, every)
    best = overlaps.max(dim=1, keepdim=True).values
    matched = (overlaps >= 0.7).any(dim=0) | (overlaps == best).any(dim=0)
    names = [f"p{k}" for k, level in enumerate(anchors, start=2) for _ in range(len(level))]
    assert torch.equal(seen.matched.boxes, every[matched])
    assert list(seen.matched.levels) == [
        name for name, is_matched in zip(names, matched.tolist(), strict=True) if is_matched
    ]


@pytest.mark.parametrize(
    "name",
    [
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
        "mini/table1_d_bottom_up.yaml",
    ],
)
def test_other_architectures_are_looked_at_too(name, make_config, image):
    cfg = make_config(name, "INPUT.MIN_SIZE_TEST", 128)
    seen = forward_trace(build_model(cfg).eval(), cfg, image, annotations())
    assert len(seen.matched) > 0
    assert set(seen.matched.levels) <= set(seen.features)
    assert (seen.proposed is None) == ("retinanet" in name)


def test_a_model_that_reads_proposals_is_refused(make_config, image):
    cfg = make_config("mini/table2_c_FPN.yaml")
    with pytest.raises(UserError, match="reads its proposals from a file"):
        forward_trace(build_model(cfg).eval(), cfg, image)


def regions(*rows):
    """Rows of box, level, score, class."""
    boxes, levels, scores, classes = zip(*rows, strict=True)
    return Regions(
        torch.tensor(boxes).float(), tuple(levels), torch.tensor(scores), torch.tensor(classes)
    )


def test_contributions_of_a_case_made_by_hand():
    truths = regions(([0, 0, 10, 10], "", 1.0, 1), ([50, 50, 90, 90], "", 1.0, 2))
    detections = regions(
        ([0, 0, 10, 9], "p2", 0.9, 1),
        ([0, 0, 10, 10], "p3", 0.8, 1),  # the object is taken
        ([50, 50, 90, 90], "p3", 0.7, 1),  # wrong class
        ([50, 50, 90, 85], "p4", 0.6, 2),
        ([50, 50, 90, 90], "p4", 0.4, 2),  # not sure
    )
    proposed = regions(
        ([0, 0, 5, 5], "p2", 3.0, -1), ([48, 50, 90, 90], "p5", 2.0, -1),
        ([0, 0, 10, 10], "p2", 1.0, -1),
    )  # fmt: skip
    maps = {f"p{k}": torch.zeros(1, 1, 1) for k in range(2, 6)}
    seen = ForwardTrace(
        np.zeros((100, 100, 3), np.uint8), maps, dict.fromkeys(maps, 4), proposed, proposed,
        detections, truths, matched=truths.first(0),
    )  # fmt: skip
    counted = contributions([seen, seen], threshold=0.5)
    assert counted["detections"] == {"p2": 2, "p3": 4, "p4": 2, "p5": 0}
    assert counted["correct detections"] == {"p2": 2, "p3": 0, "p4": 2, "p5": 0}
    assert counted["proposals made"] == {"p2": 4, "p3": 0, "p4": 0, "p5": 2}
    assert counted["objects in 100 best"] == {"p2": 2, "p3": 0, "p4": 0, "p5": 2}
    assert counted["anchors that matched"] == {"p2": 0, "p3": 0, "p4": 0, "p5": 0}
    assert seen.covering(2).levels == ("p5",)


def test_the_tool_draws_models_side_by_side(make_config, image, tmp_path):
    runs = []
    for name in ("(c)", "(d)"):
        folder = tmp_path / name
        folder.mkdir()
        model, cfg = detector(make_config, FASTER, "MODEL.FPN.TOP_DOWN", name == "(c)",
                              "INPUT.MIN_SIZE_TEST", 64)  # fmt: skip
        (folder / "config.yaml").write_text(cfg.dump())
        torch.save({"model": model.state_dict()}, folder / "model_final.pth")
        runs.append(f"{name}={folder}")
    Image.fromarray(image).save(tmp_path / "photo.png")
    given = ["--input", str(tmp_path / "photo.png"), "--output", str(tmp_path / "out")]
    visualize_main(["--run", *runs, *given])
    drawn = sorted(path.name for path in (tmp_path / "out" / "photo").iterdir())
    assert drawn == ["features.png", "norms.png", "pooling.png"]
    told = json.loads((tmp_path / "out" / "contributions.json").read_text())
    assert list(told) == ["(c)", "(d)"]
    assert "anchors that matched" not in told["(c)"]  # no labels
    (tmp_path / "(d)" / "model_final.pth").unlink()
    with pytest.raises(UserError, match=r"'.*model_final.pth' does not exist"):
        visualize_main(["--run", *runs, *given])


def test_a_model_of_whose_levels_nothing_is_known_is_drawn(make_config, image, tmp_path, capsys):
    """RetinaNet pools nothing, and without labels no anchors match."""
    model, cfg = detector(make_config, "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
                          "INPUT.MIN_SIZE_TEST", 64)  # fmt: skip
    (tmp_path / "config.yaml").write_text(cfg.dump())
    torch.save({"model": model.state_dict()}, tmp_path / "model_final.pth")
    Image.fromarray(image).save(tmp_path / "photo.png")
    out = tmp_path / "out"
    given = ["--input", str(tmp_path / "photo.png"), "--output", str(out)]
    visualize_main(["--run", f"it={tmp_path}", *given])
    assert "no contributions.png" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["contributions.json", "photo"]
    assert json.loads((out / "contributions.json").read_text()) == {"it": {}}
    assert (out / "photo" / "features.png").is_file()

"""A model for other classes, keypoints, anchors or image channels starts from a checkpoint: what
depends on their number is left out and named, all else is loaded, value for value.
"""

import logging
import re
from functools import cache
from pathlib import Path

import pytest
import torch
from detectron2.config import instantiate
from detectron2.modeling import build_model
from torch import nn

from fpn_plugin import UserError, model_zoo
from fpn_plugin.engine import StrictCheckpointer
from fpn_plugin.lazy import load_lazy_config

FCOS = "lazy/COCO-Detection/fcos_R_50_FPN_1x.py"
NOT_THE_ZOOS = ("mini", "own_data", "paper")
TWINS = [name for name in model_zoo.names() if name.split("/")[0] not in NOT_THE_ZOOS]
ONE = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
UNSHARED = "mini/table1_c_FPN_unshared.yaml"  # an RPN head a level
NARROW = [
    "MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", 8, "MODEL.RESNETS.DEPTH", 50,
    "MODEL.RESNETS.NUM_GROUPS", 1, "MODEL.RESNETS.WIDTH_PER_GROUP", 4,
    "MODEL.RESNETS.RES2_OUT_CHANNELS", 4, "MODEL.RESNETS.STEM_OUT_CHANNELS", 4,
    "MODEL.ROI_BOX_HEAD.FC_DIM", 8, "MODEL.ROI_MASK_HEAD.CONV_DIM", 8,
    "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [8], "MODEL.SEM_SEG_HEAD.CONVS_DIM", 32,
    "MODEL.RETINANET.NUM_CONVS", 1,
]  # fmt: skip
OTHER = {
    "classes": ["MODEL.ROI_HEADS.NUM_CLASSES", 3, "MODEL.RETINANET.NUM_CLASSES", 3,
                "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 5],
    "class-agnostic": ["MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True,
                       "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True],
    "keypoints": ["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", 5],
    "anchors": ["MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS", [[0.5, 1.0]]],
    "gray": ["MODEL.PIXEL_MEAN", [100.0], "MODEL.PIXEL_STD", [1.0], "INPUT.FORMAT", "L"],
    "alpha": ["MODEL.PIXEL_MEAN", [1.0] * 4, "MODEL.PIXEL_STD", [1.0] * 4, "INPUT.FORMAT", "RGBA"],
}  # fmt: skip
# What each change leaves out, by hand: of every architecture, where it has such a part.
LEFT = {
    "classes": [
        "roi_heads.box_predictor.{}cls_score", "roi_heads.box_predictor.{}bbox_pred",
        "roi_heads.mask_head.predictor", "sem_seg_head.predictor", "head.cls_score",
    ],
    "class-agnostic": ["roi_heads.box_predictor.{}bbox_pred", "roi_heads.mask_head.predictor"],
    "keypoints": ["roi_heads.keypoint_head.score_lowres"],
    "anchors": [
        "proposal_generator.rpn_head.{}objectness_logits",
        "proposal_generator.rpn_head.{}anchor_deltas", "head.cls_score", "head.bbox_pred",
    ],
    "gray": ["backbone.bottom_up.stem.conv1"],
    "alpha": ["backbone.bottom_up.stem.conv1"],
}  # fmt: skip
REASON = {
    "classes": "classes", "class-agnostic": "classes", "keypoints": "keypoints",
    "anchors": "anchors", "gray": "channels of the image", "alpha": "channels of the image",
}  # fmt: skip
MENDING = {
    "classes": ["MODEL.ROI_HEADS.NUM_CLASSES (", "RETINANET.NUM_CLASSES", "SEM_SEG_HEAD.NUM_CLAS"],
    "class-agnostic": ["ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "ROI_MASK_HEAD.CLS_AGNOSTIC_MASK"],
    "keypoints": ["MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS"],
    "anchors": ["MODEL.ANCHOR_GENERATOR"],
    "gray": ["MODEL.PIXEL_MEAN"],
    "alpha": ["MODEL.PIXEL_MEAN"],
}  # fmt: skip


def narrow(name: str, *opts: object) -> nn.Module:
    cfg = model_zoo.get_config(name)
    cfg.merge_from_list([*NARROW, *opts])
    return build_model(cfg)


def random(model: nn.Module) -> dict[str, torch.Tensor]:
    """A state dict of which no value is one that a new model begins with."""
    state = model.state_dict()
    return {k: torch.randn_like(v) if v.is_floating_point() else v for k, v in state.items()}


@cache
def trained(name: str) -> dict[str, torch.Tensor]:
    return random(narrow(name))


def checkpoint(state: dict[str, torch.Tensor], folder: Path) -> str:
    torch.save({"model": state}, folder / "trained.pth")
    return str(folder / "trained.pth")


def expected(change: str, keys: list[str]) -> set[str]:
    patterns = [re.escape(part).replace(r"\{\}", r"(heads\.)?(\d\.)?") for part in LEFT[change]]
    return {key for key in keys if re.match(f"({'|'.join(patterns)})\\.(weight|bias)$", key)}


def assert_starts_from(
    model: nn.Module, state: dict[str, torch.Tensor], left: set[str], path: str, caplog
) -> str:
    """Loads, compares every tensor, and gives back the line that was said."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        StrictCheckpointer(model).load(path)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key] if key in left else state[key]), key
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == bool(left), said
    for key in left:
        assert f"{key} (" in said[0]
    if left:
        of = sum("num_batches_tracked" not in key for key in state)
        assert f"{of - len(left)} of {of} tensors are loaded, {len(left)} left out" in said[0]
        assert "\n" not in said[0]
    return "".join(said)


def evaluation_names(model: nn.Module, path: str, left: set[str]) -> str:
    """The keys that mend it, where a model that needs all is given such weights."""
    with pytest.raises(UserError, match=f"does not fit in {len(left)} tensors") as raised:
        StrictCheckpointer(model, complete=True).load(path)
    return str(raised.value).partition("; see ")[2]


# Deeper networks and longer schedules have the same tensors, as narrow as they are here.
KINDS = [name for name in TWINS if "R_50" in name and "1x" in name]
OTHERS = [pytest.param(name, marks=pytest.mark.long) for name in TWINS if name not in KINDS]


@pytest.mark.parametrize("name", [*KINDS, UNSHARED, *OTHERS])
def test_a_twin_starts_from_weights_for_other_data(name, tmp_path, caplog):
    state = trained(name)
    path = checkpoint(state, tmp_path)
    for change, opts in OTHER.items():
        model = narrow(name, *opts)
        left = expected(change, list(state))
        if "cascade" in name or (change == "class-agnostic" and "eypoint" in name):
            # Class-agnostic already, or of one class, which has the same boxes.
            left = {key for key in left if "roi_heads.box_predictor" not in key or "cls" in key}
        said = assert_starts_from(model, state, left, path, caplog)
        assert (f"another number of {REASON[change]}" in said) == bool(left)
        assert ("Frozen" in said) == (change in ("gray", "alpha") and name != UNSHARED)
        if left:
            keys = evaluation_names(model, path, left)
            assert any(mending in keys for mending in MENDING[change])


def lazy(name: str, *opts: str) -> nn.Module:
    """A narrow model of a lazy config; how FCOS's own network is narrowed is its Detectron2's."""
    cfg = load_lazy_config(name, opts)
    backbone = cfg.model.backbone
    if "bottom_up" in backbone:
        backbone.out_channels = 32
        if "RESNETS" in backbone.bottom_up:
            narrow_keys = ("STEM_OUT_CHANNELS", "RES2_OUT_CHANNELS", "WIDTH_PER_GROUP")
            backbone.bottom_up.RESNETS.update(dict.fromkeys(narrow_keys, 4))
    return instantiate(cfg.model)


LAZY = {
    "lazy/COCO-Detection/retinanet_R_50_FPN_1x.py": {
        "model.num_classes=3": ["head.cls_score"],
        "model.pixel_mean=[1.0] model.pixel_std=[1.0]": ["backbone.bottom_up.stem.conv1"],
        # 3 anchors of 240 classes have the scores' shape of 9 anchors of 80: not their meaning.
        "model.num_classes=240 model.head.num_anchors=3": ["head.cls_score", "head.bbox_pred"],
    },
    FCOS: {
        "model.num_classes=3": ["head.cls_score"],
        "model.backbone.bottom_up.stem.in_channels=4": ["backbone.bottom_up.stem.conv1"],
    },
    "lazy/COCO-PanopticSegmentation/panoptic_fpn_R_50_1x.py": {
        "model.sem_seg_head.num_classes=5 model.roi_heads.num_classes=2": [
            "sem_seg_head.predictor", "roi_heads.mask_head.predictor",
            "roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred",
        ],
    },
    "lazy/mini/table1_a_C4.py": {  # no pyramid
        "model.pixel_mean=[1,1,1,1] model.pixel_std=[1,1,1,1]": ["backbone.stem.conv1"],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", LAZY)
def test_a_lazy_model_starts_from_weights_for_other_data(name, tmp_path, caplog):
    state = random(lazy(name))
    path = checkpoint(state, tmp_path)
    for opts, parts in LAZY[name].items():
        left = {f"{part}.{kind}" for part in parts for kind in ("weight", "bias")} & state.keys()
        said = assert_starts_from(lazy(name, *opts.split()), state, left, path, caplog)
        assert "lazy: " in said or "PIXEL_MEAN" in said


def test_what_other_data_does_not_explain_is_refused_by_its_own_key(tmp_path):
    path = checkpoint(trained(ONE), tmp_path)
    for opts, keys in (
        (["MODEL.ROI_BOX_HEAD.FC_DIM", 9, "MODEL.ROI_HEADS.NUM_CLASSES", 3], "MODEL.ROI_BOX_HEAD"),
        (["MODEL.FPN.OUT_CHANNELS", 9, "MODEL.ROI_HEADS.NUM_CLASSES", 3], "MODEL.FPN.OUT_CHANNELS"),
        (["MODEL.RESNETS.STEM_OUT_CHANNELS", 9, *OTHER["gray"]], "MODEL.RESNETS.DEPTH"),
    ):
        with pytest.raises(UserError, match=f"; see {keys}"):
            StrictCheckpointer(narrow(ONE, *opts)).load(path)


def test_a_training_is_not_resumed_with_half_a_model(tmp_path):
    (tmp_path / "last_checkpoint").write_text("trained.pth")
    checkpoint(trained(ONE), tmp_path)
    model = narrow(ONE, *OTHER["classes"])
    with pytest.raises(UserError, match=r"cannot resume: .* see MODEL.ROI_HEADS.NUM_CLASSES"):
        StrictCheckpointer(model, str(tmp_path)).resume_or_load("", resume=True)


def test_networks_of_ones_own_leave_out_their_first_convolution(tmp_path, caplog):
    class Network(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.backbone = nn.Sequential(nn.Conv2d(channels, 2, 3), nn.Conv2d(2, 2, 1))

    state = random(Network(3))
    path = checkpoint(state, tmp_path)
    assert_starts_from(Network(4), state, {"backbone.0.weight"}, path, caplog)


def test_names_matched_by_likeness_leave_the_first_convolution_out_as_well(tmp_path):
    """Detectron2's ImageNet weights, which have no names of this model's."""
    model = narrow(ONE, *OTHER["gray"])
    start = "backbone.bottom_up."
    state = {k.removeprefix(start): v for k, v in trained(ONE).items() if start in k}
    torch.save({"model": state, "matching_heuristics": True}, tmp_path / "imagenet.pth")
    stem = model.backbone.bottom_up.stem.conv1.weight.clone()
    StrictCheckpointer(model).load(str(tmp_path / "imagenet.pth"))
    assert torch.equal(model.backbone.bottom_up.stem.conv1.weight, stem)
    for key, value in model.backbone.bottom_up.state_dict().items():
        assert key == "stem.conv1.weight" or torch.equal(value, state[key])

"""Building from a config: its keys in every error, and OmegaConf's configs as Detectron2's own."""

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone, build_model
from omegaconf import OmegaConf

from fpn_plugin import UserError, model_zoo

MASK = "mini/mask_rcnn_R_18_FPN.yaml"


def config(*opts: object, name: str = MASK) -> CfgNode:
    cfg = model_zoo.get_config(name)
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", 32, *opts])
    return cfg


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["FPN.IN_FEATURES", ["res3", "res5"]], r"^MODEL.FPN.IN_FEATURES \['res3', 'res5'\] have"),
        (["FPN.IN_FEATURES", []], "^MODEL.FPN.IN_FEATURES is empty"),
        (["FPN.IN_FEATURES", ["res2", "res6"]], "^MODEL.FPN.IN_FEATURES names 'res6'.*offers"),
        (["FPN.BOTTOM_UP", "build_resnt_backbone"], "did you mean build_resnet_backbone"),
        (["FPN.BOTTOM_UP", "build_fpn_backbone"], "^MODEL.FPN.BOTTOM_UP names the pyramid itself"),
        (["FPN.NORM", "GroupNorm"], "^MODEL.FPN.NORM 'GroupNorm' is no norm"),
        (["FPN.NORM", "GN", "FPN.OUT_CHANNELS", 48],
         "^MODEL.FPN.NORM 'GN' .* MODEL.FPN.OUT_CHANNELS must be a multiple of 32"),
        (["FPN.OUT_CHANNELS", 0, "FPN.TOP_BLOCK", "p6p7_c5"], "^MODEL.FPN.OUT_CHANNELS is 0"),
        (["FPN.FUSE_TYPE", "mean"], "^MODEL.FPN.FUSE_TYPE 'mean'"),
        (["FPN.TOP_BLOCK", "max"], "^MODEL.FPN.TOP_BLOCK 'max' .*did you mean maxpool"),
        (["FPN.TOP_DOWN", False, "FPN.LATERAL", False], "^MODEL.FPN.TOP_DOWN and MODEL.FPN.LATER"),
        (["FPN.OUT_FEATURES", ["p2"]], r"^MODEL.FPN.OUT_FEATURES .* set MODEL.FPN.TOP_BLOCK none"),
        (["ROI_BOX_HEAD.POOLER_TYPE", "Align"], "^MODEL.ROI_BOX_HEAD.POOLER_TYPE 'Align'"),
        (["ROI_MASK_HEAD.POOLER_RESOLUTION", 0], "^MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION is 0"),
        (["FPN.CANONICAL_BOX_SIZE", -1], "^MODEL.FPN.CANONICAL_BOX_SIZE is -1"),
        (["ROI_HEADS.IN_FEATURES", ["p2", "p4"]], "^MODEL.ROI_HEADS.IN_FEATURES .*not a pyramid"),
        (["ROI_HEADS.IN_FEATURES", ["p2", "p9"]], "'p9', which the backbone does not give"),
    ],
    ids=str,
)  # fmt: skip
def test_an_error_names_the_key(opts, message):
    keys = [f"MODEL.{key}" if i % 2 == 0 else key for i, key in enumerate(opts)]
    with pytest.raises(UserError, match=message) as error:
        build_model(config(*keys))
    assert "`" not in str(error.value)


def test_what_is_found_later_names_the_key_too():
    neck = build_backbone(config("MODEL.FPN.COARSEST_OUTPUT_CONV", True))
    with pytest.raises(UserError, match="or set MODEL.FPN.MATCH_LATERAL_SIZE True"):
        neck(torch.zeros(1, 3, 100, 64))
    for strict in (True, False):
        with pytest.raises(UserError, match="set MODEL.FPN.COARSEST_OUTPUT_CONV True"):
            build_backbone(config()).load_state_dict(neck.state_dict(), strict=strict)


@pytest.mark.parametrize(
    "opts",
    [
        [],
        ["MODEL.RPN.HEAD_NAME", "PerLevelRPNHead", "MODEL.ROI_HEADS.NAME", "FPNCascadeROIHeads",
         "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True],
        ["MODEL.FPN.BOTTOM_UP", "build_timm_backbone", "MODEL.TIMM.NAME", "resnet10t",
         "MODEL.TIMM.PRETRAINED", False, "MODEL.BACKBONE.FREEZE_AT", 2],
        ["MODEL.FPN.BOTTOM_UP", "build_torchvision_backbone", "MODEL.TORCHVISION.WEIGHTS", "",
         "MODEL.TORCHVISION.NAME", "mobilenet_v3_small"],
        ["MODEL.FPN.BOTTOM_UP", "build_regnetx_4gf_backbone",
         "MODEL.FPN.IN_FEATURES", ["s1", "s2", "s3", "s4"]],
        ["MODEL.BACKBONE.NAME", "build_timm_backbone", "MODEL.TIMM.NAME", "resnet10t",
         "MODEL.TIMM.PRETRAINED", False, "MODEL.RPN.IN_FEATURES", ["res4"],
         "MODEL.ROI_HEADS.IN_FEATURES", ["res4"], "MODEL.ANCHOR_GENERATOR.SIZES", [[32]]],
    ],
    ids=str,
)  # fmt: skip
def test_a_config_of_omegaconf_builds_the_same_model(opts):
    if "build_timm_backbone" in opts:
        pytest.importorskip("timm")
    cfg = config(*opts, "MODEL.ROI_BOX_HEAD.FC_DIM", 16)
    given = OmegaConf.create(cfg.dump())
    OmegaConf.set_readonly(given, True)
    models = []
    for each in (cfg, given):
        torch.manual_seed(0)
        models.append(build_model(each))
    (ours, theirs) = (model.state_dict() for model in models)
    assert list(ours) == list(theirs)
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    trained = [[n for n, p in m.named_parameters() if p.requires_grad] for m in models]
    assert trained[0] == trained[1]
    assert repr(models[0]) == repr(models[1])

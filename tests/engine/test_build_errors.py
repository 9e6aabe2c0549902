"""What Detectron2 only asserts on or looks up in vain, told with the key that mends it."""

import pytest
from detectron2.modeling.backbone import resnet

from fpn_plugin import UserError
from fpn_plugin.engine import load_config
from fpn_plugin.engine.build_errors import explained_build_errors
from fpn_plugin.engine.trainer import FPNTrainer

MINI = "mini/faster_rcnn_R_18_FPN.yaml"
CPU = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["MODEL.RESNETS.DEPTH", "19"], "MODEL.RESNETS.DEPTH is 19, .*known: 18, 34, 50, 101, 152"),
        (["MODEL.RESNETS.NORM", "BNN"],
         "MODEL.RESNETS.NORM is 'BNN', no norm of this Detectron2: did you mean BN"),
        (["MODEL.ROI_BOX_HEAD.NORM", "XX", "MODEL.ROI_BOX_HEAD.NUM_CONV", "1"],
         "MODEL.ROI_BOX_HEAD.NORM is 'XX', no norm of this Detectron2: known: BN"),
        (["MODEL.ROI_HEADS.NAME", "FPNROIHead"],
         "MODEL.ROI_HEADS.NAME names 'FPNROIHead', .*ROI_HEADS.*did you mean FPNROIHeads"),
        (["MODEL.BACKBONE.NAME", "build_fpn_backbon"],
         "MODEL.BACKBONE.NAME names 'build_fpn_backbon', .*did you mean build_fpn_backbone"),
        (["MODEL.ROI_HEADS.NAME", "Res5ROIHeads"],
         r"Res5ROIHeads pools from one map, .*IN_FEATURES names \['p2'.*it is FPNROIHeads"),
        (["MODEL.RPN.IN_FEATURES", "['p2', 'p9']"], "MODEL.RPN.IN_FEATURES names 'p9'"),
        (["MODEL.ROI_BOX_HEAD.USE_FED_LOSS", "True", "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", "True"],
         "USE_FED_LOSS needs the number of .* dataset 'mini_train' does not give"),
    ],
)  # fmt: skip
def test_the_key_is_named(opts, message):
    with pytest.raises(UserError, match=message):
        FPNTrainer.build_model(load_config(MINI, [*CPU, *opts]))


def test_without_the_compiled_part_the_key_of_deformable_convolutions_is_named(monkeypatch):
    class NotCompiled:  # what Detectron2 puts there; its release 0.6 has no maker of it
        def __init__(self, *args: object, **kwargs: object) -> None:
            raise ImportError("Cannot import 'detectron2._C', therefore 'DeformConv' is not there")

    monkeypatch.setattr(resnet, "DeformConv", NotCompiled)
    opts = ["MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.DEFORM_ON_PER_STAGE"]
    opts += ["[True, True, True, True]"]
    with pytest.raises(UserError, match="DEFORM_ON_PER_STAGE asks .* detectron2._C, cannot"):
        FPNTrainer.build_model(load_config(MINI, [*CPU, *opts]))


def test_an_assertion_without_words_is_told_by_its_code():
    told = pytest.raises(UserError, match="cannot build this model: assert 1 == 2")
    with told, explained_build_errors(load_config(MINI)):
        assert 1 == 2


def test_errors_of_other_kinds_stay_as_they_are():
    for error in (KeyError("nowhere"), ImportError("no module"), RuntimeError("a defect")):
        told = pytest.raises(type(error), match=str(error.args[0]))
        with told, explained_build_errors(load_config(MINI)):
            raise error

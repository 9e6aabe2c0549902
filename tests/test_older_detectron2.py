"""With Detectron2 0.6, emulated: what came after it is taken away from the installed one."""

import runpy
import sys

import pytest
import torch
import torch.distributed as dist
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.analysis import FlopCountAnalysis

from fpn_plugin import UserError, add_fpn_config, model_zoo
from fpn_plugin.engine import launch
from fpn_plugin.inspection import flops

NEWER_KEYS = [
    "FLOAT32_PRECISION",
    "DATALOADER.REPEAT_SQRT",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_FREQ_WEIGHT_POWER",
    "MODEL.ROI_BOX_HEAD.FED_LOSS_NUM_CLASSES",
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS",
    "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE",
    "SOLVER.BASE_LR_END",
    "SOLVER.NUM_DECAYS",
    "SOLVER.RESCALE_INTERVAL",
]


def test_no_config_needs_a_key_that_came_later():
    for name in model_zoo.names():
        cfg = get_cfg()
        for key in NEWER_KEYS:
            *nodes, last = key.split(".")
            node = cfg
            for each in nodes:
                node = node[each]
            node.pop(last, None)
        add_fpn_config(cfg)
        cfg.merge_from_file(model_zoo.get_config_file(name))


def test_flops_are_counted_where_detectron2s_analysis_does_not_import(monkeypatch):
    model = build_model(narrow("mini/faster_rcnn_R_18_FPN.yaml")).eval()
    maps = {f"p{k}": torch.zeros(1, 8, 64 // 2**k, 64 // 2**k) for k in range(2, 7)}
    monkeypatch.setitem(sys.modules, "detectron2.utils.analysis", None)
    older = runpy.run_path(flops.__file__)["FlopCountAnalysis"]
    assert older is not FlopCountAnalysis
    for part, given in (
        (model.backbone, torch.zeros(1, 3, 64, 64)),  # gives a dict
        (model.proposal_generator.rpn_head, list(maps.values())),
        (torch.nn.ModuleDict({"p2": torch.nn.Conv2d(8, 4, 3)})["p2"], maps["p2"]),
    ):
        expected = FlopCountAnalysis(part, (given,)).unsupported_ops_warnings(False)
        counted = older(part, (given,)).unsupported_ops_warnings(False)
        assert counted.total() == expected.total() > 0
        theirs, ours = expected.by_module(), counted.by_module()
        assert {k: v for k, v in ours.items() if v} == {k: v for k, v in theirs.items() if v}


def narrow(name: str):
    cfg = model_zoo.get_config(name)
    opts = ["MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", 8, "MODEL.ROI_BOX_HEAD.FC_DIM", 8]
    cfg.merge_from_list(opts)
    return cfg


def test_torchrun_is_refused_by_name(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(dist, "init_process_group", lambda **kwargs: None)
    monkeypatch.delattr(comm, "create_local_process_group")
    with pytest.raises(UserError, match="torchrun needs Detectron2 0.7 or later.*--num-gpus"):
        launch._join_torchrun(on_cpu=True)

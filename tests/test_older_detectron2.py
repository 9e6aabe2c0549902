"""Other Detectron2s, emulated: what 0.6 lacks is taken away from the installed one, and what its
main has got since is added.
"""

import math
import sys
from functools import partial

import pytest
import torch
from detectron2.config import get_cfg, instantiate
from detectron2.data import build
from detectron2.data.samplers import TrainingSampler
from detectron2.engine import (
    DefaultTrainer,
    HookBase,
    SimpleTrainer,
    TrainerBase,
    default_argument_parser,
)
from detectron2.layers import get_norm
from detectron2.modeling import build_model
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from fpn_plugin import UserError, add_fpn_config, model_zoo
from fpn_plugin.data import train_stream
from fpn_plugin.engine import launch
from fpn_plugin.engine.build_errors import explained_build_errors
from fpn_plugin.engine.nonfinite import NonFiniteCheck
from fpn_plugin.engine.trainer import FPNTrainer
from fpn_plugin.errors import NonFiniteError
from fpn_plugin.lazy import keys, model_node
from fpn_plugin.lazy import model as lazy_model
from fpn_plugin.lazy.training import dataloader_node, train_node
from fpn_plugin.mini import ensure_mini
from fpn_plugin.modeling import neck

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


def narrow(name: str):
    cfg = model_zoo.get_config(name)
    opts = ["MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", 8, "MODEL.ROI_BOX_HEAD.FC_DIM", 8]
    cfg.merge_from_list(opts)
    return cfg


@pytest.mark.parametrize(("on_cpu", "instead"), [(True, "train in one process"), (False, "start")])
def test_torchrun_is_refused_by_name(monkeypatch, on_cpu, instead):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda rank: None)
    monkeypatch.delattr(comm, "create_local_process_group")
    with pytest.raises(
        UserError, match=f"^torchrun needs Detectron2 0.7 or later; {instead}.* instead$"
    ):
        launch._join_torchrun(on_cpu)


def test_processes_on_the_cpu_are_refused_by_name(monkeypatch):
    monkeypatch.delattr(comm, "create_local_process_group")
    args = default_argument_parser().parse_args(["--num-gpus", "2"])
    expected = "^MODEL.DEVICE cpu with 2 processes needs Detectron2 0.7 .*; train in one process"
    with pytest.raises(UserError, match=expected):
        launch.launch(print, args, "cpu", ())
    args.num_gpus = 1
    launch.launch(args.__setattr__, args, "cpu", ("opts", ["ran"]))
    assert args.opts == ["ran"]


def test_a_loss_that_is_not_finite_is_found_without_after_backward(monkeypatch):
    monkeypatch.delattr(HookBase, "after_backward")
    monkeypatch.setattr(TrainerBase, "after_backward", lambda self: None)
    model = torch.nn.Linear(1, 1)
    model.forward = lambda batch: {"loss_cls": model.weight.sum() * batch[0]["value"]}
    batches = [[{"file_name": f"{i}.jpg", "value": [1.0, math.nan][i]}] for i in range(2)]
    trainer = SimpleTrainer(model, batches, torch.optim.SGD(model.parameters(), 0.1))
    trainer.register_hooks([NonFiniteCheck(model)])
    with pytest.raises(NonFiniteError, match="^iteration 1: loss_cls not finite .*batch: 1.jpg"):
        trainer.train(0, 2)


def without_layer_norm(norm, channels):
    """Detectron2 0.6's get_norm, which knows no LN."""
    if norm == "LN":
        raise KeyError("LN")
    return get_norm(norm, channels)


def test_a_norm_that_the_installed_detectron2_lacks_is_not_offered(monkeypatch):
    monkeypatch.setattr(neck, "get_norm", without_layer_norm)
    assert "LN" not in neck.known_norms()
    cfg = narrow("mini/faster_rcnn_R_18_FPN.yaml")
    cfg.MODEL.FPN.NORM = "LN"
    expected = "^MODEL.FPN.NORM 'LN' is no norm of this Detectron2: known: BN, FrozenBN, GN, [^L]*$"
    with pytest.raises(UserError, match=expected):
        build_model(cfg)
    cfg.MODEL.FPN.NORM, cfg.MODEL.RESNETS.NORM = "", "LN"
    monkeypatch.setattr("detectron2.modeling.backbone.resnet.get_norm", without_layer_norm)
    monkeypatch.setattr("detectron2.layers.wrappers.get_norm", without_layer_norm, raising=False)
    expected = r"^MODEL.RESNETS.NORM is 'LN', no norm of this Detectron2: known: BN, [^L]*$"
    with pytest.raises(UserError, match=expected), explained_build_errors(cfg):
        build_model(cfg)


def test_yacs_and_lazy_draw_one_seed_where_detectron2s_yacs_loader_takes_the_configs(monkeypatch):
    def newest(size: int, seed: int | None = None) -> TrainingSampler:
        of_yacs = sys._getframe(1).f_code.co_name == "_train_loader_from_config"
        return TrainingSampler(size, seed=7 if of_yacs else seed)

    monkeypatch.setattr(build, "TrainingSampler", newest)
    ensure_mini({"train": 6, "val": 4})
    cfg = model_zoo.get_config("mini/faster_rcnn_R_18_FPN.yaml")
    cfg.DATALOADER.NUM_WORKERS = 0
    seeds = []
    for make in (
        partial(FPNTrainer.build_train_loader, cfg),
        lambda: train_stream(instantiate(dataloader_node(cfg).train)),
        lambda: train_stream(DefaultTrainer.build_train_loader(cfg)),
    ):
        seed_all_rng(3)
        seeds.append(make().sampler._seed)
    assert seeds == [seeds[0], seeds[0], 7]


def test_the_precision_of_float32_is_carried_over():
    cfg = model_zoo.get_config("mini/faster_rcnn_R_18_FPN.yaml")
    cfg.pop("FLOAT32_PRECISION", None)
    assert "float32_precision" not in train_node(cfg)
    cfg.FLOAT32_PRECISION = "high"
    assert train_node(cfg).float32_precision == "high"


def test_a_key_that_detectron2_gets_some_day_is_named_by_the_lazy_form(monkeypatch):
    newest = get_cfg()
    newest.MODEL.RPN.SOME_DAY = 1
    monkeypatch.setattr(keys, "get_cfg", lambda: newest)
    monkeypatch.setattr(lazy_model, "get_cfg", newest.clone)
    assert keys.newer_keys.__wrapped__() == ("MODEL.RPN.SOME_DAY",)
    monkeypatch.setattr(lazy_model, "newer_keys", keys.newer_keys.__wrapped__)
    monkeypatch.setattr(lazy_model, "_unchanged", lazy_model._unchanged.__wrapped__)
    cfg = narrow("mini/faster_rcnn_R_18_FPN.yaml")
    cfg.MODEL.RPN.SOME_DAY = 1
    model_node(cfg)
    cfg.MODEL.RPN.SOME_DAY = 2
    with pytest.raises(UserError, match="^MODEL.RPN.SOME_DAY 2 has no lazy form here: leave it 1"):
        model_node(cfg)

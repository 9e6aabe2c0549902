"""Training steps in processes on the CPU, and SOLVER.AMP.DTYPE as far as it shows without a GPU."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from detectron2.layers import get_norm
from detectron2.utils import comm
from torch import nn

from fpn_plugin.engine.step_trainer import create_cpu_ddp_model, set_precision
from fpn_plugin.errors import UserError


def test_synchronised_norms_of_torch_are_refused(monkeypatch):
    model = nn.ModuleDict({"norm": get_norm("SyncBN", 4)})
    assert create_cpu_ddp_model(model) is model  # one process
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    with pytest.raises(UserError, match="norm is a SyncBN, which torch runs only on GPUs") as told:
        create_cpu_ddp_model(model)
    assert "2 processes on the CPU" in str(told.value) and "\n" not in str(told.value)
    monkeypatch.setattr(comm, "get_world_size", lambda: 1)
    for norm in ("naiveSyncBN", "BN"):
        model = nn.ModuleDict({"norm": get_norm(norm, 4)})
        assert create_cpu_ddp_model(model) is model


def trainer():
    return SimpleNamespace(precision=torch.float16)


def test_bfloat16_has_no_loss_scale_and_float16_begins_one_anew(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    brain, half = trainer(), trainer()
    set_precision(brain, "bfloat16", "SOLVER.AMP.DTYPE")
    set_precision(half, "float16", "SOLVER.AMP.DTYPE")
    assert (brain.precision, half.precision) == (torch.bfloat16, torch.float16)
    assert not brain.grad_scaler.is_enabled() and half.grad_scaler.is_enabled()
    before = half.grad_scaler.state_dict()
    half.grad_scaler.load_state_dict(brain.grad_scaler.state_dict())
    assert half.grad_scaler.state_dict() == before
    half.grad_scaler.load_state_dict(before | {"scale": 8.0})
    assert half.grad_scaler.state_dict()["scale"] == 8.0


def test_another_dtype_is_refused_by_its_key():
    with pytest.raises(UserError, match=r"SOLVER.AMP.DTYPE is 'bfloat61': did you mean bfloat16"):
        set_precision(trainer(), "bfloat61", "SOLVER.AMP.DTYPE")
    with pytest.raises(UserError, match="this Detectron2 trains only in float16"):
        set_precision(SimpleNamespace(), "bfloat16", "SOLVER.AMP.DTYPE")

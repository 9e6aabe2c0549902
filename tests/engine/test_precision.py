"""SOLVER.AMP.DTYPE, as far as it shows without a GPU."""

from types import SimpleNamespace

import pytest
import torch

from fpn_plugin.engine.precision import settle_precision
from fpn_plugin.errors import UserError


def trainer():
    return SimpleNamespace(precision=torch.float16)


def test_bfloat16_has_no_loss_scale_and_float16_begins_one_anew(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    brain, half = trainer(), trainer()
    settle_precision(brain, "bfloat16", "SOLVER.AMP.DTYPE")
    settle_precision(half, "float16", "SOLVER.AMP.DTYPE")
    assert (brain.precision, half.precision) == (torch.bfloat16, torch.float16)
    assert not brain.grad_scaler.is_enabled() and half.grad_scaler.is_enabled()
    before = half.grad_scaler.state_dict()
    half.grad_scaler.load_state_dict(brain.grad_scaler.state_dict())
    assert half.grad_scaler.state_dict() == before
    half.grad_scaler.load_state_dict(before | {"scale": 8.0})
    assert half.grad_scaler.state_dict()["scale"] == 8.0


def test_another_dtype_is_refused_by_its_key():
    with pytest.raises(UserError, match=r"SOLVER.AMP.DTYPE is 'bfloat61': did you mean bfloat16"):
        settle_precision(trainer(), "bfloat61", "SOLVER.AMP.DTYPE")
    with pytest.raises(UserError, match="this Detectron2 trains in float16 alone"):
        settle_precision(SimpleNamespace(), "bfloat16", "SOLVER.AMP.DTYPE")

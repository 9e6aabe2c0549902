"""Which models are trained in several processes on the CPU."""

import pytest
import torch.distributed as dist
from detectron2.layers import get_norm
from detectron2.utils import comm
from torch import nn

from fpn_plugin.engine.cpu_ddp import create_cpu_ddp_model
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

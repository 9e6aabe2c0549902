"""What mixed precision computes in: float16, as Detectron2 has it, or bfloat16."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.engine import AMPTrainer
from torch.amp import GradScaler

from fpn_plugin.errors import UserError, near_names

__all__ = ["settle_precision"]

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def settle_precision(trainer: AMPTrainer, name: str, key: str) -> None:
    """Makes a trainer compute in a dtype; in bfloat16, whose range is float32's, without scaling
    the loss.

    Args:
        trainer: changed in place.
        name: "float16" or "bfloat16".
        key: the config key that has it, for messages.

    Raises:
        UserError: it is neither, or Detectron2 or the GPU are too old for it.
    """
    if name not in _DTYPES:
        raise UserError(f"{key} is {name!r}: {near_names(str(name), _DTYPES)}")
    if name == "bfloat16":
        if not hasattr(trainer, "precision"):
            raise UserError(f"{key} is 'bfloat16': this Detectron2 trains in float16 alone")
        if torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
            raise UserError(f"{key} is 'bfloat16', which {torch.cuda.get_device_name()} lacks")
    trainer.precision = _DTYPES[name]
    trainer.grad_scaler = _LossScale("cuda", enabled=name == "float16")


class _LossScale(GradScaler):
    """GradScaler that begins anew after a training in bfloat16, which leaves no scale."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            super().load_state_dict(state_dict)

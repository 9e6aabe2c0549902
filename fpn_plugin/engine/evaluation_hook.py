"""When a training evaluates, and with which weights, where several processes do it together."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from detectron2.engine.hooks import EvalHook
from detectron2.utils import comm
from torch import nn

__all__ = ["JointEvalHook", "share_buffers"]


def share_buffers(model: nn.Module) -> None:
    """Gives every process the main process's buffers: those that its checkpoints hold.

    Statistics of batch normalisation that is not frozen are each process's own (Detectron2 trains
    with ``broadcast_buffers=False``), so each would evaluate its images with another model.

    Args:
        model: changed in place, in every process; all must call it.
    """
    if comm.get_world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


class JointEvalHook(EvalHook):
    """Detectron2's EvalHook for several processes.

    All evaluate the model that a checkpoint would hold, see :func:`share_buffers`. After an
    iteration that failed nothing is evaluated: Detectron2's hook does so in the last iteration,
    even in a single process that failed, and each process then waits for the others.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._finished = True

    def before_step(self) -> None:
        """Notes that an iteration has begun."""
        self._finished = False

    def after_step(self) -> None:
        """Evaluates where the period says so."""
        self._finished = True
        super().after_step()

    def after_train(self) -> None:
        """Evaluates when all iterations are done."""
        if self._finished:
            super().after_train()

    def _do_eval(self) -> None:
        share_buffers(self.trainer.model)
        super()._do_eval()

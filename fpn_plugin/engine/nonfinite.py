"""Hooks that stop a training at NaN or infinite numbers, and say where they come from."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from fpn_plugin.errors import NonFiniteError, one_line

__all__ = ["NonFiniteCheck", "SkippedSteps"]

# GradScaler begins with a loss scale of 2^16, and after so many halvings it is 2^-16.
_MOST_SKIPPED_IN_A_ROW = 32


class NonFiniteCheck(HookBase):
    """Stops a training at the first loss that is NaN or infinite, before weights are changed.

    Every process looks at its own losses, so the error names the files of the batch that gave
    them. Gradients are averaged over processes by then, so if one process stops, all do. The hook
    belongs to the trainer that runs the step: a DefaultTrainer's ``_trainer``. It reads losses
    after the backward pass, where Detectron2 reads them too, and so adds no wait in one process.

    Args:
        model: the one trained; returns a dict of losses.
        remedy: what to resume with after a run diverged, by the keys of its config.
    """

    def __init__(self, model: nn.Module, remedy: str = "a lower learning rate") -> None:
        self._remedy = remedy
        self._names: list[str] = []
        self._losses: dict[str, Tensor] = {}
        model.register_forward_pre_hook(self._keep_names)
        model.register_forward_hook(self._keep_losses)

    def after_backward(self) -> None:
        """Checks the losses.

        Raises:
            NonFiniteError: one is NaN or infinite in some process; in every process, the message
                names it, the iteration and the files of that batch.
        """
        if not self._losses:
            return
        each = torch.stack([loss.float() for loss in self._losses.values()])
        losses = dict(zip(self._losses, each.tolist(), strict=True))
        bad = [name for name, value in losses.items() if not math.isfinite(value)]
        if not _in_any_process(bool(bad), each.device):
            return
        values = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        where = f" in process {comm.get_rank()}" if comm.get_world_size() > 1 else ""
        own = self._message(f"{' and '.join(bad)} not finite{where} ({values})") if bad else ""
        # Every process reports it: launchers end the others when the first of them ends.
        raise NonFiniteError(next(filter(None, comm.all_gather(own))))

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Within it, any FloatingPointError becomes a NonFiniteError that names the batch."""
        try:
            yield
        except FloatingPointError as error:
            if str(error).startswith("iteration "):
                raise
            raise NonFiniteError(self._message(one_line(error))) from error

    def _message(self, what: str) -> str:
        return (
            f"iteration {self.trainer.iter}: {what}; batch: {', '.join(self._names)}. Either the "
            "annotations of these images are broken, or training diverged: continue from the last "
            f"checkpoint by the same command with --resume and {self._remedy}"
        )

    def _keep_names(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if module.training:
            self._names = [str(record.get("file_name", "?")) for record in inputs[0]]
            self._losses = {}

    def _keep_losses(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if module.training and isinstance(output, dict):
            self._losses = {name: loss.detach() for name, loss in output.items()}
            if not hasattr(HookBase, "after_backward"):  # Detectron2 0.6
                self.after_backward()


def _in_any_process(bad: bool, device: torch.device) -> bool:
    """Whether ``bad`` is true in any process; all must call it, with a device of their backend."""
    if comm.get_world_size() == 1:
        return bad
    flag = torch.tensor(float(bad), device=device)
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)
    return bool(flag)


class SkippedSteps(HookBase):
    """Counts the steps that mixed precision skips because gradients overflowed.

    GradScaler then halves the loss scale and reports nothing. The count is the scalar
    ``skipped_steps`` of metrics.json, and each skipped step is logged.

    Args:
        optimizer: the one trained with.
        scaler: of the trainer.
    """

    def __init__(self, optimizer: Optimizer, scaler: GradScaler) -> None:
        self._scaler = scaler
        self._stepped = False
        self._in_a_row = 0
        self.skipped = 0
        optimizer.register_step_post_hook(self._step)

    def _step(self, *_: Any) -> None:
        self._stepped = True

    def before_step(self) -> None:
        """Notes that an iteration has begun."""
        self._stepped = False

    def after_step(self) -> None:
        """Counts it if the optimizer did not step.

        Raises:
            NonFiniteError: the last 32 steps were all skipped.
        """
        self._in_a_row = 0 if self._stepped else self._in_a_row + 1
        if not self._stepped:
            self.skipped += 1
            logging.getLogger(__name__).warning(
                "iteration %d: gradients overflowed, step skipped (%d so far); loss scale now %g",
                self.trainer.iter,
                self.skipped,
                self._scaler.get_scale(),
            )
        self.trainer.storage.put_scalar("skipped_steps", self.skipped, smoothing_hint=False)
        if self._in_a_row >= _MOST_SKIPPED_IN_A_ROW:
            raise NonFiniteError(
                f"iteration {self.trainer.iter}: gradients were not finite in each of the last "
                f"{self._in_a_row} iterations, whatever the loss scale (now "
                f"{self._scaler.get_scale():g}); train with SOLVER.AMP.ENABLED False to see why"
            )

    def state_dict(self) -> dict[str, Any]:
        """The count."""
        return {"skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues the count."""
        self.skipped = state["skipped"]

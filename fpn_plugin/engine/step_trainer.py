"""Detectron2's trainer of single steps, in a precision, and in several processes on the CPU."""

# No annotations as text here: torch reads those of _mean_in_order_of_ranks.
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import AMPTrainer, SimpleTrainer
from detectron2.engine.defaults import create_ddp_model
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.futures import Future
from torch.optim import Optimizer

from fpn_plugin.errors import UserError, near_names

from .run_config import RunConfig

__all__ = ["create_cpu_ddp_model", "set_precision", "step_trainer"]

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def step_trainer(
    model: nn.Module, loader: Any, optimizer: Optimizer, config: RunConfig, **ddp: Any
) -> SimpleTrainer:
    """Detectron2's trainer of single steps, in the precision that the config names.

    Args:
        model: wrapped for distributed training if there are several processes.
        loader: gives the batches.
        optimizer: of the model's parameters.
        config: of the run.
        ddp: arguments of Detectron2's ``create_ddp_model``.

    Raises:
        UserError: the device or this Detectron2 cannot train in that precision.
    """
    config.check_mixed_precision()
    wrap = create_ddp_model if config["device"].startswith("cuda") else create_cpu_ddp_model
    model = wrap(model, **ddp)
    if not config["amp"]:
        return SimpleTrainer(model, loader, optimizer)
    trainer = AMPTrainer(model, loader, optimizer)
    set_precision(trainer, config["amp_dtype"], config.key("amp_dtype"))
    return trainer


def set_precision(trainer: AMPTrainer, name: str, key: str) -> None:
    """Sets the dtype that a trainer computes in; bfloat16 has float32's range and no loss scale.

    Args:
        trainer: changed in place.
        name: "float16" or "bfloat16".
        key: its config key, for messages.

    Raises:
        UserError: it is neither, or Detectron2 or the GPU do not have it.
    """
    if name not in _DTYPES:
        raise UserError(f"{key} is {name!r}: {near_names(str(name), _DTYPES)}")
    if name == "bfloat16":
        if not hasattr(trainer, "precision"):
            raise UserError(f"{key} is 'bfloat16': this Detectron2 trains only in float16")
        if torch.cuda.is_available() and not torch.cuda.is_bf16_supported():
            raise UserError(f"{key} is 'bfloat16', which {torch.cuda.get_device_name()} lacks")
    trainer.precision = _DTYPES[name]
    trainer.grad_scaler = _LossScale("cuda", enabled=name == "float16")


class _LossScale(GradScaler):
    """GradScaler that starts anew after a training in bfloat16, which leaves no scale."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            super().load_state_dict(state_dict)


def create_cpu_ddp_model(model: nn.Module, **kwargs: Any) -> nn.Module:
    """Wraps a model on the CPU for distributed training, as Detectron2 does those on GPUs.

    DDP sends gradients in buckets, and sorts the buckets again after the first iteration. gloo sums
    around a ring, and begins each part of a bucket at another process. So with three processes or
    more, the place in the bucket decides the order of summation, and with it the bits. A resumed
    run, whose first iteration has the first buckets, would differ from the uncut one. Here,
    processes send each other their gradients, and all sum them in the order of ranks.

    Args:
        model: returned as it is if there is one process.
        kwargs: of Detectron2's ``create_ddp_model``. ``fp16_compression`` has its own way to send
            gradients, and keeps it.

    Raises:
        UserError: the model has torch's synchronised batch norms, which run only on GPUs.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        for name, module in model.named_modules():
            if isinstance(module, nn.SyncBatchNorm):
                raise UserError(
                    f"{name} is a SyncBN, which torch runs only on GPUs, and this training has "
                    f"{dist.get_world_size()} processes on the CPU: set the key that says SyncBN, "
                    "such as MODEL.RESNETS.NORM, to naiveSyncBN, which Detectron2 runs on both"
                )
    wrapped = create_ddp_model(model, **{**kwargs, "device_ids": None})
    if wrapped is not model and dist.get_world_size() > 2 and not kwargs.get("fp16_compression"):
        wrapped.register_comm_hook(None, _mean_in_order_of_ranks)
    return wrapped


def _mean_in_order_of_ranks(_: object, bucket: dist.GradBucket) -> Future[Tensor]:
    own = bucket.buffer()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    # Waits here: a callback would run in one of gloo's threads, which must not need Python when the
    # process ends.
    dist.all_gather(parts, own)
    total = parts[0]
    for part in parts[1:]:
        total += part
    done: Future[Tensor] = Future()
    done.set_result(total.div_(len(parts)))
    return done

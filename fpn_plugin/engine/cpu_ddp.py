"""Distributed training on the CPU: gradients whose bits do not hang on how they were sent."""

from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine.defaults import create_ddp_model
from torch import Tensor, nn
from torch.futures import Future

from fpn_plugin.errors import UserError

__all__ = ["create_cpu_ddp_model", "distributed_model"]


def distributed_model(model: nn.Module, device: str, **kwargs: Any) -> nn.Module:
    """Wraps a model for distributed training on its device; see Detectron2's ``create_ddp_model``.

    Args:
        model: returned as it is if there is one process.
        device: of the model.
        kwargs: see :func:`create_cpu_ddp_model`.
    """
    wrap = create_ddp_model if device.startswith("cuda") else create_cpu_ddp_model
    return wrap(model, **kwargs)


def create_cpu_ddp_model(model: nn.Module, **kwargs: Any) -> nn.Module:
    """Wraps a model on the CPU for distributed training, as Detectron2 does those on GPUs.

    DDP sends gradients in buckets, which it sorts anew after the first iteration. gloo sums each
    part of a bucket around a ring, from another process on: with three processes or more the
    order of summation, and so the bits, are those of the place in the bucket. A resumed run, whose
    first iteration has the first buckets, would not be the uncut one. So processes give each other
    their gradients, and all sum them in the order of ranks.

    Args:
        model: returned as it is if there is one process.
        kwargs: of Detectron2's ``create_ddp_model``: those of
            :class:`torch.nn.parallel.DistributedDataParallel`, and ``fp16_compression``, which
            has a way of its own to send gradients and is left as it is.

    Raises:
        UserError: torch's synchronised batch norms, which run on GPUs only, are in the model.
    """
    if dist.is_initialized() and dist.get_world_size() > 1:
        for name, module in model.named_modules():
            if isinstance(module, nn.SyncBatchNorm):
                raise UserError(
                    f"{name} is a SyncBN, which torch runs only on GPUs, and this training has "
                    f"{dist.get_world_size()} processes on the CPU: set the key that says SyncBN, "
                    "as MODEL.RESNETS.NORM, to naiveSyncBN, Detectron2's own, which runs on both"
                )
    wrapped = create_ddp_model(model, **{**kwargs, "device_ids": None})
    if wrapped is not model and dist.get_world_size() > 2 and not kwargs.get("fp16_compression"):
        wrapped.register_comm_hook(None, _mean_in_order_of_ranks)
    return wrapped


def _mean_in_order_of_ranks(_: object, bucket: dist.GradBucket) -> Future[Tensor]:
    own = bucket.buffer()
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    # Waited for here: a callback would run in a thread of gloo's, which must not need Python
    # when the process ends.
    dist.all_gather(parts, own)
    total = parts[0]
    for part in parts[1:]:
        total += part
    done: Future[Tensor] = Future()
    done.set_result(total.div_(len(parts)))
    return done

"""Yacs configs, from a file and command-line options, with errors that a user can act on."""

from __future__ import annotations

import functools
import operator
import os
import re
import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg

from fpn_plugin import model_zoo
from fpn_plugin.config import add_fpn_config, flat_keys
from fpn_plugin.errors import UserError, near_names

from .config_files import check_config_file

__all__ = [
    "check_mixed_precision",
    "check_number",
    "check_seed",
    "config_on_device",
    "find_config_file",
    "load_config",
    "settled_device",
]

_LARGEST_SEED = 2**32 - 2**10  # numpy takes 32 bits, and each process adds its rank


def find_config_file(name: str) -> str:
    """Path of a config: a path as it is or, failing that, the packaged config of that name.

    Raises:
        UserError: there is neither; says which packaged configs have near names.
    """
    if Path(name).is_file():
        return name
    # "configs/mini/x.yaml" means the packaged one as well when it is typed outside a checkout.
    packaged = name.removeprefix("./").removeprefix("configs/")
    if packaged in model_zoo.names():
        return model_zoo.get_config_file(packaged)
    raise UserError(
        f"no config file {name!r}, neither as a path nor in the package: "
        f"{near_names(packaged, model_zoo.names())}"
    )


def load_config(config_file: str = "", opts: Sequence[str] = ()) -> CfgNode:
    """Detectron2's defaults, the plugin's keys, a config file and options, in this order.

    Args:
        config_file: see :func:`find_config_file`; "" for none.
        opts: ``["KEY", "value", ...]`` as typed on a command line.

    Returns:
        The config, not frozen.

    Raises:
        UserError: a key that does not exist, with near ones; a value of another type than the
            key's, or NaN; a file that is not there or not a config.
    """
    cfg = get_cfg()
    add_fpn_config(cfg)
    if config_file:
        path = find_config_file(config_file)
        if path.endswith(".py"):
            raise UserError(
                f"{path} is Python, which is not run here: YAML is expected; lazy configs are for "
                "fpn-plugin train"
            )
        check_config_file(path)
        try:
            # Tags that would run code while a file is read are refused.
            cfg.merge_from_file(path, allow_unsafe=False)
        except (KeyError, ValueError, TypeError, AttributeError, AssertionError) as error:
            raise UserError(f"{path}: {_explain(error, cfg)}") from error
        _refuse_nan(cfg, f"{path}: ")
    _check_opts(cfg, opts)
    try:
        cfg.merge_from_list(list(opts))
    except (KeyError, ValueError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(_explain(error, cfg)) from error
    _refuse_nan(cfg, "")
    _device_kind(cfg.MODEL.DEVICE, "MODEL.DEVICE")
    return cfg


def check_seed(key: str, seed: Any) -> None:
    """Refuses a seed that no generator takes; see :func:`check_number`."""
    check_number(key, seed, -sys.maxsize, _LARGEST_SEED)


def check_number(key: str, value: Any, least: int, most: int = sys.maxsize) -> None:
    """Refuses a number that is out of its range.

    Args:
        key: the config key, for the message.
        value: the config's.
        least: smallest that is allowed.
        most: largest that is allowed.

    Raises:
        UserError: it is, or it is NaN or no number at all.
    """
    # NaN is in no range.
    if type(value) not in (int, float) or not least <= value <= most:
        at_least = "" if least == -sys.maxsize else f", {least} or more"
        at_most = "" if most == sys.maxsize else f", {most} at most"
        raise UserError(f"{key} is {value}, expected a number{at_least}{at_most}")


def config_on_device(name: str, opts: Sequence[str], num_gpus: int = 1) -> CfgNode:
    """A config by :func:`load_config`, on the CPU if there is no GPU and none was asked for.

    Args:
        name: see :func:`load_config`.
        opts: likewise. MODEL.DEVICE asks for a device only here: the config file that a run leaves
            behind holds every key.
        num_gpus: processes asked for on this machine.

    Raises:
        UserError: see :func:`load_config`; or GPUs were asked for and are not there.
    """
    cfg = load_config(name, opts)
    named = "MODEL.DEVICE" in opts[::2]
    cfg.MODEL.DEVICE = settled_device(cfg.MODEL.DEVICE, named, num_gpus, "MODEL.DEVICE")
    return cfg


def settled_device(device: str, named: bool, num_gpus: int, key: str) -> str:
    """The device, or "cpu" if it is a GPU that is not there and the user did not ask for one.

    Args:
        device: as the config has it.
        named: whether the command line named it.
        num_gpus: processes asked for on this machine.
        key: the config key that names the device, for messages.

    Raises:
        UserError: GPUs were asked for and are not there, or it is no device that a model runs on.
    """
    kind = _device_kind(device, key)
    if kind == "cpu":
        return kind
    if kind != "cuda":
        try:
            torch.zeros(1, device=device).cpu()
        except (RuntimeError, AssertionError) as error:  # torch has one kind for each device
            raise UserError(
                f"{key} is {device!r}, which this machine or this torch does not have; {key} cpu "
                "runs on the CPU"
            ) from error
        return device
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if (torch.device(device).index or 0) < there >= num_gpus:
        return device
    if there or named or num_gpus > 1:
        asked = f"--num-gpus {num_gpus}" if num_gpus > 1 else f"{key} {device}"
        raise UserError(
            f"{asked} asks for more GPUs than the {there} found here; {key} cpu runs "
            f"{'as many processes' if num_gpus > 1 else 'it'} on the CPU"
        )
    if os.environ.get("RANK", "0") == "0":  # torchrun starts many
        print("no GPU found: running on the CPU", flush=True)
    return "cpu"


def _device_kind(device: str, key: str) -> str:
    """What a device is, as "cuda"; refuses what torch knows no device for."""
    try:
        return torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{key} is {device!r}, expected cpu, cuda or cuda:1") from error


def check_mixed_precision(enabled: bool, device: str, key: str) -> None:
    """Refuses mixed precision where Detectron2's trainer has none.

    Args:
        enabled: the config's.
        device: the model's.
        key: the config's key, for the message.

    Raises:
        UserError: it is enabled and the device no GPU.
    """
    if enabled and not device.startswith("cuda"):
        raise UserError(f"{key} is True: mixed precision trains on a GPU, not on {device!r}")


def _refuse_nan(cfg: CfgNode, where: str) -> None:
    for key, value in cfg.items():
        if isinstance(value, CfgNode):
            _refuse_nan(value, f"{where}{key}.")
        elif any(v != v for v in (value if isinstance(value, list | tuple) else (value,))):
            raise UserError(f"{where}{key} is {value}: NaN is no number to compute with")


def _node(cfg: CfgNode, key: str) -> Any:
    return functools.reduce(operator.getitem, key.split("."), cfg)


def _check_opts(cfg: CfgNode, opts: Sequence[str]) -> None:
    known = set(flat_keys(cfg))
    for flag in opts:
        if flag.startswith("--"):
            raise UserError(f"{flag} stands among config options: give it before KEY VALUE pairs")
    for key, value in zip_longest(opts[::2], opts[1::2]):
        if key not in known:
            raise UserError(f"no config key {key!r}: {near_names(key, known)}")
        if value is None or (value in known and not isinstance(_node(cfg, value), CfgNode)):
            raise UserError(f"config key {key!r} has no value; give pairs: KEY VALUE")


def _explain(error: Exception, cfg: CfgNode) -> str:
    """What yacs or Detectron2 meant, with near keys where a key does not exist."""
    reason = " ".join(str(error.args[0] if error.args else error).split())
    unknown = re.match(r"Non-existent config key: (\S+)", reason)
    if unknown:
        key = unknown.group(1)
        return f"no config key {key!r}: {near_names(key, flat_keys(cfg))}"
    if reason.startswith("Type mismatch") and "'tuple'" in reason.partition(" with ")[0]:
        reason += "; a tuple is written (value,)"
    return reason or f"not a config ({type(error).__name__})"

"""Yacs configs, from a file and command-line options, with errors that a user can act on."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg

from fpn_plugin import model_zoo
from fpn_plugin.config import add_fpn_config, flat_keys, value_at
from fpn_plugin.errors import UserError, near_names

from .config_files import check_config_file

__all__ = ["config_on_device", "find_config_file", "load_config", "settled_device"]


def find_config_file(name: str) -> str:
    """Path of a config: the path that is given or, if no file is there, the packaged config.

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
        config_file: a path or the name of a packaged config; "" for none.
        opts: ``["KEY", "value", ...]`` as typed on a command line.

    Returns:
        The config, not frozen.

    Raises:
        UserError: a key does not exist, with near ones; a value is NaN or of another type than
            the key's; a file does not exist or is not a config.
    """
    cfg = get_cfg()
    add_fpn_config(cfg)
    if config_file:
        path = find_config_file(config_file)
        if path.endswith(".py"):
            raise UserError(
                f"{path} is Python, which is not run here: expected YAML; only fpn-plugin train "
                "and evaluate take lazy configs"
            )
        check_config_file(path)
        with _explained_merge(cfg, f"{path}: "):
            # allow_unsafe would run code that the file's tags name.
            cfg.merge_from_file(path, allow_unsafe=False)
    _check_opts(cfg, opts)
    with _explained_merge(cfg, ""):
        cfg.merge_from_list(list(opts))
    _device_kind(cfg.MODEL.DEVICE, "MODEL.DEVICE")
    return cfg


@contextmanager
def _explained_merge(cfg: CfgNode, where: str) -> Iterator[None]:
    """Within it, values are merged into a config; those that do not fit are reported."""
    try:
        yield
    except (KeyError, ValueError, TypeError, AttributeError, AssertionError) as error:
        reason = " ".join(str(error.args[0] if error.args else error).split())
        unknown = re.match(r"Non-existent config key: (\S+)", reason)
        if unknown:
            key = unknown.group(1)
            reason = f"no config key {key!r}: {near_names(key, flat_keys(cfg))}"
        elif reason.startswith("Type mismatch") and "'tuple'" in reason.partition(" with ")[0]:
            reason += "; a tuple is written (value,)"
        raise UserError(f"{where}{reason or f'not a config ({type(error).__name__})'}") from error
    for key in flat_keys(cfg):
        value = value_at(cfg, key)
        if any(v != v for v in (value if isinstance(value, list | tuple) else (value,))):
            raise UserError(f"{where}{key} is {value}: expected numbers, not NaN")


def _check_opts(cfg: CfgNode, opts: Sequence[str]) -> None:
    known = set(flat_keys(cfg))
    for flag in opts:
        if flag.startswith("--"):
            raise UserError(f"{flag} is among the config options: give it before KEY VALUE pairs")
    for key, value in zip_longest(opts[::2], opts[1::2]):
        if key not in known:
            raise UserError(f"no config key {key!r}: {near_names(key, known)}")
        if value is None or (value in known and not isinstance(value_at(cfg, value), CfgNode)):
            raise UserError(f"config key {key!r} has no value; give pairs: KEY VALUE")


def config_on_device(name: str, opts: Sequence[str], num_gpus: int = 1) -> CfgNode:
    """A config by :func:`load_config`, on the CPU if there is no GPU and none was asked for.

    Args:
        name: see :func:`load_config`.
        opts: likewise. Only MODEL.DEVICE here asks for a device, not the config file's: the file
            that a run leaves behind holds every key.
        num_gpus: processes asked for on this machine.

    Raises:
        UserError: see :func:`load_config` and :func:`settled_device`.
    """
    cfg = load_config(name, opts)
    named = "MODEL.DEVICE" in opts[::2]
    cfg.MODEL.DEVICE = settled_device(cfg.MODEL.DEVICE, named, num_gpus, "MODEL.DEVICE")
    return cfg


def settled_device(device: str, named: bool, num_gpus: int, key: str) -> str:
    """The device, or "cpu" if it is a GPU that does not exist and the user did not ask for one.

    Args:
        device: the config's.
        named: whether the command line names it.
        num_gpus: processes asked for on this machine.
        key: the config key that names the device, for messages.

    Raises:
        UserError: more GPUs are asked for than exist, or models cannot run on the device.
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
    """The kind of a device, such as "cuda"."""
    try:
        return torch.device(device).type
    except (RuntimeError, TypeError) as error:
        raise UserError(f"{key} is {device!r}, expected cpu, cuda or cuda:1") from error

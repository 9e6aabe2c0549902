"""Checks of lazy configs: arguments that nothing takes, overrides of keys that do not exist."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.utils.registry import locate
from omegaconf import DictConfig, OmegaConf

from fpn_plugin.errors import UserError, near_names

__all__ = ["check_arguments", "check_override_keys", "check_override_types"]


def check_arguments(cfg: DictConfig, prefix: str = "") -> None:
    """Refuses arguments that a node's class or function does not take.

    Args:
        cfg: a lazy config, or a node of one.
        prefix: key of the node, for messages.

    Raises:
        UserError: an argument is unknown, or a ``_target_`` does not exist.
    """
    if OmegaConf.is_list(cfg):
        for i in range(len(cfg)):
            check_arguments(cfg._get_node(i), f"{prefix}.{i}")
    if not OmegaConf.is_dict(cfg) or cfg._is_none() or cfg._is_interpolation():
        return
    taken = _arguments(_target(cfg, prefix)) if "_target_" in cfg else None
    for key in cfg:
        path = f"{prefix}.{key}".lstrip(".")
        if taken is not None and key != "_target_" and key not in taken:
            raise UserError(
                f"{path} is no argument of {_target(cfg, prefix).__name__}: "
                f"{near_names(str(key), taken)}"
            )
        check_arguments(cfg._get_node(key), path)


def check_override_keys(cfg: DictConfig, overrides: Sequence[str]) -> None:
    """Refuses overrides of keys that do not exist. Nodes with a ``_target_`` may get arguments.

    Args:
        cfg: the config before the overrides.
        overrides: ``["train.max_iter=100", ...]``; ``+train.mine=1`` adds a key.

    Raises:
        UserError: there is no such key; names those that are near.
    """
    for override in overrides:
        node, (key, _, value) = cfg, override.partition("=")
        for part in key.lstrip("+~").replace("[", ".").replace("]", "").split("."):
            # check_arguments() checks the arguments that a node does not have yet.
            if not OmegaConf.is_dict(node) or "_target_" in node or key.startswith(("+", "~")):
                break
            if part not in node:
                raise UserError(
                    f"{key}: the config has no {part!r} there: {near_names(part, map(str, node))} "
                    f"To add one: +{key}={value}"
                )
            node = node[part]


def check_override_types(before: DictConfig, after: DictConfig, overrides: Sequence[str]) -> None:
    """Refuses text in place of a number, a number in place of a bool, and either for a node.

    Args:
        before: the config before the overrides.
        after: the config after them.
        overrides: those of :func:`check_override_keys`.

    Raises:
        UserError: a type has changed so; gives the earlier value.
    """
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        old, new = (OmegaConf.select(cfg, key) for cfg in (before, after))
        if isinstance(old, bool):
            expected, fits = "True or False", new in (True, False)
        elif isinstance(old, int | float):
            expected, fits = "a number", not isinstance(new, str | bool)
        elif OmegaConf.is_dict(old):
            expected, fits = "a node", not isinstance(new, str | int | float)
        else:
            continue
        if new is not None and not fits:
            was = f", as {old!r} was" if not OmegaConf.is_config(old) else ""
            raise UserError(f"{override}: {key} takes {expected}{was}; given was {new!r}")


def _target(node: DictConfig, path: str) -> Callable[..., Any]:
    target = node["_target_"]
    try:
        return locate(target) if isinstance(target, str) else target
    except ImportError as error:
        message = " ".join(str(error).split())
        raise UserError(f"{path}._target_ {target!r} does not exist: {message}") from error


def _arguments(target: Callable[..., Any]) -> set[str] | None:
    """Names of the arguments of a class or function; None if it takes any."""
    # What a class passes on with **kwargs, its next base takes.
    makers = [target]
    if inspect.isclass(target):
        makers = [base.__init__ for base in target.__mro__ if "__init__" in vars(base)]
    names: set[str] = set()
    for maker in makers or [target]:
        try:
            parameters = inspect.signature(maker).parameters.values()
        except ValueError:  # not written in Python
            return None
        names |= {p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
        if all(p.kind is not p.VAR_KEYWORD for p in parameters):
            return names - {"self"}
    return None

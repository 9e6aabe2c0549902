"""The keys of a config that changed since a checkpoint, and what a resumed run does with each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from detectron2.config import CfgNode
from detectron2.utils import comm
from omegaconf import DictConfig, OmegaConf

from fpn_plugin.errors import UserError

__all__ = ["Change", "changes", "check_length", "earlier_config_kept", "flat_config", "summary"]


class Fate(NamedTuple):
    """What a resumed run does with a key's new value."""

    outcome: str  # for the user, before the keys that it holds for
    refused: bool = False  # whether the run cannot continue with it
    redraws: bool = False  # whether the order of images is drawn anew


_TAKEN = Fate("from here on")
_REDRAWN = Fate("from here on, with images in a new order", redraws=True)
_SAME_RUN = Fate("")
_WEIGHTS = Fate("not read, because weights are the checkpoint's")
_SEED = Fate("not drawn, because the checkpoint keeps its seed")
_REFUSED = Fate("the optimizer's state cannot be kept with it", refused=True)


def _is_drawn(seed: Any) -> bool:
    return not isinstance(seed, int) or seed < 0


class _Row(NamedTuple):
    keys: tuple[str, ...]
    fate: Fate
    holds: Callable[[Any], bool] = lambda value: True


# The first row counts that names a key and whose condition holds for the new value. The rates and
# the schedule are taken: each iteration's rate is the one that the config says.
FATES = (
    _Row(("OUTPUT_DIR", "train.output_dir"), _SAME_RUN),  # a folder may be moved
    _Row(("MODEL.WEIGHTS", "train.init_checkpoint"), _WEIGHTS),
    _Row(("SEED", "train.seed"), _SEED, _is_drawn),
    _Row(("SEED", "train.seed", "DATASETS.TRAIN", "dataloader.train.dataset.*"), _REDRAWN),
    # A sampler that takes a part of the images has drawn which.
    _Row(("DATALOADER.SAMPLER_TRAIN", "dataloader.train.sampler*"), _REDRAWN),
    _Row(("DATALOADER.RANDOM_SUBSET_RATIO",), _REDRAWN),
    # These sort parameters into groups, and an optimizer keeps its momentum by group.
    _Row(("SOLVER.WEIGHT_DECAY_NORM", "SOLVER.WEIGHT_DECAY_BIAS"), _REFUSED),
    _Row(("SOLVER.BIAS_LR_FACTOR", "optimizer._target_"), _REFUSED),
    _Row(("optimizer.params.base_lr",), _TAKEN),
    _Row(("optimizer.params.*",), _REFUSED),
    # The checkpoint has no loss scale.
    _Row(("SOLVER.AMP.ENABLED", "train.amp.enabled"), _REFUSED, bool),
    _Row(("*",), _TAKEN),
)


class Change(NamedTuple):
    """A key whose value differs from the checkpoint's."""

    key: str
    text: str  # the key with both values
    fate: Fate


def flat_config(cfg: CfgNode | DictConfig) -> dict[str, Any]:
    """Every key of a config with a plain value, to keep in a checkpoint and compare.

    Returns:
        ``{"SOLVER.BASE_LR": 0.02, ...}``: numbers, text, None and lists of them. Interpolations of
        a lazy config stay as they are written.
    """
    tree = OmegaConf.to_container(cfg, resolve=False) if OmegaConf.is_config(cfg) else cfg
    return dict(_leaves(tree, ""))


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, list | tuple) and any(isinstance(item, dict) for item in node):
        node = dict(enumerate(node))
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}".lstrip("."))
    else:
        yield path, _comparable(node)


def _comparable(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_comparable(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    # An object of a lazy config. Its repr has an address, which differs between processes.
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """The keys in which a resumed run's config differs from the checkpoint's.

    Args:
        before: the checkpoint's, by :func:`flat_config`.
        now: the run's, likewise.
    """
    found = []
    for key in sorted(before.keys() | now.keys()):
        if key in before and key in now and before[key] == now[key]:
            continue
        value = now.get(key)
        fate = next(
            row.fate
            for row in FATES
            if any(fnmatchcase(key, keys) for keys in row.keys) and row.holds(value)
        )
        if fate is not _SAME_RUN:
            given = f"{key} {value!r}" if key in now else f"{key} left out"
            was = repr(before[key]) if key in before else "not there"
            found.append(Change(key, f"{given} (was {was})", fate))
    return found


def summary(found: list[Change]) -> str:
    """The changes as a line, by what the run does with them."""
    by_fate: dict[str, list[str]] = {}
    for change in found:
        by_fate.setdefault(change.fate.outcome, []).append(change.text)
    return "; ".join(f"{fate}: {', '.join(keys)}" for fate, keys in by_fate.items())


def check_length(done: int, length: int, key: str) -> None:
    """Refuses to resume a training with fewer iterations (``key``'s ``length``) than are done."""
    if done > length:
        raise UserError(
            f"cannot resume: the checkpoint has {done} iterations, and {key} is {length}: give "
            "as many or more, or evaluate it with fpn-plugin evaluate --resume"
        )


@contextmanager
def earlier_config_kept(folder: str, always: bool) -> Iterator[None]:
    """Within it, a run begins and writes its config.yaml; if it fails, the earlier file returns.

    Args:
        folder: of the run.
        always: the earlier file returns in any case if the folder has a checkpoint, because the
            config of an evaluation is not the one that trained it.
    """
    path = Path(folder) / "config.yaml"
    earlier = path.read_bytes() if comm.is_main_process() and path.is_file() else None
    keep = True
    try:
        yield
        keep = always and (Path(folder) / "last_checkpoint").exists()
    finally:
        if keep and earlier is not None:
            path.write_bytes(earlier)

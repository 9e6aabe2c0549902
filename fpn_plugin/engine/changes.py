"""The keys of a config that changed since a checkpoint, and what becomes of each."""

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
    """What becomes of a key's new value.

    Attributes:
        outcome: for the user, before the keys that it holds for.
        refused: whether the run cannot go on with it.
        redraws: whether the order of images is drawn anew.
    """

    outcome: str
    refused: bool = False
    redraws: bool = False


_TAKEN = Fate("from here on")
_REDRAWN = Fate("from here on, with images in a new order", redraws=True)
_SAME_RUN = Fate("")
_WEIGHTS = Fate("not read, because weights are the checkpoint's")
_SEED = Fate("not drawn, because the checkpoint keeps its seed")
_REFUSED = Fate("what the optimizer has gathered cannot be kept with it", refused=True)


def _is_drawn(seed: Any) -> bool:
    return not isinstance(seed, int) or seed < 0


class _Row(NamedTuple):
    keys: str
    fate: Fate
    holds: Callable[[Any], bool] = lambda value: True


# The first row counts that a key fits and whose condition holds for the new value. Rates and the
# schedule are among those that are taken: each iteration's rate is the one that the config says.
FATES = (
    _Row("OUTPUT_DIR", _SAME_RUN),  # a folder may be moved
    _Row("train.output_dir", _SAME_RUN),
    _Row("MODEL.WEIGHTS", _WEIGHTS),
    _Row("train.init_checkpoint", _WEIGHTS),
    _Row("SEED", _SEED, _is_drawn),
    _Row("SEED", _REDRAWN),
    _Row("train.seed", _SEED, _is_drawn),
    _Row("train.seed", _REDRAWN),
    # A sampler that takes a part of the images has drawn which.
    _Row("DATASETS.TRAIN", _REDRAWN),
    _Row("DATALOADER.SAMPLER_TRAIN", _REDRAWN),
    _Row("DATALOADER.RANDOM_SUBSET_RATIO", _REDRAWN),
    _Row("dataloader.train.dataset.*", _REDRAWN),
    _Row("dataloader.train.sampler*", _REDRAWN),
    # They sort parameters into groups, by which an optimizer keeps its momentum.
    _Row("SOLVER.WEIGHT_DECAY_NORM", _REFUSED),
    _Row("SOLVER.WEIGHT_DECAY_BIAS", _REFUSED),
    _Row("SOLVER.BIAS_LR_FACTOR", _REFUSED),
    _Row("optimizer.params.base_lr", _TAKEN),
    _Row("optimizer.params.*", _REFUSED),
    _Row("optimizer._target_", _REFUSED),
    # There is no loss scale to go on with.
    _Row("SOLVER.AMP.ENABLED", _REFUSED, bool),
    _Row("train.amp.enabled", _REFUSED, bool),
    _Row("*", _TAKEN),
)


class Change(NamedTuple):
    """A key whose value is another than the checkpoint's.

    Attributes:
        key: as the config's user writes it.
        text: the key with both values.
        fate: of :data:`FATES`.
    """

    key: str
    text: str
    fate: Fate


def flat_config(cfg: CfgNode | DictConfig) -> dict[str, Any]:
    """Every key of a config by its path, with plain values: to keep in a checkpoint and compare.

    Args:
        cfg: a yacs config, or a lazy one, whose interpolations stay as they are written.

    Returns:
        ``{"SOLVER.BASE_LR": 0.02, ...}``: numbers, text, None and lists of them.
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
    # Objects of lazy configs: without an address, which differs from process to process.
    kind = value if hasattr(value, "__qualname__") else type(value)
    return f"{kind.__module__}.{kind.__qualname__}"


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[Change]:
    """The keys in which a config differs from the one of a checkpoint.

    Args:
        before: of the checkpoint, as :func:`flat_config` returns it.
        now: of the run that goes on.
    """
    found = []
    for key in sorted(before.keys() | now.keys()):
        if key in before and key in now and before[key] == now[key]:
            continue
        value = now.get(key)
        fate = next(row.fate for row in FATES if fnmatchcase(key, row.keys) and row.holds(value))
        if fate is not _SAME_RUN:
            given = f"{key} {value!r}" if key in now else f"{key} left out"
            was = repr(before[key]) if key in before else "not there"
            found.append(Change(key, f"{given} (was {was})", fate))
    return found


def summary(found: list[Change]) -> str:
    """The changes as a line: what becomes of which keys."""
    by_fate: dict[str, list[str]] = {}
    for change in found:
        by_fate.setdefault(change.fate.outcome, []).append(change.text)
    return "; ".join(f"{fate}: {', '.join(keys)}" for fate, keys in by_fate.items())


def check_length(done: int, length: int, key: str) -> None:
    """Refuses to go on with a training that is longer than it shall be.

    Args:
        done: iterations of the checkpoint.
        length: iterations asked for.
        key: the config key that asks for them.

    Raises:
        UserError: fewer are asked for than are done.
    """
    if done > length:
        raise UserError(
            f"cannot resume: the checkpoint has {done} iterations, and {key} is {length}: give "
            "as many or more, or evaluate it with --eval-only --resume"
        )


@contextmanager
def earlier_config_kept(folder: str, always: bool) -> Iterator[None]:
    """Within it, Detectron2 may write a folder's config.yaml; where what is within fails, the one
    that was there is put back, because no iteration was trained by the other.

    Args:
        folder: of the run.
        always: put it back in any case, where the folder holds a training: an evaluation's config
            is not the one that it was trained by.
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

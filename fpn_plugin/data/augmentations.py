"""The keys under INPUT that say how images are resized, mirrored and cropped."""

from __future__ import annotations

from typing import Any

from detectron2.config import CfgNode

from fpn_plugin.errors import UserError, near_names

__all__ = ["check_augmentations", "check_resizing"]

_CHOICES = {
    "MIN_SIZE_TRAIN_SAMPLING": ("choice", "range"),
    "RANDOM_FLIP": ("horizontal", "vertical", "none"),
    "MASK_FORMAT": ("polygon", "bitmask"),
}
# By INPUT.CROP.TYPE, what INPUT.CROP.SIZE must be.
_CROP_SIZES = {
    "relative": "two shares of height and width, above 0 and 1 at most",
    "relative_range": "the least shares of height and width, above 0 and 1 at most",
    "absolute": "height and width in whole pixels",
    "absolute_range": "the least and the largest side in whole pixels",
}


def check_augmentations(cfg: CfgNode, *, training: bool) -> None:
    """Refuses values under INPUT with which no image can be prepared.

    Args:
        cfg: the config.
        training: whether it is trained, not only evaluated.

    Raises:
        UserError: names the key and what it takes.
    """
    check_resizing(cfg, training=False)
    if not training:
        return
    for key, choices in _CHOICES.items():
        given = cfg.INPUT[key]
        if given not in choices:
            raise UserError(f"INPUT.{key} is {given!r}: {near_names(given, choices)}")
    check_resizing(cfg, training=True)
    if cfg.INPUT.CROP.ENABLED:
        _check_crop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE)


def check_resizing(cfg: CfgNode, *, training: bool) -> None:
    """Refuses lengths that no image can have.

    Args:
        cfg: the config.
        training: whether to check the keys for training, or those for evaluation.

    Raises:
        UserError: names the key and what it takes.
    """
    split = "TRAIN" if training else "TEST"
    given, longest = cfg.INPUT[f"MIN_SIZE_{split}"], cfg.INPUT[f"MAX_SIZE_{split}"]
    edges = (given,) if isinstance(given, int) else tuple(given)
    if not edges:
        raise UserError(f"INPUT.MIN_SIZE_{split} is empty: name at least one length")
    sampled = training and cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range"
    if sampled and not isinstance(given, int) and (len(edges) != 2 or edges[0] > edges[1]):
        raise UserError(
            f"INPUT.MIN_SIZE_TRAIN is {edges}; with MIN_SIZE_TRAIN_SAMPLING range it must be "
            "(least, largest)"
        )
    if min(edges) < 0:
        raise UserError(
            f"INPUT.MIN_SIZE_{split} has {min(edges)}; expected lengths in pixels above 0, or 0 to "
            "leave images as they are"
        )
    if longest <= 0 and any(edges):
        raise UserError(
            f"INPUT.MAX_SIZE_{split} is {longest}, which leaves no pixel of an image; expected the "
            "most that the longer side may have, as 1333, or 100000 for no limit"
        )


def _check_crop(kind: str, size: Any) -> None:
    if kind not in _CROP_SIZES:
        raise UserError(f"INPUT.CROP.TYPE is {kind!r}: {near_names(kind, _CROP_SIZES)}")
    values = tuple(size) if isinstance(size, list | tuple) else ()
    relative = kind.startswith("relative")
    types = (int, float) if relative else (int,)
    fits = len(values) == 2 and all(type(value) in types for value in values)
    fits = fits and all(0 < value <= 1 if relative else value >= 1 for value in values)
    if not fits or (kind == "absolute_range" and values[0] > values[1]):
        raise UserError(
            f"INPUT.CROP.SIZE is {size}; with INPUT.CROP.TYPE {kind} it must be {_CROP_SIZES[kind]}"
        )

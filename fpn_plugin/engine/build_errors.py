"""Errors of Detectron2 while it builds a model, explained by the config key that causes them."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2 import modeling
from detectron2.config import CfgNode
from fvcore.common.registry import Registry

from fpn_plugin.config import flat_keys, value_at
from fpn_plugin.data import check_channels
from fpn_plugin.errors import UserError, near_names, one_line
from fpn_plugin.modeling.neck import known_norms

__all__ = ["explained_build_errors"]

_RESNET_DEPTHS = (18, 34, 50, 101, 152)  # of Detectron2's build_resnet_backbone


@contextmanager
def explained_build_errors(cfg: CfgNode) -> Iterator[None]:
    """Within it, a model is built from a config; what Detectron2 refuses is reported.

    Raises:
        UserError: names the key, or quotes Detectron2.
    """
    check_channels(cfg.INPUT.FORMAT, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        message = _missing(cfg, error.args[0])
        if message is None:
            raise
        raise UserError(message) from error
    except ImportError as error:
        if "detectron2._C" not in str(error):
            raise
        raise UserError(
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE asks for deformable convolutions, which this "
            "Detectron2 does not have: its compiled part, detectron2._C, cannot be imported. Build "
            "Detectron2 for this Python and torch, or set [False, False, False, False]"
        ) from error
    except AttributeError as error:
        if "class_image_count" not in str(error):
            raise
        raise UserError(
            "MODEL.ROI_BOX_HEAD.USE_FED_LOSS needs the number of images of each class, which "
            f"dataset {cfg.DATASETS.TRAIN[0]!r} does not give (class_image_count of its metadata, "
            "which LVIS has): set it to False"
        ) from error
    except (AssertionError, ValueError) as error:
        message = one_line(error)
        if isinstance(error, AssertionError):
            levels = list(cfg.MODEL.ROI_HEADS.IN_FEATURES)
            if cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads" and len(levels) != 1:
                message = (
                    f"MODEL.ROI_HEADS.NAME Res5ROIHeads pools from one map, and "
                    f"MODEL.ROI_HEADS.IN_FEATURES names {levels}; over a pyramid it is FPNROIHeads"
                )
            elif not str(error):  # the assertion's code says what it expects
                message = traceback.extract_tb(error.__traceback__)[-1].line or message
        raise UserError(f"Detectron2 cannot build this model: {message}") from error


def _missing(cfg: CfgNode, missing: object) -> str | None:
    """Which key has the value that Detectron2 did not find; None if that is not known."""
    unregistered = re.search(r"'(.+)' found in '(.+)' registry", str(missing))
    if unregistered:  # "No object named 'X' found in 'ROI_HEADS' registry!"
        name, registry = unregistered.groups()
        known = [
            each
            for found in vars(modeling).values()
            if isinstance(found, Registry) and found._name == registry
            for each, _ in found
        ]
        return (
            f"{' and '.join(_keys_of(cfg, name)) or 'the config'} names {name!r}, which is not in "
            f"the {registry} registry: {near_names(name, known)} A module that registers it must "
            "be imported first"
        )
    for part in ("RPN", "ROI_HEADS", "RETINANET"):
        if missing in cfg.MODEL[part].IN_FEATURES:
            return f"MODEL.{part}.IN_FEATURES names {missing!r}, which the backbone does not give"
    norms = [key for key in _keys_of(cfg, missing) if key.endswith("NORM")]
    if norms:
        return (
            f"{' and '.join(norms)} is {missing!r}, no norm of this Detectron2: "
            f"{near_names(str(missing), known_norms())} Or none, ''"
        )
    if missing == cfg.MODEL.RESNETS.DEPTH:
        known = ", ".join(map(str, _RESNET_DEPTHS))
        return f"MODEL.RESNETS.DEPTH is {missing}, which no ResNet here has; known: {known}"
    return None


def _keys_of(cfg: CfgNode, value: object) -> list[str]:
    """The keys of the model that have a value."""
    keys = flat_keys(cfg.MODEL, "MODEL.")
    return [key for key in keys if value_at(cfg, key) == value]

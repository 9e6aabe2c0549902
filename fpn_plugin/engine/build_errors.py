"""Building a model, and saying which key it was that Detectron2 could not build."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from detectron2 import modeling
from detectron2.config import CfgNode
from fvcore.common.registry import Registry

from fpn_plugin.data import check_channels
from fpn_plugin.errors import UserError, near_names
from fpn_plugin.modeling.neck import known_norms

__all__ = ["explained_build_errors"]

_RESNET_DEPTHS = (18, 34, 50, 101, 152)  # of Detectron2's build_resnet_backbone


@contextmanager
def explained_build_errors(cfg: CfgNode) -> Iterator[None]:
    """Within it, what Detectron2 asserts or looks up in vain while it builds a model is reported.

    Args:
        cfg: the config of the model that is built.

    Raises:
        UserError: names the key, or says what Detectron2 said.
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
            "Detectron2 has not: its compiled part, detectron2._C, does not import here. Build "
            "Detectron2 for this Python and torch, or set [False, False, False, False]"
        ) from error
    except AttributeError as error:
        if "class_image_count" not in str(error):
            raise
        raise UserError(
            "MODEL.ROI_BOX_HEAD.USE_FED_LOSS weighs classes by how many images have them, which "
            f"dataset {cfg.DATASETS.TRAIN[0]!r} does not say (class_image_count of its metadata, "
            "as LVIS has): set it to False"
        ) from error
    except (AssertionError, ValueError) as error:
        message = " ".join(str(error).split())
        if isinstance(error, AssertionError) and cfg.MODEL.ROI_HEADS.NAME == "Res5ROIHeads":
            levels = list(cfg.MODEL.ROI_HEADS.IN_FEATURES)
            if len(levels) != 1:
                message = (
                    f"MODEL.ROI_HEADS.NAME Res5ROIHeads pools from one map, and "
                    f"MODEL.ROI_HEADS.IN_FEATURES names {levels}; over a pyramid it is FPNROIHeads"
                )
        # An assertion without a message says in its code what it expects.
        message = (
            message or traceback.extract_tb(error.__traceback__)[-1].line or type(error).__name__
        )
        raise UserError(f"Detectron2 cannot build this model: {message}") from error


def _missing(cfg: CfgNode, missing: object) -> str | None:
    """The key whose value was looked up in vain; None if it is not known."""
    unregistered = re.search(r"'(.+)' found in '(.+)' registry", str(missing))
    if unregistered:  # "No object named 'X' found in 'ROI_HEADS' registry!"
        name, registry = unregistered.groups()
        known = [
            each
            for found in vars(modeling).values()
            if isinstance(found, Registry) and found._name == registry
            for each, _ in found
        ]
        keys = " and ".join(_keys_of(cfg.MODEL, name, "MODEL.")) or "the config"
        return (
            f"{keys} names {name!r}, which is not in the {registry} registry: "
            f"{near_names(name, known)} A module that registers it must be imported first"
        )
    readers = {
        "MODEL.RPN.IN_FEATURES": cfg.MODEL.RPN.IN_FEATURES,
        "MODEL.ROI_HEADS.IN_FEATURES": cfg.MODEL.ROI_HEADS.IN_FEATURES,
        "MODEL.RETINANET.IN_FEATURES": cfg.MODEL.RETINANET.IN_FEATURES,
    }
    for key, levels in readers.items():
        if missing in levels:
            return f"{key} names {missing!r}, which the backbone does not give"
    norms = [key for key in _keys_of(cfg.MODEL, missing, "MODEL.") if key.endswith("NORM")]
    if norms:
        return (
            f"{' and '.join(norms)} is {missing!r}, no norm of this Detectron2: "
            f"{near_names(str(missing), known_norms())} Or none, ''"
        )
    if missing == cfg.MODEL.RESNETS.DEPTH:
        known = ", ".join(map(str, _RESNET_DEPTHS))
        return f"MODEL.RESNETS.DEPTH is {missing}, which no ResNet has here; known: {known}"
    return None


def _keys_of(cfg: CfgNode, value: object, prefix: str) -> Iterator[str]:
    """The keys that have a value."""
    for key, each in cfg.items():
        if isinstance(each, CfgNode):
            yield from _keys_of(each, value, f"{prefix}{key}.")
        elif each == value:
            yield prefix + key

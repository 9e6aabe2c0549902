"""Building a model, and saying which key it was that Detectron2 could not build."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from detectron2.config import CfgNode

from fpn_plugin.errors import UserError

__all__ = ["explained_build_errors"]


@contextmanager
def explained_build_errors(cfg: CfgNode) -> Iterator[None]:
    """Within it, what Detectron2 asserts or looks up in vain while it builds a model is told.

    Args:
        cfg: the config of the model that is built.

    Raises:
        UserError: names the key, or says what Detectron2 said.
    """
    try:
        yield
    except UserError:
        raise
    except KeyError as error:
        missing = error.args[0]
        if "registry" in str(missing):  # "No object named 'X' found in 'ROI_HEADS' registry!"
            raise UserError(
                f"the config names a class that is not registered: {missing}"
            ) from error
        readers = {
            "MODEL.RPN.IN_FEATURES": cfg.MODEL.RPN.IN_FEATURES,
            "MODEL.ROI_HEADS.IN_FEATURES": cfg.MODEL.ROI_HEADS.IN_FEATURES,
            "MODEL.RETINANET.IN_FEATURES": cfg.MODEL.RETINANET.IN_FEATURES,
        }
        for key, levels in readers.items():
            if missing in levels:
                raise UserError(
                    f"{key} names {missing!r}, which the backbone does not give"
                ) from error
        raise
    except (AssertionError, ValueError) as error:
        told = " ".join(str(error).split())
        if not told:
            raise
        raise UserError(f"Detectron2 cannot build this model: {told}") from error

"""The pyramid of a config: levels, Eq. (1), anchors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from detectron2.config import CfgNode
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator

from fpn_plugin.config import value_at
from fpn_plugin.errors import UserError

__all__ = ["Pyramid", "level_names"]

_RPN_FAMILIES = ("GeneralizedRCNN", "PanopticFPN", "ProposalNetwork")
_PLUGIN_HEADS = ("FPNROIHeads", "FPNCascadeROIHeads")
_DETECTRON2_CANONICAL = (224.0, 4)  # fixed in its poolers


@dataclass(frozen=True)
class Pyramid:
    """The parts of a config's pyramid that a dataset decides on.

    Attributes:
        node: the config node whose IN_FEATURES names the levels with anchors: "MODEL.RPN" or
            "MODEL.RETINANET".
        stages: levels of the bottom-up stages that the pyramid is built on, finest first.
        anchor_levels: levels with anchors, finest first; level k has stride 2^k.
        roi_levels: levels that regions are pooled from, finest first; empty without RoI heads.
        canonical_size: s0 of Eq. (1), in pixels of the network's input.
        canonical_level: k0.
        canonical_keys: whether the RoI heads read these two from the config.
        sizes: square root of the anchors' areas at each anchor level, in the same pixels.
        ratios: height over width of the anchors at each anchor level.
        offset: where in its cell an anchor's centre lies, as a share of the stride.
        divisibility: the padded input's sides are multiples of it, in pixels.
    """

    node: str
    stages: tuple[int, ...]
    anchor_levels: tuple[int, ...]
    roi_levels: tuple[int, ...]
    canonical_size: float
    canonical_level: int
    canonical_keys: bool
    sizes: tuple[tuple[float, ...], ...]
    ratios: tuple[tuple[float, ...], ...]
    offset: float
    divisibility: int

    @classmethod
    def from_config(cls, cfg: CfgNode) -> Pyramid:
        """The pyramid of a config.

        Raises:
            UserError: the config has no pyramid, or no anchors on it.
        """
        model = cfg.MODEL
        architecture, generator = model.META_ARCHITECTURE, model.ANCHOR_GENERATOR
        if architecture not in (*_RPN_FAMILIES, "RetinaNet"):
            raise UserError(
                f"MODEL.META_ARCHITECTURE {architecture!r} has no anchors that can be fitted; "
                f"expected one of {', '.join((*_RPN_FAMILIES, 'RetinaNet'))}"
            )
        if architecture != "RetinaNet" and model.PROPOSAL_GENERATOR.NAME != "RPN":
            raise UserError(
                f"the config's proposals come from {model.PROPOSAL_GENERATOR.NAME!r}, not from an "
                "RPN: fit the config of the RPN that made them"
            )
        if model.BACKBONE.NAME == "build_image_pyramid_backbone":
            raise UserError(
                "MODEL.BACKBONE.NAME is 'build_image_pyramid_backbone', whose levels come from "
                "scales of the image and not from stages: fit the config with build_fpn_backbone, "
                "and take over its anchors"
            )
        if generator.NAME != "DefaultAnchorGenerator":
            raise UserError(
                f"MODEL.ANCHOR_GENERATOR.NAME is {generator.NAME!r}; only the anchors of "
                "DefaultAnchorGenerator can be fitted"
            )
        node = "MODEL.RETINANET" if architecture == "RetinaNet" else "MODEL.RPN"
        levels = _levels(cfg, node, "p")
        stages = _levels(cfg, "MODEL.FPN", "res")
        has_rois = architecture in ("GeneralizedRCNN", "PanopticFPN")
        own = model.ROI_HEADS.NAME in _PLUGIN_HEADS
        canonical = _DETECTRON2_CANONICAL
        if own:
            canonical = (float(model.FPN.CANONICAL_BOX_SIZE), int(model.FPN.CANONICAL_LEVEL))
        return cls(
            node=node,
            stages=stages,
            anchor_levels=levels,
            roi_levels=_levels(cfg, "MODEL.ROI_HEADS", "p") if has_rois else (),
            canonical_size=canonical[0],
            canonical_level=canonical[1],
            canonical_keys=own,
            sizes=_per_level(generator.SIZES, len(levels), "SIZES"),
            ratios=_per_level(generator.ASPECT_RATIOS, len(levels), "ASPECT_RATIOS"),
            offset=float(generator.OFFSET),
            divisibility=1 if model.FPN.get("MATCH_LATERAL_SIZE") else 2 ** stages[-1],
        )

    @property
    def anchors_per_cell(self) -> int:
        """Anchors at each cell of a level."""
        return len(self.sizes[0]) * len(self.ratios[0])

    def anchor_shapes(self) -> list[np.ndarray]:
        """Width and height of Detectron2's anchors of each level, float64 ``(A, 2)``, in pixels."""
        generator = DefaultAnchorGenerator(
            sizes=self.sizes,
            aspect_ratios=self.ratios,
            strides=[2**level for level in self.anchor_levels],
            offset=self.offset,
        )
        return [(cells[:, 2:] - cells[:, :2]).double().numpy() for cells in generator.cell_anchors]


def level_names(levels: Sequence[int], prefix: str = "p") -> list[str]:
    """Names of levels as a config has them: ``["p2", "p3"]``."""
    return [f"{prefix}{level}" for level in levels]


def _levels(cfg: CfgNode, node: str, prefix: str) -> tuple[int, ...]:
    key = f"{node}.IN_FEATURES"
    names = list(value_at(cfg, key))
    found = [re.fullmatch(rf"{prefix}(\d+)", str(name)) for name in names]
    if not names or not all(found):
        raise UserError(
            f"{key} is {names}, which is no pyramid; expected levels as "
            f"{level_names((3, 4, 5), prefix)}"
        )
    levels = tuple(int(match[1]) for match in found)
    if levels != tuple(range(levels[0], levels[-1] + 1)):
        raise UserError(f"{key} is {names}; expected levels without a gap, finest first")
    return levels


def _per_level(given: Sequence, levels: int, key: str) -> tuple[tuple[float, ...], ...]:
    """A list for each level; as in Detectron2, a single list is for all levels."""
    lists = [given] if given and not isinstance(given[0], list | tuple) else list(given)
    if len(lists) == 1:
        lists = lists * levels
    if len(lists) != levels or not all(lists) or len({len(each) for each in lists}) > 1:
        raise UserError(
            f"MODEL.ANCHOR_GENERATOR.{key} is {given}; expected one list, or one for each of the "
            f"{levels} levels with anchors, all equally long"
        )
    if not all(value > 0 for each in lists for value in each):
        raise UserError(f"MODEL.ANCHOR_GENERATOR.{key} is {given}; expected values above 0")
    return tuple(tuple(float(value) for value in each) for each in lists)

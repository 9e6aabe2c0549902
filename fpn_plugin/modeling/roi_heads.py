"""RoI heads that pool by Eq. (1) with the config's k0 and canonical size (paper, section 4.2)."""

import copy
from types import MethodType
from typing import Any, Final

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import ROI_HEADS_REGISTRY
from detectron2.modeling.roi_heads import CascadeROIHeads, StandardROIHeads
from omegaconf import DictConfig
from torch import nn

from fpn_plugin.errors import UserError, naming_keys, near_names

from .levels import raise_non_finite
from .pooler import PyramidROIPooler
from .sampling import BatchedSampling

__all__ = ["FPNCascadeROIHeads", "FPNROIHeads"]

Config = CfgNode | DictConfig
Shapes = dict[str, ShapeSpec]


class _PyramidPooling:
    """Replaces the poolers of Detectron2's RoI heads, which have no parameters."""

    @classmethod
    def _init_box_head(cls, cfg: Config, input_shape: Shapes) -> dict[str, Any]:
        # Built first, because its errors name the key.
        pooler = _pyramid_pooler(cfg, "ROI_BOX_HEAD", input_shape)
        return {**super()._init_box_head(cfg, input_shape), "box_pooler": pooler}

    @classmethod
    def _init_mask_head(cls, cfg: Config, input_shape: Shapes) -> dict[str, Any]:
        parts = super()._init_mask_head(cfg, input_shape)
        if parts.get("mask_pooler") is not None:
            parts["mask_pooler"] = _pyramid_pooler(cfg, "ROI_MASK_HEAD", input_shape)
        return parts

    @classmethod
    def _init_keypoint_head(cls, cfg: Config, input_shape: Shapes) -> dict[str, Any]:
        parts = super()._init_keypoint_head(cfg, input_shape)
        if parts.get("keypoint_pooler") is not None:
            parts["keypoint_pooler"] = _pyramid_pooler(cfg, "ROI_KEYPOINT_HEAD", input_shape)
        return parts

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        output = super().forward(*args, **kwargs)
        # Poolers do not wait for a GPU. In inference their checks have arrived now; in training a
        # loss is NaN.
        raise_non_finite()
        return output

    def __prepare_scriptable__(self) -> nn.Module:
        # TorchScript has no super(), and checks boxes in the pooler.
        plain = copy.copy(self)
        plain.forward = MethodType(super().forward.__func__, plain)
        return plain


@ROI_HEADS_REGISTRY.register()
class FPNROIHeads(_PyramidPooling, BatchedSampling, StandardROIHeads):
    """StandardROIHeads whose box, mask and keypoint poolers read MODEL.FPN.CANONICAL_LEVEL (k0)
    and MODEL.FPN.CANONICAL_BOX_SIZE.

    Head parameters are shared by all levels (section 4.2). Same constructor, call, losses and
    state dict as :class:`detectron2.modeling.StandardROIHeads`.
    """

    # Without a head torch.jit.script must not compile its calls. Detectron2 has these annotations,
    # which are not inherited; torch does not understand them as text.
    mask_on: Final[bool]
    keypoint_on: Final[bool]


@ROI_HEADS_REGISTRY.register()
class FPNCascadeROIHeads(_PyramidPooling, BatchedSampling, CascadeROIHeads):
    """CascadeROIHeads whose poolers read the same keys as those of :class:`FPNROIHeads`."""


def _pyramid_pooler(cfg: Config, head_name: str, input_shape: Shapes) -> PyramidROIPooler:
    """The pooler of one head, over the levels that MODEL.ROI_HEADS.IN_FEATURES names."""
    if "CANONICAL_LEVEL" not in cfg.MODEL.FPN:
        raise UserError(
            "the config lacks the plugin's keys: call fpn_plugin.add_fpn_config(cfg) before "
            "cfg.merge_from_file(...)"
        )
    for name in cfg.MODEL.ROI_HEADS.IN_FEATURES:
        if name not in input_shape:
            raise UserError(
                f"MODEL.ROI_HEADS.IN_FEATURES names {name!r}, which the backbone does not give: "
                f"{near_names(name, input_shape)}"
            )
    keys = {
        "output_size": f"MODEL.{head_name}.POOLER_RESOLUTION",
        "scales": "MODEL.ROI_HEADS.IN_FEATURES",
        "pooler_type": f"MODEL.{head_name}.POOLER_TYPE",
        "canonical_box_size": "MODEL.FPN.CANONICAL_BOX_SIZE",
    }
    head = cfg.MODEL[head_name]
    with naming_keys(keys):
        return PyramidROIPooler(
            output_size=head.POOLER_RESOLUTION,
            scales=[1 / input_shape[name].stride for name in cfg.MODEL.ROI_HEADS.IN_FEATURES],
            sampling_ratio=head.POOLER_SAMPLING_RATIO,
            pooler_type=head.POOLER_TYPE,
            canonical_box_size=cfg.MODEL.FPN.CANONICAL_BOX_SIZE,
            canonical_level=cfg.MODEL.FPN.CANONICAL_LEVEL,
        )

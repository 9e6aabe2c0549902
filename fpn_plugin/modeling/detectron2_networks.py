"""Registered builders for Detectron2's RegNet, Swin and MViT, which it has only as classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from omegaconf import DictConfig
from torch import nn

from fpn_plugin.errors import UserError

__all__ = ["DETECTRON2_NETWORKS"]

_REGNET = ("s1", "s2", "s3", "s4")
_SWIN = ("p0", "p1", "p2", "p3")
_MVIT = ("scale2", "scale3", "scale4", "scale5")
# By builder, the stages as Detectron2's class names them, and the class's arguments. These are from
# Detectron2's new baselines and its projects ViTDet and MViTv2; Swin-T and -S are as published.
_VARIANTS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "build_regnetx_4gf_backbone": (
        _REGNET,
        {"depth": 23, "w_a": 38.65, "w_0": 96, "w_m": 2.43, "group_width": 40},
    ),
    "build_regnety_4gf_backbone": (
        _REGNET,
        {"depth": 22, "w_a": 31.41, "w_0": 96, "w_m": 2.24, "group_width": 64, "se_ratio": 0.25},
    ),
    "build_swin_t_backbone": (_SWIN, {}),
    "build_swin_s_backbone": (_SWIN, {"depths": (2, 2, 18, 2)}),
    "build_swin_b_backbone": (
        _SWIN,
        {"depths": (2, 2, 18, 2), "embed_dim": 128, "num_heads": (4, 8, 16, 32),
         "drop_path_rate": 0.4},
    ),
    "build_mvitv2_t_backbone": (
        _MVIT,
        {"depth": 10, "last_block_indexes": (0, 2, 7, 9), "drop_path_rate": 0.2},
    ),
    "build_mvitv2_b_backbone": (
        _MVIT,
        {"depth": 24, "last_block_indexes": (1, 4, 20, 23), "drop_path_rate": 0.4},
    ),
}  # fmt: skip
DETECTRON2_NETWORKS = {builder: stages for builder, (stages, _) in _VARIANTS.items()}


def _builder(name: str) -> Callable[[CfgNode | DictConfig, ShapeSpec], Backbone]:
    def build(cfg: CfgNode | DictConfig, input_shape: ShapeSpec) -> Backbone:
        try:
            return _built(*_VARIANTS[name], cfg, input_shape.channels)
        except ImportError as error:
            if (error.name or "").startswith("timm"):  # Swin and MViT use its DropPath
                raise UserError(
                    f"{name} needs timm, which is not installed: pip install 'fpn_plugin[timm]'"
                ) from error
            raise UserError(
                f"this Detectron2 has no {error.name}, which came after its release 0.6: "
                "build_timm_backbone has networks of that kind"
            ) from error

    build.__name__ = build.__qualname__ = name
    return build


def _built(
    stages: tuple[str, ...], arguments: dict[str, Any], cfg: CfgNode | DictConfig, channels: int
) -> Backbone:
    # Stages that nothing reads would have norms without gradients.
    wanted = [stage for stage in stages if stage in cfg.MODEL.FPN.IN_FEATURES] or list(stages)
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    if stages is _REGNET:
        from detectron2.modeling.backbone.regnet import RegNet, ResBottleneckBlock, SimpleStem

        return RegNet(
            # RegNet gives its stem 3 channels.
            stem_class=lambda _, *rest: SimpleStem(channels, *rest),
            stem_width=32,
            block_class=ResBottleneckBlock,
            norm=cfg.MODEL.RESNETS.NORM,
            freeze_at=freeze_at,
            out_features=wanted,
            **arguments,
        )
    if stages is _SWIN:
        from detectron2.modeling.backbone.swin import SwinTransformer

        return SwinTransformer(
            out_indices=[stages.index(stage) for stage in wanted],
            frozen_stages=freeze_at or -1,  # -1 for none
            in_chans=channels,
            **arguments,
        )
    if freeze_at:
        raise UserError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}, and Detectron2's MViT freezes no stages: "
            "set it 0"
        )
    from detectron2.modeling.backbone.mvit import MViT

    norm = partial(nn.LayerNorm, eps=1e-6)
    return MViT(norm_layer=norm, out_features=wanted, in_chans=channels, **arguments)


for _name in _VARIANTS:
    BACKBONE_REGISTRY.register(_builder(_name))

"""The registered backbone: a pyramid over the bottom-up pathway that a config names (section 3)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from detectron2.config import CfgNode
from detectron2.layers import FrozenBatchNorm2d, ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import Backbone
from omegaconf import DictConfig
from torch import nn

from fpn_plugin.errors import UserError, naming_keys, near_names

from .detectron2_networks import DETECTRON2_NETWORKS
from .image_pyramid import FeaturizedImagePyramid
from .neck import FeaturePyramidNetwork, build_top_block
from .networks import ImageNetwork, as_cfg_node

__all__ = [
    "PYRAMIDS", "build_fpn_backbone", "build_image_pyramid", "build_image_pyramid_backbone",
    "build_pyramid", "frozen", "image_channels",
]  # fmt: skip

Pyramid = TypeVar("Pyramid", FeaturePyramidNetwork, FeaturizedImagePyramid)
_RESNET_STAGES = {"res2", "res3", "res4", "res5"}
# Builders that do not check MODEL.BACKBONE.FREEZE_AT.
_FROZEN_BY_STAGE = {"build_resnet_backbone", *DETECTRON2_NETWORKS}
# Arguments of the pyramid and their config keys.
_KEYS = {
    name: f"MODEL.FPN.{name.upper()}"
    for name in (
        "in_features", "out_channels", "norm", "top_block", "fuse_type", "coarsest_output_conv",
        "top_down", "lateral", "match_lateral_size", "out_features",
    )
}  # fmt: skip
_IMAGE_PYRAMID_KEYS = {
    name: f"MODEL.FPN.{name.upper()}"
    for name in ("in_features", "image_scales", "out_channels", "norm", "top_block")
}


@BACKBONE_REGISTRY.register()
def build_fpn_backbone(cfg: CfgNode | DictConfig, input_shape: ShapeSpec) -> FeaturePyramidNetwork:
    """Builds a :class:`FeaturePyramidNetwork` over the builder that MODEL.FPN.BOTTOM_UP names.

    Args:
        cfg: a config with the plugin's keys, see :func:`fpn_plugin.add_fpn_config`.
        input_shape: channels of the input image.

    Raises:
        UserError: the plugin's keys are missing, the builder is unknown, or what it builds does
            not fit the pyramid.
    """
    cfg = as_cfg_node(cfg)
    bottom_up = _build_bottom_up(cfg, input_shape)
    fpn = cfg.MODEL.FPN
    arguments = {name: fpn[name.upper()] for name in (*_KEYS, "freeze")}
    arguments["out_features"] = fpn.OUT_FEATURES or None
    with naming_keys(_KEYS):
        neck = build_pyramid(bottom_up, **arguments)
    neck._config_keys = _KEYS
    return neck


@BACKBONE_REGISTRY.register()
def build_image_pyramid_backbone(
    cfg: CfgNode | DictConfig, input_shape: ShapeSpec
) -> FeaturizedImagePyramid:
    """Builds a :class:`FeaturizedImagePyramid` over the builder that MODEL.FPN.BOTTOM_UP names.

    MODEL.FPN.IN_FEATURES names the stage, MODEL.FPN.IMAGE_SCALES the scales. OUT_CHANNELS, NORM,
    TOP_BLOCK and FREEZE are those of the feature pyramid.

    Args:
        cfg: a config with the plugin's keys, see :func:`fpn_plugin.add_fpn_config`.
        input_shape: channels of the input image.

    Raises:
        UserError: as :func:`build_fpn_backbone`, or a key is set that an image pyramid does not
            have.
    """
    cfg = as_cfg_node(cfg)
    bottom_up = _build_bottom_up(cfg, input_shape)
    fpn = cfg.MODEL.FPN
    refuse_merging_keys(fpn)
    with naming_keys(_IMAGE_PYRAMID_KEYS):
        return build_image_pyramid(
            bottom_up, **{name: fpn[name.upper()] for name in (*_IMAGE_PYRAMID_KEYS, "freeze")}
        )


# What MODEL.BACKBONE.NAME may be for levels p2, p3 ... from the keys of MODEL.FPN.
PYRAMIDS = (build_fpn_backbone.__name__, build_image_pyramid_backbone.__name__)


def refuse_merging_keys(fpn: CfgNode) -> None:
    """Refuses keys of MODEL.FPN that say how levels are merged, which an image pyramid does not.

    Raises:
        UserError: one of them is not its default.
    """
    defaults = {
        "FUSE_TYPE": "sum", "COARSEST_OUTPUT_CONV": False, "TOP_DOWN": True, "LATERAL": True,
        "MATCH_LATERAL_SIZE": False, "OUT_FEATURES": [],
    }  # fmt: skip
    for key, default in defaults.items():
        if fpn[key] != default:
            raise UserError(
                f"MODEL.FPN.{key} is {fpn[key]!r}; an image pyramid does not merge levels, and "
                f"reads the key nowhere: leave it {default!r}"
            )


def build_pyramid(
    bottom_up: Backbone,
    in_features: Sequence[str],
    out_channels: int,
    *,
    top_block: str | nn.Module | None = "maxpool",
    norm: str = "",
    fuse_type: str = "sum",
    coarsest_output_conv: bool = False,
    top_down: bool = True,
    lateral: bool = True,
    match_lateral_size: bool = False,
    out_features: Sequence[str] | None = None,
    freeze: bool = False,
) -> FeaturePyramidNetwork:
    """Builds a :class:`FeaturePyramidNetwork` whose top block fits the network under it.

    Arguments are those of the class, but for two: ``top_block`` may also be a name that
    :func:`build_top_block` knows, and with ``freeze`` nothing of network and pyramid is trained.

    Raises:
        UserError: the arguments do not fit the network; names the one to change.
    """
    neck = FeaturePyramidNetwork(
        bottom_up,
        in_features,
        out_channels,
        norm=norm,
        top_block=_top_block(top_block, bottom_up, in_features, out_channels),
        fuse_type=fuse_type,
        coarsest_output_conv=coarsest_output_conv,
        top_down=top_down,
        lateral=lateral,
        match_lateral_size=match_lateral_size,
        out_features=out_features,
    )
    return frozen(neck) if freeze else neck


def build_image_pyramid(
    bottom_up: Backbone,
    in_features: Sequence[str],
    image_scales: Sequence[float],
    out_channels: int,
    *,
    top_block: str | nn.Module | None = "maxpool",
    norm: str = "",
    freeze: bool = False,
) -> FeaturizedImagePyramid:
    """Builds a :class:`FeaturizedImagePyramid`; ``top_block`` and ``freeze`` are those of
    :func:`build_pyramid`.

    Raises:
        UserError: the arguments do not fit the network; names the one to change.
    """
    smallest = image_scales[-1] if image_scales and image_scales[-1] > 0 else 1
    top_block = _top_block(top_block, bottom_up, in_features, out_channels, smallest)
    options = {"norm": norm, "top_block": top_block}
    pyramid = FeaturizedImagePyramid(bottom_up, in_features, image_scales, out_channels, **options)
    return frozen(pyramid) if freeze else pyramid


def _top_block(
    given: str | nn.Module | None,
    bottom_up: Backbone,
    in_features: Sequence[str],
    out_channels: int,
    scale: float = 1,
) -> nn.Module | None:
    """The top block of a name, after the last stage of an image at a scale; others as they are."""
    shapes, coarsest = bottom_up.output_shape(), in_features[-1] if in_features else None
    if not isinstance(given, str) or coarsest not in shapes:  # the pyramid reports missing stages
        return None if isinstance(given, str) else given
    with naming_keys({"name": "`top_block`"}):
        return build_top_block(
            given,
            coarsest_stage=coarsest,
            coarsest_level=int(shapes[coarsest].stride / scale).bit_length() - 1,
            in_channels=shapes[coarsest].channels,
            out_channels=out_channels,
        )


def frozen(neck: Pyramid) -> Pyramid:
    """The pyramid without anything to train; batch norms keep their statistics."""
    for parameter in neck.parameters():
        parameter.requires_grad = False
    if isinstance(neck.bottom_up, ImageNetwork):  # whose norms may be other classes
        neck.bottom_up.freeze_norms()
    return FrozenBatchNorm2d.convert_frozen_batchnorm(neck)


def image_channels(model: nn.Module) -> int:
    """How many channels an image of a model has: one for each value of pixel_mean, or 3."""
    return len(getattr(model, "pixel_mean", range(3)))


def _build_bottom_up(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    if "BOTTOM_UP" not in cfg.MODEL.FPN:
        raise UserError(
            "the config lacks the plugin's keys: call fpn_plugin.add_fpn_config(cfg) before "
            "cfg.merge_from_file(...)"
        )
    name = cfg.MODEL.FPN.BOTTOM_UP
    if name not in BACKBONE_REGISTRY:
        known = [builder for builder, _ in BACKBONE_REGISTRY]
        raise UserError(
            f"MODEL.FPN.BOTTOM_UP names {name!r}, which is not in the BACKBONE registry: "
            f"{near_names(name, known)} A module that registers it must be imported first"
        )
    if name in PYRAMIDS:
        raise UserError(
            "MODEL.FPN.BOTTOM_UP names the pyramid itself; name the network under it, for "
            "example build_resnet_backbone"
        )
    if name in _FROZEN_BY_STAGE and not 0 <= cfg.MODEL.BACKBONE.FREEZE_AT <= 5:
        raise UserError(
            f"MODEL.BACKBONE.FREEZE_AT is {cfg.MODEL.BACKBONE.FREEZE_AT}; {name} freezes nothing "
            "at 0, its stem at 1, and up to res5 at 5"
        )
    if cfg.MODEL.FPN.IN_FEATURES and set(cfg.MODEL.FPN.IN_FEATURES) <= _RESNET_STAGES:
        # A network is built up to the coarsest stage that is read. Deeper stages would have
        # parameters without gradients, which distributed training refuses.
        cfg = cfg.clone()
        cfg.defrost()
        for node in (cfg.MODEL.RESNETS, cfg.MODEL.TIMM, cfg.MODEL.TORCHVISION):
            node.OUT_FEATURES = list(cfg.MODEL.FPN.IN_FEATURES)
    bottom_up = BACKBONE_REGISTRY.get(name)(cfg, input_shape)
    if not isinstance(bottom_up, Backbone):
        raise UserError(
            f"MODEL.FPN.BOTTOM_UP {name!r} builds a {type(bottom_up).__name__}; it must build a "
            "detectron2.modeling.Backbone"
        )
    return bottom_up

"""A yacs config's model as lazy nodes, each the class that is built and its arguments."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling import (
    BACKBONE_REGISTRY,
    GeneralizedRCNN,
    PanopticFPN,
    ProposalNetwork,
    RetinaNet,
)
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone import FPN, Backbone
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads import (
    FastRCNNConvFCHead,
    FastRCNNOutputLayers,
    KRCNNConvDeconvUpsampleHead,
    MaskRCNNConvUpsampleHead,
    Res5ROIHeads,
)
from omegaconf import DictConfig, OmegaConf
from torch import nn

from fpn_plugin.config import add_fpn_config
from fpn_plugin.errors import UserError, near_names
from fpn_plugin.modeling import (
    FeaturePyramidNetwork,
    FPNCascadeROIHeads,
    FPNROIHeads,
    PerLevelRPNHead,
    PyramidROIPooler,
)
from fpn_plugin.modeling.bottom_up import build_pyramid

from .keys import newer_keys

__all__ = [
    "build_network",
    "build_per_level_head",
    "build_res5",
    "model_node",
    "with_pyramid",
]

# The node under MODEL that each builder reads.
_NODES = {
    "build_resnet_backbone": "RESNETS",
    "build_timm_backbone": "TIMM",
    "build_torchvision_backbone": "TORCHVISION",
}


def build_network(
    builder: str,
    freeze_at: int,
    input_format: str = "BGR",
    pixel_mean: list[float] | None = None,
    pixel_std: list[float] | None = None,
    **nodes: dict[str, Any],
) -> Backbone:
    """A network from the BACKBONE registry, by the keys that its builder reads.

    Args:
        builder: its name there.
        freeze_at: MODEL.BACKBONE.FREEZE_AT.
        input_format: as the model's; networks of timm and torchvision read it.
        pixel_mean: as the model's, a value for each channel of an image; Detectron2's default by
            default. Networks of timm and torchvision read the values.
        pixel_std: as the model's; networks of timm and torchvision read it.
        nodes: nodes under MODEL with the keys that differ from their defaults, for example
            ``RESNETS={"DEPTH": 101}``.
    """
    cfg = _defaults()
    if builder not in BACKBONE_REGISTRY:
        names = [name for name, _ in BACKBONE_REGISTRY]
        raise UserError(
            f"builder {builder!r} is not in the BACKBONE registry: {near_names(builder, names)} "
            "A module that registers it must be imported first"
        )
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    cfg.INPUT.FORMAT = input_format
    cfg.MODEL.PIXEL_MEAN = list(pixel_mean or cfg.MODEL.PIXEL_MEAN)
    cfg.MODEL.PIXEL_STD = list(pixel_std or cfg.MODEL.PIXEL_STD)
    for node, keys in nodes.items():
        known_nodes = [name for name, value in cfg.MODEL.items() if isinstance(value, CfgNode)]
        if node not in known_nodes:
            raise UserError(
                f"{builder} is given {node!r}, no node under MODEL: {near_names(node, known_nodes)}"
            )
        _set_keys(cfg, node, keys)
    return BACKBONE_REGISTRY.get(builder)(cfg, ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN)))


def _defaults() -> CfgNode:
    cfg = get_cfg()
    add_fpn_config(cfg)
    return cfg


@functools.cache
def _unchanged() -> CfgNode:
    """The defaults, to compare with: they are compared with often, and slow to make."""
    return _defaults()


def _set_keys(cfg: CfgNode, node: str, keys: dict[str, Any]) -> None:
    """Sets keys of a node under MODEL; a UserError for one that it does not have."""
    for key, value in keys.items():
        if key not in cfg.MODEL[node]:
            raise UserError(f"MODEL.{node} has no key {key!r}: {near_names(key, cfg.MODEL[node])}")
        plain = OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
        try:
            cfg.merge_from_list([f"MODEL.{node}.{key}", plain])
        except ValueError as error:  # of another type
            raise UserError(f"MODEL.{node}.{key}: {' '.join(str(error).split())}") from error


def model_node(cfg: CfgNode) -> DictConfig:
    """The model of a yacs config as a lazy node.

    Args:
        cfg: with the plugin's keys.

    Raises:
        UserError: a part or a setting that has no lazy form here.
    """
    refuse_changed(
        cfg,
        "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT",
        "MODEL.PANOPTIC_FPN.COMBINE.ENABLED",
        "MODEL.ROI_BOX_HEAD.USE_FED_LOSS",
        *newer_keys(),
    )
    kinds = {
        "GeneralizedRCNN": _rcnn,
        "PanopticFPN": _panoptic,
        "ProposalNetwork": _proposal_network,
        "RetinaNet": _retinanet,
    }
    return known(kinds, "MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE)(cfg)


def known(table: dict[str, Any], key: str, value: str) -> Any:
    """What a table has for the value of a key; if it has nothing, a UserError names what it has."""
    if value not in table:
        raise UserError(
            f"{key} {value!r} has no lazy form here; those that have: {', '.join(table)}"
        )
    return table[value]


def refuse_changed(cfg: CfgNode, *keys: str) -> None:
    """Refuses values of keys that the lazy nodes do not carry over, unless they are defaults."""
    for key in keys:
        value, default = cfg, _unchanged()
        for part in key.split("."):
            # Detectron2 0.6 does not have all of them.
            value, default = value.get(part, CfgNode()), default.get(part, CfgNode())
        if value != default:
            raise UserError(
                f"{key} {value!r} has no lazy form here: leave it {default!r}, and put what it "
                "does into the lazy nodes yourself"
            )


# ---- backbone


def _has_pyramid(cfg: CfgNode) -> bool:
    return cfg.MODEL.BACKBONE.NAME == "build_fpn_backbone"


def _strides(cfg: CfgNode, names: Sequence[str]) -> list[int]:
    """Strides of maps of a config's backbone: 2^k for p{k} of a pyramid and res{k} of a ResNet."""
    prefix, dilation = ("p" if _has_pyramid(cfg) else "res"), cfg.MODEL.RESNETS.RES5_DILATION
    strides = []
    for name in names:
        if name.rstrip("0123456789") != prefix:
            raise UserError(
                f"the backbone has no map {name!r}: its maps are {prefix}2, {prefix}3 ..."
            )
        dilated = name == "res5" and dilation > 1
        strides.append(2 ** (int(name.removeprefix(prefix)) - dilated))
    return strides


def _channels(cfg: CfgNode, name: str, depth: int) -> int | str:
    """Channels of a map of the backbone, where the model node stands ``depth`` nodes up.

    Those of a pyramid are read from its node, so that there is one place to change them.
    """
    if _has_pyramid(cfg):
        return f"${{{'.' * depth}backbone.out_channels}}"
    return cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 2 ** (int(name.removeprefix("res")) - 2)


def _changed(cfg: CfgNode, node: str) -> dict[str, Any]:
    """The keys of a node under MODEL that differ from their defaults."""
    defaults = _unchanged().MODEL[node]
    return {k: v for k, v in cfg.MODEL[node].items() if v != defaults[k]}


def _network(cfg: CfgNode, builder: str, features: list[str] | str, model: str) -> DictConfig:
    """A bottom-up network; ``model`` are as many dots as lead to the model's node."""
    if builder not in _NODES:
        raise UserError(
            f"MODEL.FPN.BOTTOM_UP {builder!r} has no lazy form here; those that have: "
            f"{', '.join(_NODES)}. Give model.backbone.bottom_up a node of your own"
        )
    node = _NODES[builder]
    pixels = {"pixel_mean": f"${{{model}pixel_mean}}"}  # as many as an image has channels
    if node != "RESNETS":  # these put the model's normalisation into their own
        pixels["pixel_std"] = f"${{{model}pixel_std}}"
        has_format = cfg.MODEL.META_ARCHITECTURE != "ProposalNetwork"
        pixels["input_format"] = f"${{{model}input_format}}" if has_format else cfg.INPUT.FORMAT
    return L(build_network)(
        builder=builder,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        **pixels,
        **{node: {**_changed(cfg, node), "OUT_FEATURES": features}},
    )


def _backbone(cfg: CfgNode) -> DictConfig:
    if not _has_pyramid(cfg):
        known({"build_resnet_backbone": None}, "MODEL.BACKBONE.NAME", cfg.MODEL.BACKBONE.NAME)
        features = list(cfg.MODEL.RESNETS.OUT_FEATURES)
        return _network(cfg, cfg.MODEL.BACKBONE.NAME, features, "..")
    fpn = cfg.MODEL.FPN
    return L(build_pyramid)(
        bottom_up=_network(cfg, fpn.BOTTOM_UP, "${...in_features}", "..."),
        in_features=list(fpn.IN_FEATURES),
        out_channels=fpn.OUT_CHANNELS,
        norm=fpn.NORM,
        top_block=fpn.TOP_BLOCK,
        fuse_type=fpn.FUSE_TYPE,
        coarsest_output_conv=fpn.COARSEST_OUTPUT_CONV,
        top_down=fpn.TOP_DOWN,
        lateral=fpn.LATERAL,
        match_lateral_size=fpn.MATCH_LATERAL_SIZE,
        out_features=list(fpn.OUT_FEATURES) or None,
        freeze=fpn.FREEZE,
    )


def build_res5(**resnets: Any) -> nn.Sequential:
    """All of conv5 as a head, row (a), by the keys of MODEL.RESNETS."""
    cfg = _defaults()
    _set_keys(cfg, "RESNETS", resnets)
    return Res5ROIHeads._build_res5_block(cfg)[0]


# ---- meta-architectures


def _pixels(cfg: CfgNode) -> dict[str, Any]:
    return {"pixel_mean": list(cfg.MODEL.PIXEL_MEAN), "pixel_std": list(cfg.MODEL.PIXEL_STD)}


def _rcnn(cfg: CfgNode, target: type = GeneralizedRCNN, **more: Any) -> DictConfig:
    generators = {"PrecomputedProposals": lambda _: None, "RPN": _rpn}
    name = cfg.MODEL.PROPOSAL_GENERATOR.NAME
    return L(target)(
        backbone=_backbone(cfg),
        proposal_generator=known(generators, "MODEL.PROPOSAL_GENERATOR.NAME", name)(cfg),
        roi_heads=_roi_heads(cfg),
        **_pixels(cfg),
        input_format=cfg.INPUT.FORMAT,
        vis_period=cfg.VIS_PERIOD,
        **more,
    )


def _proposal_network(cfg: CfgNode) -> DictConfig:
    known({"RPN": _rpn}, "MODEL.PROPOSAL_GENERATOR.NAME", cfg.MODEL.PROPOSAL_GENERATOR.NAME)
    return L(ProposalNetwork)(backbone=_backbone(cfg), proposal_generator=_rpn(cfg), **_pixels(cfg))


def _panoptic(cfg: CfgNode) -> DictConfig:
    head, combine = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.PANOPTIC_FPN.COMBINE
    target = known({"SemSegFPNHead": SemSegFPNHead}, "MODEL.SEM_SEG_HEAD.NAME", head.NAME)
    strides = _strides(cfg, head.IN_FEATURES)
    return _rcnn(
        cfg,
        PanopticFPN,
        sem_seg_head=L(target)(
            input_shape={
                name: L(ShapeSpec)(channels=_channels(cfg, name, 4), stride=stride)
                for name, stride in zip(head.IN_FEATURES, strides, strict=True)
            },
            num_classes=head.NUM_CLASSES,
            conv_dims=head.CONVS_DIM,
            common_stride=head.COMMON_STRIDE,
            loss_weight=head.LOSS_WEIGHT,
            norm=head.NORM,
            ignore_value=head.IGNORE_VALUE,
        ),
        combine_overlap_thresh=combine.OVERLAP_THRESH,
        combine_stuff_area_thresh=combine.STUFF_AREA_LIMIT,
        combine_instances_score_thresh=combine.INSTANCES_CONFIDENCE_THRESH,
    )


def _retinanet(cfg: CfgNode) -> DictConfig:
    node = cfg.MODEL.RETINANET
    finest = node.IN_FEATURES[0]
    return L(RetinaNet)(
        backbone=_backbone(cfg),
        head=L(RetinaNetHead)(
            # One a level: a batch norm of this head has statistics for each.
            input_shape=[
                L(ShapeSpec)(channels=_channels(cfg, name, 4)) for name in node.IN_FEATURES
            ],
            num_classes="${..num_classes}",
            conv_dims=[_channels(cfg, finest, 3)] * node.NUM_CONVS,
            prior_prob=node.PRIOR_PROB,
            norm=node.NORM,
            num_anchors=_anchors_per_cell(cfg),
        ),
        head_in_features=list(node.IN_FEATURES),
        anchor_generator=_anchor_generator(cfg, node.IN_FEATURES),
        box2box_transform=L(Box2BoxTransform)(weights=list(node.BBOX_REG_WEIGHTS)),
        anchor_matcher=_matcher(node, low_quality=True),
        num_classes=node.NUM_CLASSES,
        focal_loss_alpha=node.FOCAL_LOSS_ALPHA,
        focal_loss_gamma=node.FOCAL_LOSS_GAMMA,
        smooth_l1_beta=node.SMOOTH_L1_LOSS_BETA,
        box_reg_loss_type=node.BBOX_REG_LOSS_TYPE,
        test_score_thresh=node.SCORE_THRESH_TEST,
        test_topk_candidates=node.TOPK_CANDIDATES_TEST,
        test_nms_thresh=node.NMS_THRESH_TEST,
        max_detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        **_pixels(cfg),
        input_format=cfg.INPUT.FORMAT,
        vis_period=cfg.VIS_PERIOD,
    )


# ---- region proposals


def _anchors_per_cell(cfg: CfgNode) -> int:
    node = cfg.MODEL.ANCHOR_GENERATOR
    return len(node.SIZES[0]) * len(node.ASPECT_RATIOS[0])


def _anchor_generator(cfg: CfgNode, levels: Sequence[str]) -> DictConfig:
    node = cfg.MODEL.ANCHOR_GENERATOR
    return L(
        known(
            {"DefaultAnchorGenerator": DefaultAnchorGenerator},
            "MODEL.ANCHOR_GENERATOR.NAME",
            node.NAME,
        )
    )(
        sizes=[list(sizes) for sizes in node.SIZES],
        aspect_ratios=[list(ratios) for ratios in node.ASPECT_RATIOS],
        strides=_strides(cfg, levels),
        offset=node.OFFSET,
    )


def _matcher(node: CfgNode, *, low_quality: bool) -> DictConfig:
    return L(Matcher)(
        thresholds=list(node.IOU_THRESHOLDS),
        labels=list(node.IOU_LABELS),
        allow_low_quality_matches=low_quality,
    )


def build_per_level_head(
    in_channels: list[int], num_anchors: int, conv_dims: list[int]
) -> nn.Module:
    """PerLevelRPNHead by its arguments instead of by a yacs config."""
    return PerLevelRPNHead.of(
        StandardRPNHead(in_channels=channels, num_anchors=num_anchors, conv_dims=conv_dims)
        for channels in in_channels
    )


def _rpn(cfg: CfgNode) -> DictConfig:
    node = cfg.MODEL.RPN
    levels = node.IN_FEATURES
    count, dims = _anchors_per_cell(cfg), list(node.CONV_DIMS)
    heads = {
        "StandardRPNHead": L(StandardRPNHead)(
            in_channels=_channels(cfg, levels[0], 3), num_anchors=count, conv_dims=dims
        ),
        "PerLevelRPNHead": L(build_per_level_head)(
            in_channels=[_channels(cfg, name, 4) for name in levels],
            num_anchors=count,
            conv_dims=dims,
        ),
    }
    return L(RPN)(
        in_features=list(node.IN_FEATURES),
        head=known(heads, "MODEL.RPN.HEAD_NAME", node.HEAD_NAME),
        anchor_generator=_anchor_generator(cfg, levels),
        anchor_matcher=_matcher(node, low_quality=True),
        box2box_transform=L(Box2BoxTransform)(weights=list(node.BBOX_REG_WEIGHTS)),
        batch_size_per_image=node.BATCH_SIZE_PER_IMAGE,
        positive_fraction=node.POSITIVE_FRACTION,
        pre_nms_topk=(node.PRE_NMS_TOPK_TRAIN, node.PRE_NMS_TOPK_TEST),
        post_nms_topk=(node.POST_NMS_TOPK_TRAIN, node.POST_NMS_TOPK_TEST),
        nms_thresh=node.NMS_THRESH,
        min_box_size=float(cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE),
        anchor_boundary_thresh=node.BOUNDARY_THRESH,
        loss_weight={
            "loss_rpn_cls": node.LOSS_WEIGHT,
            "loss_rpn_loc": node.BBOX_REG_LOSS_WEIGHT * node.LOSS_WEIGHT,
        },
        box_reg_loss_type=node.BBOX_REG_LOSS_TYPE,
        smooth_l1_beta=node.SMOOTH_L1_BETA,
    )


# ---- RoI heads


def _roi_heads(cfg: CfgNode) -> DictConfig:
    node = cfg.MODEL.ROI_HEADS
    common = {
        "num_classes": node.NUM_CLASSES,
        "batch_size_per_image": node.BATCH_SIZE_PER_IMAGE,
        "positive_fraction": node.POSITIVE_FRACTION,
        "proposal_append_gt": node.PROPOSAL_APPEND_GT,
    }
    kinds = {"FPNROIHeads": _fpn_heads, "FPNCascadeROIHeads": _cascade_heads,
             "Res5ROIHeads": _res5_heads}  # fmt: skip
    return known(kinds, "MODEL.ROI_HEADS.NAME", node.NAME)(cfg, common)


def _fpn_heads(cfg: CfgNode, common: dict[str, Any]) -> DictConfig:
    return L(FPNROIHeads)(
        **common,
        proposal_matcher=_matcher(cfg.MODEL.ROI_HEADS, low_quality=False),
        **_box(cfg),
        box_head=_box_head(cfg),
        box_predictor=_predictor(
            cfg, _box_features(cfg, "...box_head"), cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS
        ),
        **_mask(cfg),
        **_keypoints(cfg),
    )


def _cascade_heads(cfg: CfgNode, common: dict[str, Any]) -> DictConfig:
    stages = cfg.MODEL.ROI_BOX_CASCADE_HEAD
    return L(FPNCascadeROIHeads)(
        **common,
        proposal_matchers=[
            L(Matcher)(thresholds=[iou], labels=[0, 1], allow_low_quality_matches=False)
            for iou in stages.IOUS
        ],
        **_box(cfg),
        box_heads=[_box_head(cfg, depth=1) for _ in stages.IOUS],
        box_predictors=[
            _predictor(cfg, _box_features(cfg, f"....box_heads.{i}"), weights, depth=1)
            for i, weights in enumerate(stages.BBOX_REG_WEIGHTS)
        ],
        **_mask(cfg),
        **_keypoints(cfg),
    )


def _box(cfg: CfgNode) -> dict[str, Any]:
    return {
        "box_in_features": list(cfg.MODEL.ROI_HEADS.IN_FEATURES),
        "box_pooler": _pooler(cfg, cfg.MODEL.ROI_BOX_HEAD, PyramidROIPooler),
        "train_on_pred_boxes": cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES,
    }


def _res5_heads(cfg: CfgNode, common: dict[str, Any]) -> DictConfig:
    if cfg.MODEL.MASK_ON:
        raise UserError(
            "MODEL.MASK_ON with MODEL.ROI_HEADS.NAME 'Res5ROIHeads' has no lazy form here"
        )
    resnets = _changed(cfg, "RESNETS")
    resnets.pop("OUT_FEATURES", None)
    return L(Res5ROIHeads)(
        **common,
        proposal_matcher=_matcher(cfg.MODEL.ROI_HEADS, low_quality=False),
        in_features=list(cfg.MODEL.ROI_HEADS.IN_FEATURES),
        pooler=_pooler(cfg, cfg.MODEL.ROI_BOX_HEAD, ROIPooler),
        res5=L(build_res5)(**resnets),
        box_predictor=_predictor(
            cfg,
            L(ShapeSpec)(channels=cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 8, height=1, width=1),
            cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS,
        ),
    )


def _pooler(cfg: CfgNode, head: CfgNode, target: type) -> DictConfig:
    own = {}
    if target is PyramidROIPooler:
        own = {
            "canonical_box_size": cfg.MODEL.FPN.CANONICAL_BOX_SIZE,
            "canonical_level": cfg.MODEL.FPN.CANONICAL_LEVEL,
        }
    return L(target)(
        output_size=head.POOLER_RESOLUTION,
        scales=[1 / stride for stride in _strides(cfg, cfg.MODEL.ROI_HEADS.IN_FEATURES)],
        sampling_ratio=head.POOLER_SAMPLING_RATIO,
        pooler_type=head.POOLER_TYPE,
        **own,
    )


def _pooled(cfg: CfgNode, pooler: str, depth: int = 0) -> DictConfig:
    """What a head is given if it stands ``depth`` nodes below the RoI heads' own."""
    size = f"${{{'.' * (3 + depth)}{pooler}.output_size}}"
    channels = _channels(cfg, cfg.MODEL.ROI_HEADS.IN_FEATURES[0], 4 + depth)
    return L(ShapeSpec)(channels=channels, height=size, width=size)


def _box_head(cfg: CfgNode, depth: int = 0) -> DictConfig:
    node = cfg.MODEL.ROI_BOX_HEAD
    target = known({"FastRCNNConvFCHead": FastRCNNConvFCHead}, "MODEL.ROI_BOX_HEAD.NAME", node.NAME)
    return L(target)(
        input_shape=_pooled(cfg, "box_pooler", depth),
        conv_dims=[node.CONV_DIM] * node.NUM_CONV,
        fc_dims=[node.FC_DIM] * node.NUM_FC,
        conv_norm=node.NORM,
    )


def _box_features(cfg: CfgNode, head: str) -> DictConfig:
    """What a predictor is given by the box head at a place relative to this node."""
    last = cfg.MODEL.ROI_BOX_HEAD.NUM_FC - 1
    if last < 0:
        raise UserError(
            "MODEL.ROI_BOX_HEAD.NUM_FC 0 has no lazy form here: a box head ends in one "
            "fully-connected layer at least"
        )
    return L(ShapeSpec)(channels=f"${{{head}.fc_dims.{last}}}")


def _predictor(cfg: CfgNode, features: DictConfig, weights: Any, depth: int = 0) -> DictConfig:
    node, heads = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_HEADS
    return L(FastRCNNOutputLayers)(
        input_shape=features,
        box2box_transform=L(Box2BoxTransform)(weights=list(weights)),
        num_classes=f"${{{'.' * (2 + depth)}num_classes}}",
        cls_agnostic_bbox_reg=node.CLS_AGNOSTIC_BBOX_REG,
        smooth_l1_beta=node.SMOOTH_L1_BETA,
        test_score_thresh=heads.SCORE_THRESH_TEST,
        test_nms_thresh=heads.NMS_THRESH_TEST,
        test_topk_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        box_reg_loss_type=node.BBOX_REG_LOSS_TYPE,
        loss_weight={"loss_box_reg": node.BBOX_REG_LOSS_WEIGHT},
        # Detectron2 0.6 does not have it yet.
        **({"use_sigmoid_ce": True} if node.get("USE_SIGMOID_CE") else {}),
    )


def _mask(cfg: CfgNode) -> dict[str, Any]:
    if not cfg.MODEL.MASK_ON:
        return {}
    node = cfg.MODEL.ROI_MASK_HEAD
    target = known(
        {"MaskRCNNConvUpsampleHead": MaskRCNNConvUpsampleHead},
        "MODEL.ROI_MASK_HEAD.NAME",
        node.NAME,
    )
    return {
        "mask_in_features": list(cfg.MODEL.ROI_HEADS.IN_FEATURES),
        "mask_pooler": _pooler(cfg, node, PyramidROIPooler),
        "mask_head": L(target)(
            input_shape=_pooled(cfg, "mask_pooler"),
            num_classes=1 if node.CLS_AGNOSTIC_MASK else "${..num_classes}",
            conv_dims=[node.CONV_DIM] * (node.NUM_CONV + 1),
            conv_norm=node.NORM,
            vis_period=cfg.VIS_PERIOD,
        ),
    }


def _keypoints(cfg: CfgNode) -> dict[str, Any]:
    if not cfg.MODEL.KEYPOINT_ON:
        return {}
    node = cfg.MODEL.ROI_KEYPOINT_HEAD
    target = known(
        {"KRCNNConvDeconvUpsampleHead": KRCNNConvDeconvUpsampleHead},
        "MODEL.ROI_KEYPOINT_HEAD.NAME",
        node.NAME,
    )
    normalizer: Any = "visible"
    if not node.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS:
        heads = cfg.MODEL.ROI_HEADS
        normalizer = node.NUM_KEYPOINTS * heads.BATCH_SIZE_PER_IMAGE * heads.POSITIVE_FRACTION
    return {
        "keypoint_in_features": list(cfg.MODEL.ROI_HEADS.IN_FEATURES),
        "keypoint_pooler": _pooler(cfg, node, PyramidROIPooler),
        "keypoint_head": L(target)(
            input_shape=_pooled(cfg, "keypoint_pooler"),
            num_keypoints=node.NUM_KEYPOINTS,
            conv_dims=list(node.CONV_DIMS),
            loss_weight=node.LOSS_WEIGHT,
            loss_normalizer=normalizer,
        ),
    }


def with_pyramid(model: DictConfig) -> DictConfig:
    """A lazy model of Detectron2's with this plugin's pyramid and poolers in place of its own.

    Args:
        model: with a node of Detectron2's FPN, whose arguments are kept; changed in place.

    Raises:
        UserError: there is no such node in it.
    """
    found = 0
    nodes = [model]
    while nodes:
        node = nodes.pop()
        if OmegaConf.is_dict(node):
            target = node.get("_target_")
            if target in (FPN, f"{FPN.__module__}.{FPN.__name__}", "detectron2.modeling.FPN"):
                if node.pop("square_pad", 0):
                    raise UserError("square_pad of detectron2.modeling.FPN has no like here")
                node._target_ = FeaturePyramidNetwork
                node.coarsest_output_conv = True
                found += 1
            elif target in (ROIPooler, f"{ROIPooler.__module__}.{ROIPooler.__name__}"):
                node._target_ = PyramidROIPooler
            nodes += [node._get_node(key) for key in node]
        elif OmegaConf.is_list(node):
            nodes += [node._get_node(i) for i in range(len(node))]
    if not found:
        raise UserError("the model has no node of detectron2.modeling.FPN to put this pyramid for")
    return model

"""A yacs config's model as lazy nodes, each the class that is built and its arguments."""

from __future__ import annotations

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
from fpn_plugin.errors import UserError
from fpn_plugin.modeling import (
    FeaturePyramidNetwork,
    FPNCascadeROIHeads,
    FPNROIHeads,
    PerLevelRPNHead,
    PyramidROIPooler,
)
from fpn_plugin.modeling.bottom_up import frozen
from fpn_plugin.modeling.neck import build_top_block

__all__ = ["build_network", "build_per_level_head", "build_res5", "model_node", "with_pyramid"]


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
        pixel_mean: likewise; Detectron2's default by default.
        pixel_std: likewise.
        nodes: nodes under MODEL with the keys that differ from their defaults, for example
            ``RESNETS={"DEPTH": 101}``.
    """
    cfg = get_cfg()
    add_fpn_config(cfg)
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    cfg.INPUT.FORMAT = input_format
    cfg.MODEL.PIXEL_MEAN = list(pixel_mean or cfg.MODEL.PIXEL_MEAN)
    cfg.MODEL.PIXEL_STD = list(pixel_std or cfg.MODEL.PIXEL_STD)
    for node, keys in nodes.items():
        for key, value in keys.items():
            cfg.MODEL[node][key] = (
                OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
            )
    return BACKBONE_REGISTRY.get(builder)(cfg, ShapeSpec(channels=3))


def model_node(cfg: CfgNode) -> DictConfig:
    """The model of a yacs config as a lazy node.

    Args:
        cfg: with the plugin's keys.

    Raises:
        UserError: a part that has no lazy form here.
    """
    kinds = {
        "GeneralizedRCNN": _rcnn,
        "PanopticFPN": _panoptic,
        "ProposalNetwork": _proposal_network,
        "RetinaNet": _retinanet,
    }
    return known(kinds, "MODEL.META_ARCHITECTURE", cfg.MODEL.META_ARCHITECTURE)(cfg)


def known(table: dict[str, Any], key: str, value: str) -> Any:
    """What a table has for the value of a key; a UserError names what it has, where not that."""
    if value not in table:
        raise UserError(
            f"{key} {value!r} has no lazy form here; those that have: {', '.join(table)}"
        )
    return table[value]


# ---- backbone


def _shapes(cfg: CfgNode) -> dict[str, ShapeSpec]:
    """Channels and stride of every map that a config's backbone gives."""
    if cfg.MODEL.BACKBONE.NAME == "build_fpn_backbone":
        return {
            f"p{level}": ShapeSpec(channels=cfg.MODEL.FPN.OUT_CHANNELS, stride=2**level)
            for level in range(1, 9)
        }
    base = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS
    return {f"res{k}": ShapeSpec(channels=base * 2 ** (k - 2), stride=2**k) for k in (2, 3, 4, 5)}


def _network(cfg: CfgNode, builder: str, features: list[str]) -> DictConfig:
    if builder != "build_resnet_backbone":
        raise UserError(
            f"{builder!r} has no lazy form here; give its node to model.backbone yourself"
        )
    defaults = get_cfg().MODEL.RESNETS
    keys = {k: v for k, v in cfg.MODEL.RESNETS.items() if v != defaults[k]}
    return L(build_network)(
        builder=builder,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        RESNETS={**keys, "OUT_FEATURES": list(features)},
    )


def _backbone(cfg: CfgNode) -> DictConfig:
    if cfg.MODEL.BACKBONE.NAME != "build_fpn_backbone":
        return _network(cfg, cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RESNETS.OUT_FEATURES)
    fpn = cfg.MODEL.FPN
    coarsest = fpn.IN_FEATURES[-1]
    in_channels = cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 2 ** (int(coarsest[3:]) - 2)
    neck = L(FeaturePyramidNetwork)(
        bottom_up=_network(cfg, fpn.BOTTOM_UP, fpn.IN_FEATURES),
        in_features=list(fpn.IN_FEATURES),
        out_channels=fpn.OUT_CHANNELS,
        norm=fpn.NORM,
        top_block=L(build_top_block)(
            name=fpn.TOP_BLOCK,
            coarsest_stage=coarsest,
            coarsest_level=int(coarsest[3:]),
            in_channels=in_channels,
            out_channels="${..out_channels}",
        ),
        fuse_type=fpn.FUSE_TYPE,
        coarsest_output_conv=fpn.COARSEST_OUTPUT_CONV,
        top_down=fpn.TOP_DOWN,
        lateral=fpn.LATERAL,
        match_lateral_size=fpn.MATCH_LATERAL_SIZE,
        out_features=list(fpn.OUT_FEATURES) or None,
    )
    return L(frozen)(neck=neck) if fpn.FREEZE else neck


def build_res5(**resnets: Any) -> nn.Sequential:
    """All of conv5 as a head, row (a), by the keys of MODEL.RESNETS."""
    cfg = get_cfg()
    for key, value in resnets.items():
        cfg.MODEL.RESNETS[key] = value
    return Res5ROIHeads._build_res5_block(cfg)[0]


# ---- meta-architectures


def _pixels(cfg: CfgNode) -> dict[str, Any]:
    return {"pixel_mean": list(cfg.MODEL.PIXEL_MEAN), "pixel_std": list(cfg.MODEL.PIXEL_STD)}


def _rcnn(cfg: CfgNode, target: type = GeneralizedRCNN, **more: Any) -> DictConfig:
    precomputed = cfg.MODEL.PROPOSAL_GENERATOR.NAME == "PrecomputedProposals"
    return L(target)(
        backbone=_backbone(cfg),
        proposal_generator=None if precomputed else _rpn(cfg),
        roi_heads=_roi_heads(cfg),
        **_pixels(cfg),
        input_format=cfg.INPUT.FORMAT,
        vis_period=cfg.VIS_PERIOD,
        **more,
    )


def _proposal_network(cfg: CfgNode) -> DictConfig:
    return L(ProposalNetwork)(backbone=_backbone(cfg), proposal_generator=_rpn(cfg), **_pixels(cfg))


def _panoptic(cfg: CfgNode) -> DictConfig:
    head, combine = cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.PANOPTIC_FPN.COMBINE
    shapes = _shapes(cfg)
    return _rcnn(
        cfg,
        PanopticFPN,
        sem_seg_head=L(SemSegFPNHead)(
            input_shape={
                k: L(ShapeSpec)(channels=shapes[k].channels, stride=shapes[k].stride)
                for k in head.IN_FEATURES
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
    node, shapes = cfg.MODEL.RETINANET, _shapes(cfg)
    levels = [shapes[name] for name in node.IN_FEATURES]
    channels = levels[0].channels
    return L(RetinaNet)(
        backbone=_backbone(cfg),
        head=L(RetinaNetHead)(
            input_shape=[L(ShapeSpec)(channels=channels)],
            num_classes="${..num_classes}",
            conv_dims=[channels] * node.NUM_CONVS,
            prior_prob=node.PRIOR_PROB,
            norm=node.NORM,
            num_anchors=_anchors_per_cell(cfg),
        ),
        head_in_features=list(node.IN_FEATURES),
        anchor_generator=_anchor_generator(cfg, levels),
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


def _anchor_generator(cfg: CfgNode, levels: list[ShapeSpec]) -> DictConfig:
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
        strides=[level.stride for level in levels],
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
    node, shapes = cfg.MODEL.RPN, _shapes(cfg)
    levels = [shapes[name] for name in node.IN_FEATURES]
    count, dims = _anchors_per_cell(cfg), list(node.CONV_DIMS)
    heads = {
        "StandardRPNHead": L(StandardRPNHead)(
            in_channels=levels[0].channels, num_anchors=count, conv_dims=dims
        ),
        "PerLevelRPNHead": L(build_per_level_head)(
            in_channels=[level.channels for level in levels], num_anchors=count, conv_dims=dims
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
    head, features, fc_dim = _box_head(cfg)
    return L(FPNROIHeads)(
        **common,
        proposal_matcher=_matcher(cfg.MODEL.ROI_HEADS, low_quality=False),
        box_in_features=features,
        box_pooler=_pooler(cfg, cfg.MODEL.ROI_BOX_HEAD, PyramidROIPooler),
        box_head=head,
        box_predictor=_predictor(cfg, fc_dim, cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS),
        train_on_pred_boxes=cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES,
        **_mask(cfg),
        **_keypoints(cfg),
    )


def _cascade_heads(cfg: CfgNode, common: dict[str, Any]) -> DictConfig:
    stages = cfg.MODEL.ROI_BOX_CASCADE_HEAD
    _, features, fc_dim = _box_head(cfg)
    return L(FPNCascadeROIHeads)(
        **common,
        proposal_matchers=[
            L(Matcher)(thresholds=[iou], labels=[0, 1], allow_low_quality_matches=False)
            for iou in stages.IOUS
        ],
        box_in_features=features,
        box_pooler=_pooler(cfg, cfg.MODEL.ROI_BOX_HEAD, PyramidROIPooler),
        box_heads=[_box_head(cfg)[0] for _ in stages.IOUS],
        box_predictors=[_predictor(cfg, fc_dim, weights) for weights in stages.BBOX_REG_WEIGHTS],
        **_mask(cfg),
        **_keypoints(cfg),
    )


def _res5_heads(cfg: CfgNode, common: dict[str, Any]) -> DictConfig:
    defaults = get_cfg().MODEL.RESNETS
    resnets = {k: v for k, v in cfg.MODEL.RESNETS.items() if v != defaults[k]}
    resnets.pop("OUT_FEATURES", None)
    return L(Res5ROIHeads)(
        **common,
        proposal_matcher=_matcher(cfg.MODEL.ROI_HEADS, low_quality=False),
        in_features=list(cfg.MODEL.ROI_HEADS.IN_FEATURES),
        pooler=_pooler(cfg, cfg.MODEL.ROI_BOX_HEAD, ROIPooler),
        res5=L(build_res5)(**resnets),
        box_predictor=_predictor(
            cfg,
            cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 8,
            cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS,
            height=1,
            width=1,
        ),
    )


def _pooler(cfg: CfgNode, head: CfgNode, target: type) -> DictConfig:
    shapes = _shapes(cfg)
    own = {}
    if target is PyramidROIPooler:
        own = {
            "canonical_box_size": cfg.MODEL.FPN.CANONICAL_BOX_SIZE,
            "canonical_level": cfg.MODEL.FPN.CANONICAL_LEVEL,
        }
    return L(target)(
        output_size=head.POOLER_RESOLUTION,
        scales=[1 / shapes[name].stride for name in cfg.MODEL.ROI_HEADS.IN_FEATURES],
        sampling_ratio=head.POOLER_SAMPLING_RATIO,
        pooler_type=head.POOLER_TYPE,
        **own,
    )


def _pooled(cfg: CfgNode, head: CfgNode) -> DictConfig:
    channels = _shapes(cfg)[cfg.MODEL.ROI_HEADS.IN_FEATURES[0]].channels
    size = head.POOLER_RESOLUTION
    return L(ShapeSpec)(channels=channels, height=size, width=size)


def _box_head(cfg: CfgNode) -> tuple[DictConfig, list[str], int]:
    """Its node, the levels it reads, and the channels it gives."""
    node = cfg.MODEL.ROI_BOX_HEAD
    target = known({"FastRCNNConvFCHead": FastRCNNConvFCHead}, "MODEL.ROI_BOX_HEAD.NAME", node.NAME)
    head = L(target)(
        input_shape=_pooled(cfg, node),
        conv_dims=[node.CONV_DIM] * node.NUM_CONV,
        fc_dims=[node.FC_DIM] * node.NUM_FC,
        conv_norm=node.NORM,
    )
    return head, list(cfg.MODEL.ROI_HEADS.IN_FEATURES), node.FC_DIM


def _predictor(cfg: CfgNode, channels: int, weights: Any, **size: int) -> DictConfig:
    node, heads = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_HEADS
    return L(FastRCNNOutputLayers)(
        input_shape=L(ShapeSpec)(channels=channels, **size),
        box2box_transform=L(Box2BoxTransform)(weights=list(weights)),
        num_classes=heads.NUM_CLASSES,
        cls_agnostic_bbox_reg=node.CLS_AGNOSTIC_BBOX_REG,
        smooth_l1_beta=node.SMOOTH_L1_BETA,
        test_score_thresh=heads.SCORE_THRESH_TEST,
        test_nms_thresh=heads.NMS_THRESH_TEST,
        test_topk_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        box_reg_loss_type=node.BBOX_REG_LOSS_TYPE,
        loss_weight={"loss_box_reg": node.BBOX_REG_LOSS_WEIGHT},
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
            input_shape=_pooled(cfg, node),
            num_classes=1 if node.CLS_AGNOSTIC_MASK else cfg.MODEL.ROI_HEADS.NUM_CLASSES,
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
            input_shape=_pooled(cfg, node),
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

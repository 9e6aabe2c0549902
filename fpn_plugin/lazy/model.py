"""The model of a yacs config as lazy nodes: each names a class, and its arguments."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

from detectron2.config import CfgNode, get_cfg
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
    SegmentProposals,
)
from fpn_plugin.modeling.bottom_up import (
    PYRAMIDS,
    build_image_pyramid,
    build_image_pyramid_backbone,
    build_pyramid,
    refuse_merging_keys,
)

from .keys import newer_keys

__all__ = [
    "build_network",
    "build_per_level_head",
    "build_res5",
    "config_of",
    "known",
    "model_node",
    "node",
    "refuse_changed",
    "with_pyramid",
]

# The section of MODEL that each builder reads.
_SECTIONS = {
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
    **sections: dict[str, Any],
) -> Backbone:
    """A network from the BACKBONE registry, by the keys that its builder reads.

    Args:
        builder: its name in the registry.
        freeze_at: MODEL.BACKBONE.FREEZE_AT.
        input_format: the model's. Networks of timm and torchvision read it.
        pixel_mean: the model's, a value for each channel of an image (default: Detectron2's).
            Networks of timm and torchvision read the values.
        pixel_std: the model's (default: Detectron2's). Networks of timm and torchvision read it.
        sections: sections of MODEL with the keys that differ from their defaults, such as
            ``RESNETS={"DEPTH": 101}``.

    Raises:
        UserError: the builder, a section or a key does not exist, or a value has the wrong type.
    """
    cfg = _defaults()
    if builder not in BACKBONE_REGISTRY:
        names = [name for name, _ in BACKBONE_REGISTRY]
        raise UserError(
            f"builder {builder!r} is not in the BACKBONE registry: {near_names(builder, names)} "
            "Import the module that registers it"
        )
    cfg.MODEL.BACKBONE.FREEZE_AT = freeze_at
    cfg.INPUT.FORMAT = input_format
    cfg.MODEL.PIXEL_MEAN = list(pixel_mean or cfg.MODEL.PIXEL_MEAN)
    cfg.MODEL.PIXEL_STD = list(pixel_std or cfg.MODEL.PIXEL_STD)
    names = [name for name, value in cfg.MODEL.items() if isinstance(value, CfgNode)]
    for section, keys in sections.items():
        if section not in names:
            raise UserError(
                f"{builder} is given {section!r}, no section of MODEL: {near_names(section, names)}"
            )
        _set_keys(cfg, section, keys)
    return BACKBONE_REGISTRY.get(builder)(cfg, ShapeSpec(channels=len(cfg.MODEL.PIXEL_MEAN)))


def _defaults() -> CfgNode:
    cfg = get_cfg()
    add_fpn_config(cfg)
    return cfg


@functools.cache
def _unchanged() -> CfgNode:
    """The defaults, to compare with. They are slow to make."""
    return _defaults()


def _set_keys(cfg: CfgNode, section: str, keys: dict[str, Any]) -> None:
    """Sets keys of a section of MODEL."""
    for key, value in keys.items():
        path, known_keys = f"MODEL.{section}", cfg.MODEL[section]
        if key not in known_keys:
            raise UserError(f"{path} has no key {key!r}: {near_names(key, known_keys)}")
        plain = OmegaConf.to_object(value) if OmegaConf.is_config(value) else value
        try:
            cfg.merge_from_list([f"{path}.{key}", plain])
        except ValueError as error:  # of another type
            raise UserError(f"{path}.{key}: {' '.join(str(error).split())}") from error


def model_node(cfg: CfgNode) -> DictConfig:
    """The model of a yacs config as a lazy node.

    Args:
        cfg: with the plugin's keys.

    Raises:
        UserError: a part or a setting has no lazy form here.
    """
    refuse_changed(
        cfg,
        "MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT",
        "MODEL.PANOPTIC_FPN.COMBINE.ENABLED",
        "MODEL.ROI_BOX_HEAD.USE_FED_LOSS",
        *newer_keys(),
    )
    architecture = known(
        cfg,
        "MODEL.META_ARCHITECTURE",
        GeneralizedRCNN=_rcnn,
        PanopticFPN=_panoptic,
        ProposalNetwork=_proposal_network,
        RetinaNet=_retinanet,
    )
    return config_of(architecture(cfg))


def node(target: Callable[..., Any], **arguments: Any) -> dict[str, Any]:
    """A lazy node as a dict, which :func:`config_of` makes a config of.

    Nodes by Detectron2's ``LazyCall`` are configs, and OmegaConf copies each of them once for every
    node around it.
    """
    return {"_target_": target, **arguments}


def config_of(nodes: dict[str, Any]) -> DictConfig:
    """The lazy config of nodes."""
    return OmegaConf.create(nodes, flags={"allow_objects": True})


def known(cfg: CfgNode, key: str, **choices: Any) -> Any:
    """The choice for the value of a key.

    Raises:
        UserError: there is none; names the values that have one.
    """
    value = _value(cfg, key)
    if value not in choices:
        raise UserError(
            f"{key} {value!r} has no lazy form here; expected {', '.join(choices)}, or a lazy node "
            "of your own"
        )
    return choices[value]


def refuse_changed(cfg: CfgNode, *keys: str) -> None:
    """Refuses values of keys that lazy nodes do not have, unless they are the defaults."""
    for key in keys:
        value, default = _value(cfg, key), _value(_unchanged(), key)
        if value != default:
            raise UserError(
                f"{key} {value!r} has no lazy form here: leave it {default!r}, and set what it "
                "does in the lazy config"
            )


def _value(cfg: CfgNode, key: str) -> Any:
    for part in key.split("."):
        cfg = cfg.get(part, CfgNode())  # Detectron2 0.6 does not have every key
    return cfg


# ---- backbone


def _has_pyramid(cfg: CfgNode) -> bool:
    return cfg.MODEL.BACKBONE.NAME in PYRAMIDS


def _strides(cfg: CfgNode, names: Sequence[str]) -> list[int]:
    """Strides of the backbone's maps: 2^k for p{k} of a pyramid and res{k} of a ResNet."""
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
    """Channels of a map of the backbone; the model's node is ``depth`` nodes up.

    Those of a pyramid refer to its node, so that there is one place to change them.
    """
    if _has_pyramid(cfg):
        return f"${{{'.' * depth}backbone.out_channels}}"
    return cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 2 ** (int(name.removeprefix("res")) - 2)


def _shape(channels: int | str, **more: Any) -> dict[str, Any]:
    # By name: OmegaConf cannot hold a dataclass.
    return {"_target_": "detectron2.layers.ShapeSpec", "channels": channels, **more}


def _changed(cfg: CfgNode, section: str) -> dict[str, Any]:
    """The keys of a section of MODEL that differ from their defaults."""
    defaults = _unchanged().MODEL[section]
    return {k: v for k, v in cfg.MODEL[section].items() if v != defaults[k]}


def _network(cfg: CfgNode, builder: str, features: list[str] | str, model: str) -> dict[str, Any]:
    """A bottom-up network; ``model`` is the dots that lead to the model's node."""
    section = _SECTIONS[builder]
    pixels = {"pixel_mean": f"${{{model}pixel_mean}}"}  # as many as an image has channels
    if section != "RESNETS":  # these put the model's normalisation into their own
        pixels["pixel_std"] = f"${{{model}pixel_std}}"
        has_format = cfg.MODEL.META_ARCHITECTURE != "ProposalNetwork"
        pixels["input_format"] = f"${{{model}input_format}}" if has_format else cfg.INPUT.FORMAT
    keys = {section: {**_changed(cfg, section), "OUT_FEATURES": features}}
    freeze_at = cfg.MODEL.BACKBONE.FREEZE_AT
    return node(build_network, builder=builder, freeze_at=freeze_at, **pixels, **keys)


def _backbone(cfg: CfgNode) -> dict[str, Any]:
    if not _has_pyramid(cfg):
        known(cfg, "MODEL.BACKBONE.NAME", build_resnet_backbone=None)
        features = list(cfg.MODEL.RESNETS.OUT_FEATURES)
        return _network(cfg, cfg.MODEL.BACKBONE.NAME, features, "..")
    fpn = cfg.MODEL.FPN
    known(cfg, "MODEL.FPN.BOTTOM_UP", **_SECTIONS)
    shared = {
        "bottom_up": _network(cfg, fpn.BOTTOM_UP, "${...in_features}", "..."),
        "in_features": list(fpn.IN_FEATURES),
        "out_channels": fpn.OUT_CHANNELS,
        "norm": fpn.NORM,
        "top_block": fpn.TOP_BLOCK,
        "freeze": fpn.FREEZE,
    }
    if build_image_pyramid_backbone.__name__ == cfg.MODEL.BACKBONE.NAME:
        refuse_merging_keys(fpn)
        return node(build_image_pyramid, **shared, image_scales=list(fpn.IMAGE_SCALES))
    return node(
        build_pyramid,
        **shared,
        fuse_type=fpn.FUSE_TYPE,
        coarsest_output_conv=fpn.COARSEST_OUTPUT_CONV,
        top_down=fpn.TOP_DOWN,
        lateral=fpn.LATERAL,
        match_lateral_size=fpn.MATCH_LATERAL_SIZE,
        out_features=list(fpn.OUT_FEATURES) or None,
    )


def build_res5(**resnets: Any) -> nn.Sequential:
    """All of conv5 as a head, row (a) of the paper's Table 1, by the keys of MODEL.RESNETS."""
    cfg = _defaults()
    _set_keys(cfg, "RESNETS", resnets)
    return Res5ROIHeads._build_res5_block(cfg)[0]


# ---- meta-architectures


def _pixels(cfg: CfgNode) -> dict[str, Any]:
    return {"pixel_mean": list(cfg.MODEL.PIXEL_MEAN), "pixel_std": list(cfg.MODEL.PIXEL_STD)}


def _rcnn(cfg: CfgNode, target: type = GeneralizedRCNN, **more: Any) -> dict[str, Any]:
    name = "MODEL.PROPOSAL_GENERATOR.NAME"
    proposals = known(cfg, name, RPN=_rpn, PrecomputedProposals=lambda _: None)
    return node(
        target,
        backbone=_backbone(cfg),
        proposal_generator=proposals(cfg),
        roi_heads=_roi_heads(cfg),
        **_pixels(cfg),
        input_format=cfg.INPUT.FORMAT,
        vis_period=cfg.VIS_PERIOD,
        **more,
    )


def _proposal_network(cfg: CfgNode) -> dict[str, Any]:
    generators = {"RPN": _rpn, "SegmentProposals": _segment_proposals}
    generator = known(cfg, "MODEL.PROPOSAL_GENERATOR.NAME", **generators)(cfg)
    return node(
        ProposalNetwork, backbone=_backbone(cfg), proposal_generator=generator, **_pixels(cfg)
    )


def _panoptic(cfg: CfgNode) -> dict[str, Any]:
    names, combine = cfg.MODEL.SEM_SEG_HEAD.IN_FEATURES, cfg.MODEL.PANOPTIC_FPN.COMBINE
    head = known(cfg, "MODEL.SEM_SEG_HEAD.NAME", SemSegFPNHead=SemSegFPNHead)
    shapes = {
        name: _shape(_channels(cfg, name, 4), stride=stride)
        for name, stride in zip(names, _strides(cfg, names), strict=True)
    }
    return _rcnn(
        cfg,
        PanopticFPN,
        sem_seg_head=node(head, **head.from_config(cfg, shapes)),
        combine_overlap_thresh=combine.OVERLAP_THRESH,
        combine_stuff_area_thresh=combine.STUFF_AREA_LIMIT,
        combine_instances_score_thresh=combine.INSTANCES_CONFIDENCE_THRESH,
    )


def _retinanet(cfg: CfgNode) -> dict[str, Any]:
    section = cfg.MODEL.RETINANET
    levels = list(section.IN_FEATURES)
    return node(
        RetinaNet,
        backbone=_backbone(cfg),
        head=node(
            RetinaNetHead,
            # One a level: a batch norm of this head has statistics for each.
            input_shape=[_shape(_channels(cfg, name, 4)) for name in levels],
            num_classes="${..num_classes}",
            conv_dims=[_channels(cfg, levels[0], 3)] * section.NUM_CONVS,
            prior_prob=section.PRIOR_PROB,
            norm=section.NORM,
            num_anchors=_anchors_per_cell(cfg),
        ),
        head_in_features=levels,
        anchor_generator=_anchor_generator(cfg, levels),
        box2box_transform=_transform(section.BBOX_REG_WEIGHTS),
        anchor_matcher=_matcher(section, low_quality=True),
        num_classes=section.NUM_CLASSES,
        focal_loss_alpha=section.FOCAL_LOSS_ALPHA,
        focal_loss_gamma=section.FOCAL_LOSS_GAMMA,
        smooth_l1_beta=section.SMOOTH_L1_LOSS_BETA,
        box_reg_loss_type=section.BBOX_REG_LOSS_TYPE,
        test_score_thresh=section.SCORE_THRESH_TEST,
        test_topk_candidates=section.TOPK_CANDIDATES_TEST,
        test_nms_thresh=section.NMS_THRESH_TEST,
        max_detections_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        **_pixels(cfg),
        input_format=cfg.INPUT.FORMAT,
        vis_period=cfg.VIS_PERIOD,
    )


# ---- region proposals


def _anchors_per_cell(cfg: CfgNode) -> int:
    anchors = cfg.MODEL.ANCHOR_GENERATOR
    return len(anchors.SIZES[0]) * len(anchors.ASPECT_RATIOS[0])


def _anchor_generator(cfg: CfgNode, levels: Sequence[str]) -> dict[str, Any]:
    name = "MODEL.ANCHOR_GENERATOR.NAME"
    target = known(cfg, name, DefaultAnchorGenerator=DefaultAnchorGenerator)
    shapes = [ShapeSpec(stride=stride) for stride in _strides(cfg, levels)]
    return node(target, **target.from_config(cfg, shapes))


def _matcher(section: CfgNode, *, low_quality: bool) -> dict[str, Any]:
    return node(
        Matcher,
        thresholds=list(section.IOU_THRESHOLDS),
        labels=list(section.IOU_LABELS),
        allow_low_quality_matches=low_quality,
    )


def _transform(weights: Sequence[float]) -> dict[str, Any]:
    return node(Box2BoxTransform, weights=list(weights))


def build_per_level_head(
    in_channels: list[int], num_anchors: int | list[int], conv_dims: list[int]
) -> nn.Module:
    """PerLevelRPNHead by its arguments instead of by a yacs config; anchors may be by level."""
    if isinstance(num_anchors, int):
        num_anchors = [num_anchors] * len(in_channels)
    return PerLevelRPNHead.of(
        StandardRPNHead(in_channels=channels, num_anchors=count, conv_dims=conv_dims)
        for channels, count in zip(in_channels, num_anchors, strict=True)
    )


def _rpn(cfg: CfgNode) -> dict[str, Any]:
    section = cfg.MODEL.RPN
    levels = list(section.IN_FEATURES)
    head, channels = known(
        cfg,
        "MODEL.RPN.HEAD_NAME",
        StandardRPNHead=(StandardRPNHead, _channels(cfg, levels[0], 3)),
        PerLevelRPNHead=(build_per_level_head, [_channels(cfg, name, 4) for name in levels]),
    )
    anchors, dims = _anchors_per_cell(cfg), list(section.CONV_DIMS)
    sizes = cfg.MODEL.ANCHOR_GENERATOR.SIZES
    if head is build_per_level_head and len({len(of_level) for of_level in sizes}) > 1:
        ratios = cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS
        anchors = [len(s) * len(ratios[i % len(ratios)]) for i, s in enumerate(sizes)]
    return node(
        RPN,
        in_features=levels,
        head=node(head, in_channels=channels, num_anchors=anchors, conv_dims=dims),
        anchor_generator=_anchor_generator(cfg, levels),
        anchor_matcher=_matcher(section, low_quality=True),
        box2box_transform=_transform(section.BBOX_REG_WEIGHTS),
        batch_size_per_image=section.BATCH_SIZE_PER_IMAGE,
        positive_fraction=section.POSITIVE_FRACTION,
        pre_nms_topk=(section.PRE_NMS_TOPK_TRAIN, section.PRE_NMS_TOPK_TEST),
        post_nms_topk=(section.POST_NMS_TOPK_TRAIN, section.POST_NMS_TOPK_TEST),
        nms_thresh=section.NMS_THRESH,
        min_box_size=float(cfg.MODEL.PROPOSAL_GENERATOR.MIN_SIZE),
        anchor_boundary_thresh=section.BOUNDARY_THRESH,
        loss_weight={
            "loss_rpn_cls": section.LOSS_WEIGHT,
            "loss_rpn_loc": section.BBOX_REG_LOSS_WEIGHT * section.LOSS_WEIGHT,
        },
        box_reg_loss_type=section.BBOX_REG_LOSS_TYPE,
        smooth_l1_beta=section.SMOOTH_L1_BETA,
    )


def _segment_proposals(cfg: CfgNode) -> dict[str, Any]:
    section = cfg.MODEL.SEGMENT_PROPOSALS
    levels = list(section.IN_FEATURES)
    shapes = {
        name: ShapeSpec(channels=1, stride=stride)
        for name, stride in zip(levels, _strides(cfg, levels), strict=True)
    }
    arguments = SegmentProposals.from_config(cfg, shapes)
    arguments["in_channels"] = _channels(cfg, levels[0], 2)
    return node(SegmentProposals, **arguments)


# ---- RoI heads


def _roi_heads(cfg: CfgNode) -> dict[str, Any]:
    heads = {"FPNROIHeads": _fpn_heads, "FPNCascadeROIHeads": _cascade_heads}
    kind = known(cfg, "MODEL.ROI_HEADS.NAME", **heads, Res5ROIHeads=_res5_heads)
    section = cfg.MODEL.ROI_HEADS
    common = {
        "num_classes": section.NUM_CLASSES,
        "batch_size_per_image": section.BATCH_SIZE_PER_IMAGE,
        "positive_fraction": section.POSITIVE_FRACTION,
        "proposal_append_gt": section.PROPOSAL_APPEND_GT,
    }
    return kind(cfg, common)


def _fpn_heads(cfg: CfgNode, common: dict[str, Any]) -> dict[str, Any]:
    weights = cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS
    return node(
        FPNROIHeads,
        **common,
        proposal_matcher=_matcher(cfg.MODEL.ROI_HEADS, low_quality=False),
        box_head=_box_head(cfg),
        box_predictor=_predictor(cfg, _box_features(cfg, "...box_head"), weights),
        **_pooled_parts(cfg),
    )


def _cascade_heads(cfg: CfgNode, common: dict[str, Any]) -> dict[str, Any]:
    stages = cfg.MODEL.ROI_BOX_CASCADE_HEAD
    return node(
        FPNCascadeROIHeads,
        **common,
        proposal_matchers=[
            node(Matcher, thresholds=[iou], labels=[0, 1], allow_low_quality_matches=False)
            for iou in stages.IOUS
        ],
        box_heads=[_box_head(cfg, depth=1) for _ in stages.IOUS],
        box_predictors=[
            _predictor(cfg, _box_features(cfg, f"....box_heads.{i}"), weights, depth=1)
            for i, weights in enumerate(stages.BBOX_REG_WEIGHTS)
        ],
        **_pooled_parts(cfg),
    )


def _res5_heads(cfg: CfgNode, common: dict[str, Any]) -> dict[str, Any]:
    if cfg.MODEL.MASK_ON:
        raise UserError(
            "MODEL.MASK_ON with MODEL.ROI_HEADS.NAME 'Res5ROIHeads' has no lazy form here"
        )
    resnets = _changed(cfg, "RESNETS")
    resnets.pop("OUT_FEATURES", None)
    features = _shape(cfg.MODEL.RESNETS.RES2_OUT_CHANNELS * 8, height=1, width=1)
    return node(
        Res5ROIHeads,
        **common,
        proposal_matcher=_matcher(cfg.MODEL.ROI_HEADS, low_quality=False),
        in_features=list(cfg.MODEL.ROI_HEADS.IN_FEATURES),
        pooler=_pooler(cfg, cfg.MODEL.ROI_BOX_HEAD, ROIPooler),
        res5=node(build_res5, **resnets),
        box_predictor=_predictor(cfg, features, cfg.MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS),
    )


def _pooler(cfg: CfgNode, head: CfgNode, target: type, **more: Any) -> dict[str, Any]:
    return node(
        target,
        output_size=head.POOLER_RESOLUTION,
        scales=[1 / stride for stride in _strides(cfg, cfg.MODEL.ROI_HEADS.IN_FEATURES)],
        sampling_ratio=head.POOLER_SAMPLING_RATIO,
        pooler_type=head.POOLER_TYPE,
        **more,
    )


def _pooled(cfg: CfgNode, pooler: str, depth: int = 0) -> dict[str, Any]:
    """The input of a head that is ``depth`` nodes below those of the RoI heads."""
    size = f"${{{'.' * (3 + depth)}{pooler}.output_size}}"
    channels = _channels(cfg, cfg.MODEL.ROI_HEADS.IN_FEATURES[0], 4 + depth)
    return _shape(channels, height=size, width=size)


def _box_head(cfg: CfgNode, depth: int = 0) -> dict[str, Any]:
    target = known(cfg, "MODEL.ROI_BOX_HEAD.NAME", FastRCNNConvFCHead=FastRCNNConvFCHead)
    return node(target, **target.from_config(cfg, _pooled(cfg, "box_pooler", depth)))


def _box_features(cfg: CfgNode, head: str) -> dict[str, Any]:
    """The input of a predictor, whose box head is at a place relative to this node."""
    last = cfg.MODEL.ROI_BOX_HEAD.NUM_FC - 1
    if last < 0:
        raise UserError(
            "MODEL.ROI_BOX_HEAD.NUM_FC 0 has no lazy form here: a box head needs a fully-connected "
            "layer"
        )
    return _shape(f"${{{head}.fc_dims.{last}}}")


def _predictor(
    cfg: CfgNode, features: dict[str, Any], weights: Sequence[float], depth: int = 0
) -> dict[str, Any]:
    section, heads = cfg.MODEL.ROI_BOX_HEAD, cfg.MODEL.ROI_HEADS
    return node(
        FastRCNNOutputLayers,
        input_shape=features,
        box2box_transform=_transform(weights),
        num_classes=f"${{{'.' * (2 + depth)}num_classes}}",
        cls_agnostic_bbox_reg=section.CLS_AGNOSTIC_BBOX_REG,
        smooth_l1_beta=section.SMOOTH_L1_BETA,
        test_score_thresh=heads.SCORE_THRESH_TEST,
        test_nms_thresh=heads.NMS_THRESH_TEST,
        test_topk_per_image=cfg.TEST.DETECTIONS_PER_IMAGE,
        box_reg_loss_type=section.BBOX_REG_LOSS_TYPE,
        loss_weight={"loss_box_reg": section.BBOX_REG_LOSS_WEIGHT},
        # Detectron2 0.6 does not have this key.
        **({"use_sigmoid_ce": True} if section.get("USE_SIGMOID_CE") else {}),
    )


def _pooled_parts(cfg: CfgNode) -> dict[str, Any]:
    """Poolers of boxes, masks and keypoints, and the heads of the last two."""
    fpn, features = cfg.MODEL.FPN, list(cfg.MODEL.ROI_HEADS.IN_FEATURES)
    canonical = {
        "canonical_box_size": fpn.CANONICAL_BOX_SIZE,
        "canonical_level": fpn.CANONICAL_LEVEL,
    }
    parts: dict[str, Any] = {"train_on_pred_boxes": cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES}
    enabled = {"box": True, "mask": cfg.MODEL.MASK_ON, "keypoint": cfg.MODEL.KEYPOINT_ON}
    for part in filter(enabled.get, enabled):
        section = cfg.MODEL[f"ROI_{part.upper()}_HEAD"]
        parts[f"{part}_in_features"] = features
        parts[f"{part}_pooler"] = _pooler(cfg, section, PyramidROIPooler, **canonical)
    if cfg.MODEL.MASK_ON:
        name = "MODEL.ROI_MASK_HEAD.NAME"
        head = known(cfg, name, MaskRCNNConvUpsampleHead=MaskRCNNConvUpsampleHead)
        arguments = head.from_config(cfg, _pooled(cfg, "mask_pooler"))
        if not cfg.MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK:
            arguments["num_classes"] = "${..num_classes}"
        parts["mask_head"] = node(head, **arguments)
    if cfg.MODEL.KEYPOINT_ON:
        name = "MODEL.ROI_KEYPOINT_HEAD.NAME"
        head = known(cfg, name, KRCNNConvDeconvUpsampleHead=KRCNNConvDeconvUpsampleHead)
        arguments = head.from_config(cfg, _pooled(cfg, "keypoint_pooler"))
        parts["keypoint_head"] = node(head, **arguments)
    return parts


def with_pyramid(model: DictConfig) -> DictConfig:
    """Puts this plugin's pyramid and poolers into a lazy model of Detectron2.

    Args:
        model: with a node of Detectron2's FPN, whose arguments stay; changed in place.

    Raises:
        UserError: it has no such node, or one with ``square_pad``.
    """
    found, parts = False, [model]
    while parts:
        part = parts.pop()
        if OmegaConf.is_dict(part):
            target = part.get("_target_")
            if target in (FPN, f"{FPN.__module__}.{FPN.__name__}", "detectron2.modeling.FPN"):
                if part.pop("square_pad", 0):
                    raise UserError(
                        "this pyramid does not support square_pad of detectron2.modeling.FPN"
                    )
                part._target_ = FeaturePyramidNetwork
                part.coarsest_output_conv = found = True
            elif target in (ROIPooler, f"{ROIPooler.__module__}.{ROIPooler.__name__}"):
                part._target_ = PyramidROIPooler
            parts += [part._get_node(key) for key in part]
        elif OmegaConf.is_list(part):
            parts += [part._get_node(i) for i in range(len(part))]
    if not found:
        raise UserError("the model has no node of detectron2.modeling.FPN to replace")
    return model

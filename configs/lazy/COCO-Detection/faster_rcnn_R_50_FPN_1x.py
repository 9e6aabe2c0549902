"""Faster R-CNN with FPN, every node written out.

``fpn_plugin.lazy.get_config`` makes the same nodes from the YAML of this name.
"""

import detectron2.data.transforms as T
import torch
from detectron2.config import LazyCall as L
from detectron2.data import (
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.layers import ShapeSpec
from detectron2.modeling import GeneralizedRCNN
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.rpn import StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead, FastRCNNOutputLayers
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import MultiStepParamScheduler

from fpn_plugin.data import ReadableImageMapper
from fpn_plugin.data.dataset_records import dataset_records
from fpn_plugin.engine.evaluation import DetectionEvaluator
from fpn_plugin.lazy import build_network
from fpn_plugin.modeling import FPNROIHeads, PyramidROIPooler
from fpn_plugin.modeling.bottom_up import build_pyramid

model = L(GeneralizedRCNN)(
    backbone=L(build_pyramid)(
        bottom_up=L(build_network)(
            builder="build_resnet_backbone",
            freeze_at=2,
            pixel_mean="${...pixel_mean}",
            RESNETS={"OUT_FEATURES": "${...in_features}"},
        ),
        in_features=["res2", "res3", "res4", "res5"],
        out_channels=256,
        norm="",
        top_block="maxpool",
        fuse_type="sum",
        coarsest_output_conv=True,
        top_down=True,
        lateral=True,
        match_lateral_size=False,
        out_features=None,
        freeze=False,
    ),
    proposal_generator=L(RPN)(
        in_features=["p2", "p3", "p4", "p5", "p6"],
        head=L(StandardRPNHead)(
            in_channels="${...backbone.out_channels}", num_anchors=3, conv_dims=[-1]
        ),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[32], [64], [128], [256], [512]],
            aspect_ratios=[[0.5, 1.0, 2.0]],
            strides=[4, 8, 16, 32, 64],
            offset=0.0,
        ),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        box2box_transform=L(Box2BoxTransform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_topk=(2000, 1000),
        post_nms_topk=(1000, 1000),
        nms_thresh=0.7,
        min_box_size=0.0,
        anchor_boundary_thresh=-1,
        loss_weight={"loss_rpn_cls": 1.0, "loss_rpn_loc": 1.0},
        box_reg_loss_type="smooth_l1",
        smooth_l1_beta=0.0,
    ),
    roi_heads=L(FPNROIHeads)(
        num_classes=80,
        batch_size_per_image=512,
        positive_fraction=0.25,
        proposal_append_gt=True,
        proposal_matcher=L(Matcher)(
            thresholds=[0.5], labels=[0, 1], allow_low_quality_matches=False
        ),
        box_in_features=["p2", "p3", "p4", "p5"],
        box_pooler=L(PyramidROIPooler)(
            output_size=7,
            scales=[1 / 4, 1 / 8, 1 / 16, 1 / 32],
            sampling_ratio=0,
            pooler_type="ROIAlignV2",
            canonical_box_size=224,
            canonical_level=4,
        ),
        train_on_pred_boxes=False,
        box_head=L(FastRCNNConvFCHead)(
            input_shape=L(ShapeSpec)(
                channels="${....backbone.out_channels}",
                height="${...box_pooler.output_size}",
                width="${...box_pooler.output_size}",
            ),
            conv_dims=[],
            fc_dims=[1024, 1024],
            conv_norm="",
        ),
        box_predictor=L(FastRCNNOutputLayers)(
            input_shape=L(ShapeSpec)(channels="${...box_head.fc_dims.1}"),
            box2box_transform=L(Box2BoxTransform)(weights=[10.0, 10.0, 5.0, 5.0]),
            num_classes="${..num_classes}",
            cls_agnostic_bbox_reg=False,
            smooth_l1_beta=0.0,
            test_score_thresh=0.05,
            test_nms_thresh=0.5,
            test_topk_per_image=100,
            box_reg_loss_type="smooth_l1",
            loss_weight={"loss_box_reg": 1.0},
        ),
    ),
    pixel_mean=[103.53, 116.28, 123.675],
    pixel_std=[1.0, 1.0, 1.0],
    input_format="BGR",
    vis_period=0,
)

optimizer = L(torch.optim.SGD)(
    params=L(get_default_optimizer_params)(  # a training sets its model
        base_lr="${..lr}", weight_decay_norm=0.0, bias_lr_factor=1.0, weight_decay_bias=None
    ),
    lr=0.02,
    momentum=0.9,
    nesterov=False,
    weight_decay=0.0001,
)

lr_multiplier = L(WarmupParamScheduler)(
    scheduler=L(MultiStepParamScheduler)(
        values=[0.1**i for i in range(3)], milestones=[60000, 80000], num_updates=90000
    ),
    warmup_factor=0.001,
    warmup_length=1000 / 90000,
    warmup_method="linear",
    rescale_interval=False,
)

dataloader = {
    "train": L(build_detection_train_loader)(
        dataset=L(dataset_records)(
            names=["coco_2017_train"], filter_empty=True, min_keypoints=0, proposal_files=None
        ),
        mapper=L(ReadableImageMapper)(
            is_train=True,
            augmentations=[
                L(T.ResizeShortestEdge)(
                    short_edge_length=[640, 672, 704, 736, 768, 800],
                    max_size=1333,
                    sample_style="choice",
                ),
                L(T.RandomFlip)(horizontal=True, vertical=False),
            ],
            image_format="BGR",
            use_instance_mask=False,
            instance_mask_format="polygon",
            use_keypoint=False,
        ),
        total_batch_size=16,
        aspect_ratio_grouping=True,
        num_workers=4,
    ),
    "test": L(build_detection_test_loader)(
        dataset=L(dataset_records)(
            names="coco_2017_val", filter_empty=False, min_keypoints=0, proposal_files=None
        ),
        mapper=L(ReadableImageMapper)(
            is_train=False,
            augmentations=[
                L(T.ResizeShortestEdge)(short_edge_length=800, max_size=1333, sample_style="choice")
            ],
            image_format="BGR",
            use_instance_mask=False,
            instance_mask_format="polygon",
            use_keypoint=False,
        ),
        num_workers=4,
    ),
    "evaluator": L(DetectionEvaluator)(
        dataset_name="${..test.dataset.names}",
        output_dir="${train.output_dir}/inference",
        detections_per_image="${oc.select:model.roi_heads.box_predictor.test_topk_per_image,100}",
    ),
}

train = {
    "output_dir": "./output",
    "init_checkpoint": "detectron2://ImageNetPretrained/MSRA/R-50.pkl",
    "max_iter": 90000,
    "epochs": 0,
    "reference_batch": 0,
    "best_metric": "",
    "patience": 0,
    "amp": {"enabled": False, "dtype": "float16"},
    "compile": False,
    "ddp": {"broadcast_buffers": False},
    "checkpointer": {"period": 5000, "max_to_keep": None},
    "eval_period": 0,
    "tta": {
        "enabled": False,
        "min_sizes": [400, 500, 600, 700, 800, 900, 1000, 1100, 1200],
        "max_size": 4000,
        "flip": True,
    },
    "expected_results": [],
    "log_period": 20,
    "level_stats_period": 0,
    "device": "cuda",
    "seed": -1,
    "cudnn_benchmark": False,
}

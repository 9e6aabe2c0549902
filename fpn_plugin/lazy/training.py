"""Data, optimizer, schedule and training of a yacs config as lazy nodes."""

from __future__ import annotations

from typing import Any

import detectron2.data.transforms as T
import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.evaluation import COCOPanopticEvaluator, SemSegEvaluator
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler
from omegaconf import DictConfig

from fpn_plugin.data import ReadableImageMapper, swapped_keypoints
from fpn_plugin.data.dataset_records import config_arguments, dataset_records
from fpn_plugin.engine.evaluation import DetectionEvaluator
from fpn_plugin.engine.segment_evaluation import SegmentProposalEvaluator

from .model import config_of, known, node, refuse_changed

__all__ = ["dataloader_node", "optimizer_node", "schedule_node", "train_node"]


def _mapper(cfg: CfgNode, *, is_train: bool) -> dict[str, Any]:
    inputs = cfg.INPUT
    short = inputs.MIN_SIZE_TRAIN if is_train else inputs.MIN_SIZE_TEST
    resize = node(
        T.ResizeShortestEdge,
        short_edge_length=list(short) if is_train else short,
        max_size=inputs.MAX_SIZE_TRAIN if is_train else inputs.MAX_SIZE_TEST,
        sample_style=inputs.MIN_SIZE_TRAIN_SAMPLING if is_train else "choice",
    )
    augmentations = [resize]
    if is_train and inputs.RANDOM_FLIP != "none":
        horizontal = inputs.RANDOM_FLIP == "horizontal"
        augmentations.append(node(T.RandomFlip, horizontal=horizontal, vertical=not horizontal))
    more: dict[str, Any] = {}
    if is_train and inputs.CROP.ENABLED:
        crop = node(T.RandomCrop, crop_type=inputs.CROP.TYPE, crop_size=list(inputs.CROP.SIZE))
        augmentations.insert(0, crop)
        more["recompute_boxes"] = cfg.MODEL.MASK_ON
    if cfg.MODEL.LOAD_PROPOSALS:
        split = "TRAIN" if is_train else "TEST"
        more["precomputed_proposal_topk"] = cfg.DATASETS[f"PRECOMPUTED_PROPOSAL_TOPK_{split}"]
    if cfg.MODEL.KEYPOINT_ON and is_train:
        names = "${...dataset.names}"
        more["keypoint_hflip_indices"] = node(swapped_keypoints, dataset_names=names)
    return node(
        ReadableImageMapper,
        is_train=is_train,
        augmentations=augmentations,
        image_format=inputs.FORMAT,
        use_instance_mask=cfg.MODEL.MASK_ON,
        instance_mask_format=inputs.MASK_FORMAT,
        use_keypoint=cfg.MODEL.KEYPOINT_ON,
        **more,
    )


def _dataset(cfg: CfgNode, *, is_train: bool) -> dict[str, Any]:
    arguments = config_arguments(cfg, training=is_train)
    # A single test set is not in a list: the evaluator refers to its name.
    if not is_train and len(arguments["names"]) == 1:
        [arguments["names"]] = arguments["names"]
    return node(dataset_records, **arguments)


def _evaluators(cfg: CfgNode) -> dict[str, Any] | list[dict[str, Any]]:
    # The number of detections refers to the model's, whose place depends on the model.
    place = "model.max_detections_per_image"
    if cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "PanopticFPN"):
        cascade = cfg.MODEL.ROI_HEADS.NAME == "FPNCascadeROIHeads"
        last = f"s.{len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS) - 1}" if cascade else ""
        place = f"model.roi_heads.box_predictor{last}.test_topk_per_image"
    most = cfg.TEST.DETECTIONS_PER_IMAGE
    coco: dict[str, Any] = {"detections_per_image": f"${{oc.select:{place},{most}}}"}
    if cfg.TEST.KEYPOINT_OKS_SIGMAS:
        coco["kpt_oks_sigmas"] = list(cfg.TEST.KEYPOINT_OKS_SIGMAS)
    own = {
        "dataset_name": "${..test.dataset.names}",
        "output_dir": "${train.output_dir}/inference",
    }
    if cfg.MODEL.PROPOSAL_GENERATOR.NAME == "SegmentProposals":
        return node(SegmentProposalEvaluator, **own)
    if cfg.MODEL.META_ARCHITECTURE != "PanopticFPN":
        return node(DetectionEvaluator, **own, **coco)
    own["dataset_name"] = "${...test.dataset.names}"  # one node further down
    kinds = {SemSegEvaluator: {}, DetectionEvaluator: coco, COCOPanopticEvaluator: {}}
    return [node(kind, **own, **more) for kind, more in kinds.items()]


def dataloader_node(cfg: CfgNode) -> DictConfig:
    """Loaders of training and evaluation, and the evaluator.

    Raises:
        UserError: a setting has no lazy form here.
    """
    refuse_changed(cfg, "DATALOADER.SAMPLER_TRAIN")
    workers = cfg.DATALOADER.NUM_WORKERS
    return config_of(
        {
            "train": node(
                build_detection_train_loader,
                dataset=_dataset(cfg, is_train=True),
                mapper=_mapper(cfg, is_train=True),
                total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
                aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
                num_workers=workers,
            ),
            "test": node(
                build_detection_test_loader,
                dataset=_dataset(cfg, is_train=False),
                mapper=_mapper(cfg, is_train=False),
                num_workers=workers,
            ),
            "evaluator": _evaluators(cfg),
        }
    )


def optimizer_node(cfg: CfgNode) -> DictConfig:
    """The optimizer; set its ``params.model`` before it is built.

    Raises:
        UserError: a setting has no lazy form here.
    """
    refuse_changed(cfg, "SOLVER.CLIP_GRADIENTS.ENABLED", "SOLVER.REFERENCE_WORLD_SIZE")
    solver = cfg.SOLVER
    parameters = node(  # a training sets its model
        get_default_optimizer_params,
        base_lr="${..lr}",
        weight_decay_norm=solver.WEIGHT_DECAY_NORM,
        bias_lr_factor=solver.BIAS_LR_FACTOR,
        weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
    )
    sgd = node(
        torch.optim.SGD,
        params=parameters,
        lr=solver.BASE_LR,
        momentum=solver.MOMENTUM,
        nesterov=solver.NESTEROV,
        weight_decay=solver.WEIGHT_DECAY,
    )
    return config_of(sgd)


def schedule_node(cfg: CfgNode) -> DictConfig:
    """The factor of the learning rate over a training.

    Raises:
        UserError: the schedule has no lazy form here.
    """
    solver = cfg.SOLVER
    steps = [step for step in solver.STEPS if step <= solver.MAX_ITER]
    values = [solver.GAMMA**i for i in range(len(steps) + 1)]
    last = solver.get("BASE_LR_END", 0.0) / solver.BASE_LR  # the cosine of Detectron2 0.6 ends at 0
    scheduler = known(
        cfg,
        "SOLVER.LR_SCHEDULER_NAME",
        WarmupMultiStepLR=node(
            MultiStepParamScheduler, values=values, milestones=steps, num_updates=solver.MAX_ITER
        ),
        WarmupCosineLR=node(CosineParamScheduler, start_value=1, end_value=last),
    )
    # Detectron2 0.6 does not have this key.
    more = {"rescale_interval": solver.RESCALE_INTERVAL} if "RESCALE_INTERVAL" in solver else {}
    warmup = node(
        WarmupParamScheduler,
        scheduler=scheduler,
        warmup_factor=solver.WARMUP_FACTOR,
        warmup_length=min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
        warmup_method=solver.WARMUP_METHOD,
        **more,
    )
    return config_of(warmup)


def train_node(cfg: CfgNode) -> DictConfig:
    """What else a training needs: length, checkpoints, logs.

    Raises:
        UserError: a setting has no lazy form here.
    """
    refuse_changed(cfg, "TEST.PRECISE_BN.ENABLED")
    return config_of(
        {
            "output_dir": cfg.OUTPUT_DIR,
            "init_checkpoint": cfg.MODEL.WEIGHTS,
            "max_iter": cfg.SOLVER.MAX_ITER,
            "epochs": cfg.SOLVER.EPOCHS,
            "reference_batch": cfg.SOLVER.REFERENCE_BATCH,
            "best_metric": cfg.SOLVER.BEST_METRIC,
            "patience": cfg.SOLVER.PATIENCE,
            "amp": {"enabled": cfg.SOLVER.AMP.ENABLED, "dtype": cfg.SOLVER.AMP.DTYPE},
            "compile": cfg.MODEL.FPN.COMPILE,
            "ddp": {"broadcast_buffers": False},
            "checkpointer": {"period": cfg.SOLVER.CHECKPOINT_PERIOD, "max_to_keep": None},
            "eval_period": cfg.TEST.EVAL_PERIOD,
            "tta": {key.lower(): value for key, value in cfg.TEST.AUG.items()},
            "expected_results": cfg.TEST.EXPECTED_RESULTS,
            "log_period": 20,
            "level_stats_period": cfg.MODEL.FPN.LEVEL_STATS_PERIOD,
            "device": cfg.MODEL.DEVICE,
            "seed": cfg.SEED,
            "cudnn_benchmark": cfg.CUDNN_BENCHMARK,
            # Detectron2 has this key since the end of 2024.
            **({"float32_precision": cfg.FLOAT32_PRECISION} if "FLOAT32_PRECISION" in cfg else {}),
        }
    )

"""Data, optimizer, schedule and training of a yacs config as lazy nodes."""

from __future__ import annotations

from typing import Any

import detectron2.data.transforms as T
import torch
from detectron2.config import CfgNode
from detectron2.config import LazyCall as L
from detectron2.data import (
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.evaluation import COCOPanopticEvaluator, SemSegEvaluator
from detectron2.solver import WarmupParamScheduler
from detectron2.solver.build import get_default_optimizer_params
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler
from omegaconf import DictConfig, OmegaConf

from fpn_plugin.data import ReadableImageMapper, swapped_keypoints
from fpn_plugin.data.dataset_records import config_arguments, dataset_records
from fpn_plugin.engine.evaluation import DetectionEvaluator

from .model import known, refuse_changed

__all__ = ["dataloader_node", "optimizer_node", "schedule_node", "train_node"]


def _mapper(cfg: CfgNode, *, is_train: bool) -> DictConfig:
    node = cfg.INPUT
    short = node.MIN_SIZE_TRAIN if is_train else node.MIN_SIZE_TEST
    resize = L(T.ResizeShortestEdge)(
        short_edge_length=list(short) if is_train else short,
        max_size=node.MAX_SIZE_TRAIN if is_train else node.MAX_SIZE_TEST,
        sample_style=node.MIN_SIZE_TRAIN_SAMPLING if is_train else "choice",
    )
    augmentations = [resize]
    if is_train and node.RANDOM_FLIP != "none":
        horizontal = node.RANDOM_FLIP == "horizontal"
        augmentations.append(L(T.RandomFlip)(horizontal=horizontal, vertical=not horizontal))
    more: dict[str, Any] = {}
    if is_train and node.CROP.ENABLED:
        crop = L(T.RandomCrop)(crop_type=node.CROP.TYPE, crop_size=list(node.CROP.SIZE))
        augmentations.insert(0, crop)
        more["recompute_boxes"] = cfg.MODEL.MASK_ON
    if cfg.MODEL.LOAD_PROPOSALS:
        split = "TRAIN" if is_train else "TEST"
        more["precomputed_proposal_topk"] = cfg.DATASETS[f"PRECOMPUTED_PROPOSAL_TOPK_{split}"]
    if cfg.MODEL.KEYPOINT_ON and is_train:
        more["keypoint_hflip_indices"] = L(swapped_keypoints)(dataset_names="${...dataset.names}")
    return L(ReadableImageMapper)(
        is_train=is_train,
        augmentations=augmentations,
        image_format=node.FORMAT,
        use_instance_mask=cfg.MODEL.MASK_ON,
        instance_mask_format=node.MASK_FORMAT,
        use_keypoint=cfg.MODEL.KEYPOINT_ON,
        **more,
    )


def _dataset_node(cfg: CfgNode, *, is_train: bool) -> DictConfig:
    arguments = config_arguments(cfg, training=is_train)
    # One test set is named without a list, so that an evaluator can take its name from there.
    if not is_train and len(arguments["names"]) == 1:
        [arguments["names"]] = arguments["names"]
    return L(dataset_records)(**arguments)


def _evaluators(cfg: CfgNode) -> DictConfig | list[DictConfig]:
    # It follows the model's own, whose place depends on the model.
    place = "model.max_detections_per_image"
    if cfg.MODEL.META_ARCHITECTURE in ("GeneralizedRCNN", "PanopticFPN"):
        cascade = cfg.MODEL.ROI_HEADS.NAME == "FPNCascadeROIHeads"
        last = f"s.{len(cfg.MODEL.ROI_BOX_CASCADE_HEAD.IOUS) - 1}" if cascade else ""
        place = f"model.roi_heads.box_predictor{last}.test_topk_per_image"
    most = cfg.TEST.DETECTIONS_PER_IMAGE
    coco: dict[str, Any] = {"detections_per_image": f"${{oc.select:{place},{most}}}"}
    if cfg.TEST.KEYPOINT_OKS_SIGMAS:
        coco["kpt_oks_sigmas"] = list(cfg.TEST.KEYPOINT_OKS_SIGMAS)
    folder = "${train.output_dir}/inference"
    if cfg.MODEL.META_ARCHITECTURE != "PanopticFPN":
        return L(DetectionEvaluator)(
            dataset_name="${..test.dataset.names}", output_dir=folder, **coco
        )
    name = "${...test.dataset.names}"
    return [
        L(SemSegEvaluator)(dataset_name=name, output_dir=folder),
        L(DetectionEvaluator)(dataset_name=name, output_dir=folder, **coco),
        L(COCOPanopticEvaluator)(dataset_name=name, output_dir=folder),
    ]


def dataloader_node(cfg: CfgNode) -> DictConfig:
    """Loaders of training and evaluation, and the evaluator.

    Raises:
        UserError: a setting of data or evaluation that has no lazy form here.
    """
    refuse_changed(cfg, "DATALOADER.SAMPLER_TRAIN")
    return OmegaConf.create(
        {
            "train": L(build_detection_train_loader)(
                dataset=_dataset_node(cfg, is_train=True),
                mapper=_mapper(cfg, is_train=True),
                total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
                aspect_ratio_grouping=cfg.DATALOADER.ASPECT_RATIO_GROUPING,
                num_workers=cfg.DATALOADER.NUM_WORKERS,
            ),
            "test": L(build_detection_test_loader)(
                dataset=_dataset_node(cfg, is_train=False),
                mapper=_mapper(cfg, is_train=False),
                num_workers=cfg.DATALOADER.NUM_WORKERS,
            ),
            "evaluator": _evaluators(cfg),
        },
        flags={"allow_objects": True},
    )


def optimizer_node(cfg: CfgNode) -> DictConfig:
    """The optimizer; its ``params.model`` is to be set before it is built.

    Raises:
        UserError: a setting of it that has no lazy form here.
    """
    refuse_changed(cfg, "SOLVER.CLIP_GRADIENTS.ENABLED", "SOLVER.REFERENCE_WORLD_SIZE")
    solver = cfg.SOLVER
    return L(torch.optim.SGD)(
        params=L(get_default_optimizer_params)(  # its model is set when the model is there
            base_lr="${..lr}",
            weight_decay_norm=solver.WEIGHT_DECAY_NORM,
            bias_lr_factor=solver.BIAS_LR_FACTOR,
            weight_decay_bias=solver.WEIGHT_DECAY_BIAS,
        ),
        lr=solver.BASE_LR,
        momentum=solver.MOMENTUM,
        nesterov=solver.NESTEROV,
        weight_decay=solver.WEIGHT_DECAY,
    )


def schedule_node(cfg: CfgNode) -> DictConfig:
    """The factor of the learning rate over a training."""
    solver = cfg.SOLVER
    steps = [step for step in solver.STEPS if step <= solver.MAX_ITER]
    schedulers = {
        "WarmupMultiStepLR": L(MultiStepParamScheduler)(
            values=[solver.GAMMA**i for i in range(len(steps) + 1)],
            milestones=steps,
            num_updates=solver.MAX_ITER,
        ),
        "WarmupCosineLR": L(CosineParamScheduler)(
            # Detectron2 0.6 does not have the key yet; its cosine ends at 0.
            start_value=1,
            end_value=solver.get("BASE_LR_END", 0.0) / solver.BASE_LR,
        ),
    }
    return L(WarmupParamScheduler)(
        scheduler=known(schedulers, "SOLVER.LR_SCHEDULER_NAME", solver.LR_SCHEDULER_NAME),
        warmup_factor=solver.WARMUP_FACTOR,
        warmup_length=min(solver.WARMUP_ITERS / solver.MAX_ITER, 1.0),
        warmup_method=solver.WARMUP_METHOD,
        # Detectron2 0.6 does not have it yet.
        **({"rescale_interval": solver.RESCALE_INTERVAL} if "RESCALE_INTERVAL" in solver else {}),
    )


def train_node(cfg: CfgNode) -> DictConfig:
    """What else a training needs: length, checkpoints, logs.

    Raises:
        UserError: a setting of it that has no lazy form here.
    """
    refuse_changed(cfg, "TEST.PRECISE_BN.ENABLED")
    return OmegaConf.create(
        {
            "output_dir": cfg.OUTPUT_DIR,
            "init_checkpoint": cfg.MODEL.WEIGHTS,
            "max_iter": cfg.SOLVER.MAX_ITER,
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
            # Detectron2 has it since the end of 2024.
            **({"float32_precision": cfg.FLOAT32_PRECISION} if "FLOAT32_PRECISION" in cfg else {}),
        }
    )

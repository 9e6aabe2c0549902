"""The plugin's config keys. :func:`add_fpn_config` adds them to Detectron2's."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from typing import Any

from detectron2.config import CfgNode

__all__ = ["add_fpn_config", "flat_keys", "value_at"]


def add_fpn_config(cfg: CfgNode) -> None:
    """Adds the plugin's keys with their defaults: MODEL.FPN.*, MODEL.TIMM.*, MODEL.TORCHVISION.*,
    MODEL.SEGMENT_PROPOSALS.*, SOLVER.AMP.DTYPE, SOLVER.EPOCHS, SOLVER.REFERENCE_BATCH,
    SOLVER.BEST_METRIC and SOLVER.PATIENCE.

    Detectron2's own keys of MODEL.FPN (IN_FEATURES, OUT_CHANNELS, NORM, FUSE_TYPE) stay as they
    are. A key that exists already keeps its value, so calling it again is safe.

    Args:
        cfg: what :func:`detectron2.config.get_cfg` returns; changed in place.
    """
    defaults = {
        # Bottom-up pathway (section 3): any name in the BACKBONE registry.
        "BOTTOM_UP": "build_resnet_backbone",
        # False: no top-down pathway, the "bottom-up pyramid" of Tables 1 and 2, row (d).
        "TOP_DOWN": True,
        # False: top-down pathway without lateral connections, row (e).
        "LATERAL": True,
        # False: P5 is the 1x1 convolution of C5 itself. True: a 3x3 convolution on P5 too, the
        # reading of Detectron2, which checkpoints of its model zoo need.
        "COARSEST_OUTPUT_CONV": False,
        # What follows the coarsest level: "maxpool" (P6 by stride-2 subsampling, footnote 1),
        # "p6p7_c5" or "p6p7_p5" (RetinaNet's convolutions on C5 or on P5), "none".
        "TOP_BLOCK": "maxpool",
        # Levels to compute, for example ["p2"], row (f); empty: all there are.
        "OUT_FEATURES": [],
        # True: bottom-up pathway and pyramid are not trained, batch norm included: the shared
        # convolutions in steps 3 and 4 of 4-step training (Table 5).
        "FREEZE": False,
        # True: upsample to the lateral map's exact size, so that input needs no padding to a
        # multiple of the coarsest stride.
        "MATCH_LATERAL_SIZE": False,
        # Of build_image_pyramid_backbone, Figure 1 (a): scales of the image, which make p2 to p5
        # from a stage of stride 16, IN_FEATURES ["res4"].
        "IMAGE_SCALES": [4.0, 2.0, 1.0, 0.5],
        # Eq. (1), k = floor(k0 + log2(sqrt(w h) / s0)): s0, in pixels of the network's input ...
        "CANONICAL_BOX_SIZE": 224,
        # ... and k0, the level that a box of that size is pooled from.
        "CANONICAL_LEVEL": 4,
        # Log statistics of each level every this many iterations of a training; 0: never.
        # Detectron2 writes its metrics every 20. FPNTrainer reads this key; DefaultTrainer does
        # not: register fpn_plugin.engine.level_statistics.LevelStatistics as a hook there.
        "LEVEL_STATS_PERIOD": 0,
        # True: train with the bottom-up pathway compiled by torch.compile, on any device.
        "COMPILE": False,
    }
    timm = {
        # For build_timm_backbone: any timm model that offers features_only.
        "NAME": "resnet50",
        # Whether to fetch timm's weights; MODEL.WEIGHTS, loaded later, has the last word.
        "PRETRAINED": True,
        # A file of the network's weights in place of timm's: a state dict, .pth or .safetensors, of
        # the network or of a detector on it; "" for none.
        "WEIGHTS": "",
        # Stages by their stride, 2^k for res{k}; under a pyramid MODEL.FPN.IN_FEATURES decides.
        "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        # Rate of stochastic depth, where the network has one; 0.0 for none.
        "DROP_PATH": 0.0,
        # "FrozenBN" or "SyncBN" convert the network's batch norms, "" leaves them. Frozen ones
        # are for pretrained networks. "auto": "FrozenBN" if weights are given, here or in
        # MODEL.WEIGHTS; else "", and nothing is frozen, whatever FREEZE_AT is.
        "NORM": "FrozenBN",
    }
    torchvision = {
        # For build_torchvision_backbone: any classification network of torchvision.
        "NAME": "resnet50",
        # Name of torchvision's weights, "DEFAULT" for the best there are, "" for none; or a file,
        # as in MODEL.TIMM.
        "WEIGHTS": "DEFAULT",
        # As those of MODEL.TIMM.
        "OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "NORM": "FrozenBN",
    }
    # The proposal generator SegmentProposals (section 6, appendix A).
    segments = {
        "IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        # A head for each: [5], [7], or [5, 7], where 7 is for half octaves.
        "KERNEL_SIZES": [5],
        # Channels of a head's first layer, and the side of its masks.
        "WIDTH": 512,
        "MASK_SIZE": 14,
        # Longer side of a level's objects in cells of the level, for a kernel of 5: 32 px on P2.
        "OBJECT_CELLS": 8.0,
        # Cells that are sampled in an image, and the part of them that is positive at most.
        "BATCH_SIZE_PER_IMAGE": 128,
        "POSITIVE_FRACTION": 0.25,
        # Weight of the mask loss over that of the score.
        "MASK_LOSS_WEIGHT": 10.0,
        # Proposals of an image.
        "TOPK_TEST": 1000,
    }
    solver = {
        # Above 0: the length of a training in passes over its images, instead of MAX_ITER. Then
        # TEST.EVAL_PERIOD 0 evaluates ten times, and CHECKPOINT_PERIOD is the same. Only
        # fpn-plugin train reads it; FPNTrainer by itself trains for MAX_ITER.
        "EPOCHS": 0,
        # Above 0: BASE_LR is for batches of this many images, and fpn-plugin train scales it to
        # IMS_PER_BATCH, in proportion.
        "REFERENCE_BATCH": 0,
        # The metric, such as "bbox/AP", whose best evaluation is kept as model_best.pth; "": none.
        "BEST_METRIC": "",
        # A training ends after so many evaluations in a row without a better BEST_METRIC; 0: never.
        "PATIENCE": 0,
    }
    # What mixed precision computes in: "float16", or "bfloat16", which has no gradients to scale.
    amp = {"DTYPE": "float16"}
    for parent, name, keys in (
        (cfg.MODEL, "FPN", defaults),
        (cfg.MODEL, "TIMM", timm),
        (cfg.MODEL, "TORCHVISION", torchvision),
        (cfg.MODEL, "SEGMENT_PROPOSALS", segments),
        (cfg, "SOLVER", solver),
        (cfg.SOLVER, "AMP", amp),
    ):
        node = parent.setdefault(name, CfgNode())
        for key, default in keys.items():
            node.setdefault(key, default)


def flat_keys(cfg: CfgNode, prefix: str = "") -> Iterator[str]:
    """All keys and sections of a config, such as ``"MODEL.FPN.NORM"``, after ``prefix``."""
    for key, value in cfg.items():
        yield prefix + key
        if isinstance(value, CfgNode):
            yield from flat_keys(value, f"{prefix}{key}.")


def value_at(cfg: CfgNode, key: str) -> Any:
    """The value, or the section, of a config under a key such as ``"MODEL.FPN.NORM"``."""
    return functools.reduce(operator.getitem, key.split("."), cfg)

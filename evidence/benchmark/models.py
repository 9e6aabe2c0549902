"""The models that are timed: one set of weights in stock Detectron2's and the plugin's models."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import detectron2.model_zoo
import torch
import torchvision
from detectron2.config import CfgNode, get_cfg
from detectron2.layers import FrozenBatchNorm2d
from detectron2.modeling import RetinaNet, build_model
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.nn import functional as F

from fpn_plugin import model_zoo
from fpn_plugin.data import read_image_or_say
from fpn_plugin.deploy.fast_training import optimize_for_training
from fpn_plugin.errors import UserError

__all__ = [
    "photograph",
    "plugin_model",
    "proposals_of",
    "spread_boxes",
    "stock_model",
    "torchvision_model",
]

FASTER_R50 = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
MASK_R50 = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
RETINANET_R50 = "COCO-Detection/retinanet_R_50_FPN_1x.yaml"


def photograph(path: str | None, height: int, width: int) -> Tensor:
    """A photograph, BGR ``(3, height, width)``, float32 of 0 to 255.

    Args:
        path: an image file; None for one of scikit-learn's.
        height: in pixels.
        width: in pixels.
    """
    if path is None:
        try:
            from sklearn.datasets import load_sample_image
        except ImportError:
            raise UserError(
                "give --image a photograph, or install scikit-learn, which has one: "
                "pip install scikit-learn"
            ) from None
        pixels = load_sample_image("china.jpg")
    else:
        pixels = read_image_or_say(path)[:, :, ::-1]
    image = torch.as_tensor(pixels[:, :, ::-1].copy()).permute(2, 0, 1)[None].float()
    return F.interpolate(image, size=(height, width), mode="bilinear", antialias=True)[0]


def _set(cfg: CfgNode, device: str, opts: dict[str, Any]) -> CfgNode:
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = device, ""
    for key, value in opts.items():
        cfg.merge_from_list([key, value])
    return cfg


def stock_model(device: str, image: Tensor, config: str = FASTER_R50, **opts: Any) -> nn.Module:
    """Detectron2's own R-CNN or RetinaNet, seeded, with activations spread as in a trained model:
    frozen norms have the statistics of an image, and scores differ.

    Args:
        device: of the model.
        image: as :func:`photograph` returns it.
        config: of Detectron2's model zoo.
        opts: config keys, dots written as two underscores.
    """
    cfg = get_cfg()
    cfg.merge_from_file(detectron2.model_zoo.get_config_file(config))
    torch.manual_seed(0)
    model = build_model(_set(cfg, device, _keys(opts))).eval()

    def calibrate(norm: FrozenBatchNorm2d, inputs: tuple[Tensor]) -> None:
        norm.running_mean.copy_(inputs[0].mean(dim=(0, 2, 3)))
        norm.running_var.copy_(inputs[0].var(dim=(0, 2, 3)) + 1e-3)

    norms = [m for m in model.modules() if isinstance(m, FrozenBatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(calibrate) for norm in norms]
    with torch.no_grad():
        pyramid = model.backbone(model.preprocess_image([{"image": image}]).tensor)
        for hook in hooks:
            hook.remove()
        if isinstance(model, RetinaNet):
            logits, _ = model.head([pyramid[level] for level in model.head_in_features])
            model.head.cls_score.weight.div_(logits[0].std())
            return model
        logits, _ = model.proposal_generator.rpn_head([pyramid["p4"]])
        model.proposal_generator.rpn_head.objectness_logits.weight.div_(logits[0].std())
        scores: list[Tensor] = []
        predictor = model.roi_heads.box_predictor.cls_score
        hook = predictor.register_forward_hook(lambda _, __, out: scores.append(out))
        model([{"image": image}])
        hook.remove()
        predictor.weight.div_(scores[0].std())
    return model


def plugin_model(stock: nn.Module, device: str, **opts: Any) -> nn.Module:
    """The plugin's model with a stock model's weights, as ``fpn-plugin train`` makes it."""
    cfg = _set(model_zoo.get_config(FASTER_R50), device, _keys(opts))
    model = build_model(cfg)
    model.load_state_dict(stock.state_dict())
    optimize_for_training(model)
    return model.eval()


def torchvision_model(device: str, height: int, width: int) -> nn.Module:
    """Torchvision's fasterrcnn_resnet50_fpn at one input size, with as many proposals."""
    torch.manual_seed(0)
    sides = {"min_size": min(height, width), "max_size": max(height, width)}
    model = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, **sides
    )
    return model.to(device).eval()


def _keys(opts: dict[str, Any]) -> dict[str, Any]:
    return {key.replace("__", "."): value for key, value in opts.items()}


@contextmanager
def proposals_of(model: nn.Module) -> Iterator[list[list[Boxes]]]:
    """Collects the boxes of each call of the model's box pooler, in its block."""
    pooled: list[list[Boxes]] = []
    hook = model.roi_heads.box_pooler.register_forward_pre_hook(
        lambda _, inputs: pooled.append(list(inputs[1]))
    )
    try:
        yield pooled
    finally:
        hook.remove()


def training_batch(image: Tensor, count: int) -> list[dict[str, Any]]:
    """Inputs for a training iteration: the image with a dozen boxes, ``count`` times."""
    generator = torch.Generator().manual_seed(0)
    height, width = image.shape[1:]
    inputs = []
    for _ in range(count):
        corner = torch.rand(12, 2, generator=generator) * torch.tensor([width, height]) * 0.7
        size = torch.exp(torch.rand(12, 2, generator=generator) * 3) * width / 90
        target = Instances((height, width))
        target.gt_boxes = Boxes(torch.cat([corner, corner + size], dim=1))
        target.gt_boxes.clip((height, width))
        target.gt_classes = torch.randint(0, 80, (12,), generator=generator)
        inputs.append({"image": image, "instances": target})
    return inputs


def spread_boxes(count: int, height: int, width: int) -> Boxes:
    """Boxes of sides of 12 to 400 px, their logarithms spread evenly, over an image."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(count, 2, generator=generator) * 0.8 * torch.tensor([width, height])
    size = torch.exp(torch.rand(count, 2, generator=generator) * 3.5 + 2.5)
    return Boxes(torch.cat([corner, corner + size], dim=1))

"""Detectors that need no training: random weights, scaled so that scores and boxes spread.

As initialised, hardly any score of a detector means a decision, and differences would not show.
"""

import copy
import json
from collections.abc import Callable
from functools import cache

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from fpn_plugin import model_zoo
from fpn_plugin.mini.scene import draw_scene

SIDE = 160
# Mean and deviation of what each predictor gives, over the regions of some images.
SPREAD = {
    "objectness_logits": (0, 2),
    "anchor_deltas": (0, 0.2),
    "cls_score": (-11, 2.5),
    "bbox_pred": (0, 0.4),
    "predictor": (0, 3),  # of masks
    "score_lowres": (0, 3),  # of keypoints
}
CONFIGS = {
    "faster": ("mini/faster_rcnn_R_18_FPN.yaml", []),
    "mask": ("mini/mask_rcnn_R_18_FPN.yaml", ["MODEL.ROI_MASK_HEAD.CONV_DIM", 16]),
    "keypoint": (
        "mini/faster_rcnn_R_18_FPN.yaml",
        [
            "MODEL.KEYPOINT_ON", True, "MODEL.ROI_HEADS.NUM_CLASSES", 1,
            "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [8], "TEST.DETECTIONS_PER_IMAGE", 5,
        ],
    ),
    "cascade": (
        "mini/faster_rcnn_R_18_FPN.yaml",
        [
            "MODEL.ROI_HEADS.NAME", "FPNCascadeROIHeads",
            "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True,
        ],
    ),
    "rpn": ("mini/faster_rcnn_R_18_FPN.yaml", ["MODEL.META_ARCHITECTURE", "ProposalNetwork"]),
    "retinanet": (
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        [
            "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
            "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0,
            "MODEL.RETINANET.NUM_CLASSES", 14, "MODEL.RETINANET.NUM_CONVS", 2,
            "MODEL.PIXEL_STD", [57.0, 57.0, 57.0],
        ],
    ),
}  # fmt: skip


def detector_config(kind: str) -> CfgNode:
    """A small model of a kind of ``CONFIGS``, on the CPU."""
    name, opts = CONFIGS[kind]
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = "cpu", ""
    cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32, 64
    cfg.merge_from_list(opts)
    return cfg


def scene_image(index: int, side: int = SIDE) -> Tensor:
    """A scene of the mini dataset, uint8 ``(3, side, side)``, BGR."""
    image = torch.as_tensor(draw_scene(0, "train", index).image[:, :, ::-1].copy())
    image = F.interpolate(image.permute(2, 0, 1)[None].float(), size=(side, side), mode="bilinear")
    return image[0].to(torch.uint8)


def vary_norms(model: nn.Module) -> None:
    """Gives batch norms statistics and weights as after a training, in place."""
    for module in model.modules():
        if hasattr(module, "running_mean"):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.8, 1.2)
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.uniform_(module.bias, -0.2, 0.2)


@torch.no_grad()
def spread_predictions(model: nn.Module, images: list[dict]) -> None:
    """Scales the predictors of a model, in place, to the mean and deviation of ``SPREAD``."""
    given: dict[nn.Module, list[Tensor]] = {}
    predictors = [(name.split(".")[-1], part) for name, part in model.named_modules()]
    predictors = [(name, part) for name, part in predictors if name in SPREAD]

    def note(part: nn.Module, _: object, output: Tensor) -> None:
        given.setdefault(part, []).append(output.transpose(0, 1).flatten(1))

    hooks = [part.register_forward_hook(note) for _, part in predictors]
    model(images)
    for hook in hooks:
        hook.remove()
    for name, part in predictors:
        mean, std = SPREAD[name]
        values = torch.cat(given[part], dim=1)
        factor = std / values.std(dim=1).mean()
        part.weight.mul_(factor)
        part.bias.add_(-values.mean(dim=1)).mul_(factor).add_(mean)
        if name == "cls_score" and isinstance(part, nn.Linear):
            part.bias[-1] += 7  # most regions are background


@cache
def _detector(kind: str) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build_model(detector_config(kind)).eval()
        vary_norms(model)
    spread_predictions(
        model, [{"image": scene_image(i, side)} for i, side in enumerate((160, 256))]
    )
    return model


@pytest.fixture(scope="session")
def detector() -> Callable[[str], nn.Module]:
    """A detector of a kind, in evaluation mode; each caller gets a copy of its own."""
    return lambda kind: copy.deepcopy(_detector(kind))


@pytest.fixture(scope="session")
def config_of() -> Callable[[str], CfgNode]:
    """The config of a kind of detector."""
    return detector_config


@pytest.fixture(scope="session")
def images() -> list[dict]:
    """Inputs of several sizes, square and not."""
    pictures = [scene_image(index, side) for index, side in enumerate((160, 256, 96))]
    return [{"image": each} for each in (*pictures, pictures[1][:, :120, :230])]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> str:
    """What --dataset takes to register four scenes, whose objects are what "faster" detects."""
    folder = tmp_path_factory.mktemp("scenes")
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": i + 1, "name": f"kind {i}"} for i in range(14)]
    for number in range(4):
        image, name = scene_image(number), f"{number}.png"
        Image.fromarray(image.permute(1, 2, 0).numpy()[:, :, ::-1].copy()).save(folder / name)
        content["images"].append({"id": number, "file_name": name, "width": SIDE, "height": SIDE})
        with torch.no_grad():
            found = _detector("faster")([{"image": image}])[0]["instances"][:10]
        for (x0, y0, x1, y1), category in zip(
            found.pred_boxes.tensor.tolist(), found.pred_classes.tolist(), strict=True
        ):
            content["annotations"].append(
                {"id": len(content["annotations"]) + 1, "image_id": number, "iscrowd": 0,
                 "category_id": category + 1, "bbox": [x0, y0, x1 - x0, y1 - y0],
                 "area": (x1 - x0) * (y1 - y0)}
            )  # fmt: skip
    (folder / "scenes.json").write_text(json.dumps(content))
    return f"scenes={folder / 'scenes.json'}:{folder}"

"""Models trained for some seconds on scenes of the mini dataset: random weights hide differences,
since hardly any score or coordinate of theirs means a decision.
"""

import copy
import json
from collections.abc import Callable, Iterator

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import nn
from torch.nn import functional as F

from fpn_plugin import model_zoo
from fpn_plugin.mini.scene import draw_scene

SIDE = 160
CONFIGS = {
    "faster": ("mini/faster_rcnn_R_18_FPN.yaml", []),
    "mask": ("mini/mask_rcnn_R_18_FPN.yaml", []),
    "retinanet": (
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
        [
            "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64,
            "MODEL.RESNETS.NORM", "BN", "MODEL.BACKBONE.FREEZE_AT", 0,
            "MODEL.FPN.OUT_CHANNELS", 32, "MODEL.RETINANET.NUM_CLASSES", 14,
            "MODEL.RETINANET.NUM_CONVS", 2, "MODEL.PIXEL_STD", [57.0, 57.0, 57.0],
        ],
    ),
}  # fmt: skip


def config(kind: str) -> CfgNode:
    name, opts = CONFIGS[kind]
    cfg = model_zoo.get_config(name)
    cfg.merge_from_list([*opts, "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""])
    if kind != "retinanet":
        cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32, 64
        cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 16
    return cfg


def scene_input(index: int, *, split: str = "train", side: int = SIDE) -> dict:
    scene = draw_scene(0, split, index)
    image = torch.as_tensor(scene.image[:, :, ::-1].copy()).permute(2, 0, 1)[None].float()
    image = F.interpolate(image, size=(side, side), mode="bilinear")[0].to(torch.uint8)
    target = Instances((side, side))
    boxes = torch.tensor([thing.box for thing in scene.objects], dtype=torch.float32).view(-1, 4)
    boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1)
    target.gt_boxes = Boxes(boxes * (side / scene.image.shape[0]))
    target.gt_classes = torch.tensor([thing.category_id - 1 for thing in scene.objects])
    masks = torch.stack(
        [torch.as_tensor(thing.mask, dtype=torch.float32) for thing in scene.objects]
    )
    target.gt_masks = BitMasks(F.interpolate(masks[None], size=(side, side))[0] > 0.5)
    return {"image": image, "instances": target, "height": side, "width": side}


def train(kind: str, iterations: int) -> nn.Module:
    torch.manual_seed(0)
    model = build_model(config(kind)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    scenes = [scene_input(i) for i in range(8)]
    with EventStorage(0):
        for iteration in range(iterations):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min(1, (iterations - iteration) / iterations * 2)
            start = 2 * iteration % len(scenes)
            loss = sum(model(scenes[start : start + 2]).values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@pytest.fixture(scope="session")
def trained() -> Iterator[Callable[[str], nn.Module]]:
    """A trained model of a kind, in evaluation mode; each caller gets a copy of its own."""
    models: dict[str, nn.Module] = {}

    def get(kind: str) -> nn.Module:
        if kind not in models:
            models[kind] = train(kind, 200)
        return copy.deepcopy(models[kind])

    yield get


@pytest.fixture(scope="session")
def config_of() -> Callable[[str], CfgNode]:
    """The config of a kind of model."""
    return config


@pytest.fixture(scope="session")
def images() -> list[dict]:
    """Inputs of several sizes, square and not."""
    inputs = [scene_input(index, side=side) for index, side in enumerate((160, 256, 96))]
    inputs.append({"image": inputs[1]["image"][:, :120, :230]})
    return [{"image": each["image"]} for each in inputs]


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> str:
    """What --dataset takes to register four of the scenes that models are trained on."""
    folder = tmp_path_factory.mktemp("scenes")
    content = {"images": [], "annotations": [], "categories": []}
    content["categories"] = [{"id": i + 1, "name": f"kind {i}"} for i in range(14)]
    for number in range(4):
        scene = scene_input(number)
        name, target = f"{number}.png", scene["instances"]
        Image.fromarray(scene["image"].permute(1, 2, 0).numpy()[:, :, ::-1]).save(folder / name)
        content["images"].append({"id": number, "file_name": name, "width": SIDE, "height": SIDE})
        for (x0, y0, x1, y1), category in zip(
            target.gt_boxes.tensor.tolist(), target.gt_classes.tolist(), strict=True
        ):
            content["annotations"].append(
                {"id": len(content["annotations"]) + 1, "image_id": number, "iscrowd": 0,
                 "category_id": category + 1, "bbox": [x0, y0, x1 - x0, y1 - y0],
                 "area": (x1 - x0) * (y1 - y0)}
            )  # fmt: skip
    (folder / "scenes.json").write_text(json.dumps(content))
    return f"scenes={folder / 'scenes.json'}:{folder}"

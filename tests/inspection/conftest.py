"""Small models and batches with objects of many sizes."""

import pytest
import torch
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances

from fpn_plugin import model_zoo


def tiny_config(name, *opts):
    """A packaged config at a width that a test can afford."""
    cfg = model_zoo.get_config(name)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.MODEL.RESNETS.DEPTH = 18
    cfg.MODEL.RESNETS.RES2_OUT_CHANNELS = 64
    cfg.MODEL.FPN.OUT_CHANNELS = 16
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 16
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 100
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 64
    cfg.MODEL.MASK_ON &= "cascade" not in name
    cfg.merge_from_list(list(opts))
    return cfg


@pytest.fixture
def make_model():
    """Builds a packaged config's model, small, in training mode."""

    def make(name, *opts):
        torch.manual_seed(1)
        return build_model(tiny_config(name, *opts)).train()

    return make


@pytest.fixture
def make_config():
    """A packaged config, small."""
    return tiny_config


@pytest.fixture
def batch():
    """Two images of 224 x 288 px; one has objects of 10 to 200 px, one has none."""
    boxes = [[8.0, 8, 20, 22], [30, 40, 70, 75], [100, 20, 190, 110], [20, 10, 215, 212]]
    images = []
    for of_image in (boxes, []):
        instances = Instances((224, 288))
        instances.gt_boxes = Boxes(torch.tensor(of_image).reshape(-1, 4))
        instances.gt_classes = torch.arange(len(of_image))
        pixels = torch.randint(0, 256, (3, 224, 288), generator=torch.manual_seed(3))
        images.append({"image": pixels, "instances": instances, "height": 224, "width": 288})
    for record in images:
        # What a model that reads proposals is given: the objects, moved a little, and some others.
        own = record["instances"].gt_boxes.tensor
        others = torch.tensor([[5.0, 5, 40, 60], [50, 50, 200, 200], [1, 1, 280, 220]])
        boxes = torch.cat([own + 2, own - 3, others]).clamp(min=0)
        proposals = Instances((224, 288))
        proposals.proposal_boxes = Boxes(boxes)
        proposals.objectness_logits = torch.linspace(1, 0, len(boxes))
        record["proposals"] = proposals
    return images

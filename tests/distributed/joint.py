"""Run in one or several processes by test_joint.py: trains and evaluates small models together.

Usage: joint.py [--num-gpus N] --folder FOLDER [--every-row], or by torchrun. The folder holds the
datasets and gets joint.pth and the predictions.
"""

import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import create_ddp_model, default_argument_parser
from detectron2.modeling import build_model, poolers
from detectron2.structures import BitMasks, Boxes, Instances
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from PIL import Image
from torch import Tensor, nn
from torchvision.ops import boxes as box_ops

from fpn_plugin import model_zoo
from fpn_plugin.engine import FPNTrainer, StrictCheckpointer, load_config
from fpn_plugin.engine.launch import launch, run_tool

SIDE, IMAGES = 64, 4
SUMS = 4096  # that are kept of a gradient
MASK, FASTER = "mini/mask_rcnn_R_18_FPN.yaml", "mini/faster_rcnn_R_18_FPN.yaml"
FEW = [MASK, "mini/table1_a_C4.yaml", "mini/table2_c_FPN.yaml", "mini/table5_R_50_shared.yaml"]
# Every mini row of the paper, those of ResNet-101 at the depth of the others.
ROWS = [name for name in model_zoo.names() if name.startswith("mini/") and "Base" not in name]
# Rows that are trained with frozen statistics as well, as the paper's are.
FROZEN = [MASK, FASTER, "mini/table1_c_FPN.yaml", "mini/table2_a_C4.yaml", "mini/table2_c_FPN.yaml"]
SMALL = [
    "MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.FPN.OUT_CHANNELS", "16",
    "MODEL.ROI_BOX_HEAD.FC_DIM", "16", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16",
    "MODEL.ROI_MASK_HEAD.CONV_DIM", "8", "MODEL.RPN.BATCH_SIZE_PER_IMAGE", "256",
    "MODEL.RESNETS.DEPTH", "18", "MODEL.FPN.CANONICAL_BOX_SIZE", "32", "SEED", "0",
    "DATALOADER.NUM_WORKERS", "0",
]  # fmt: skip
# For images of 64 pixels: anchors of 4 to 64, each at the middle of its cell, and RoIs of up to 8
# pixels in P2, of 32 and more in P5. So ordinary images have boxes on all levels.
SHRINK = 4
ALL_LEVELS = ["MODEL.FPN.CANONICAL_BOX_SIZE", "16", "MODEL.ANCHOR_GENERATOR.OFFSET", "0.5"]


def build(row: str, *opts: str) -> nn.Module:
    torch.manual_seed(0)
    cfg = load_config(row, [*SMALL, *ALL_LEVELS, *opts])
    sizes = cfg.MODEL.ANCHOR_GENERATOR.SIZES
    cfg.MODEL.ANCHOR_GENERATOR.SIZES = [[size / SHRINK for size in level] for level in sizes]
    return build_model(cfg).double()


def image(index: int, boxes: list[list[float]], proposals: list[list[float]]) -> dict:
    """A training example of noise with boxes, masks and proposals."""
    random = torch.Generator().manual_seed(index)
    truth = Instances((SIDE, SIDE))
    truth.gt_boxes = Boxes(torch.tensor(boxes).reshape(-1, 4))
    truth.gt_classes = torch.arange(len(boxes)) % 3
    masks = torch.zeros(len(boxes), SIDE, SIDE, dtype=torch.bool)
    for mask, (left, top, right, bottom) in zip(masks, boxes, strict=True):
        mask[int(top) : int(bottom), int(left) : int((left + right) / 2)] = True
    truth.gt_masks = BitMasks(masks)
    given = Instances((SIDE, SIDE))
    given.proposal_boxes = Boxes(torch.tensor(proposals).reshape(-1, 4))
    given.objectness_logits = torch.linspace(1, 0, len(proposals))
    pixels = torch.randint(0, 256, (3, SIDE, SIDE), generator=random, dtype=torch.uint8)
    return {"image": pixels, "instances": truth, "proposals": given, "height": SIDE, "width": SIDE}


def ordinary(index: int) -> dict:
    """An image with an object of each anchor's size and 24 proposals over all sizes, others in each
    image.
    """
    at = 2.0 * index
    boxes = [[at, at, at + side, at + side] for side in (4.0, 8, 16, 32)] + [[0.0, at, SIDE, SIDE]]
    proposals = [
        [left, top, left + side, top + side]
        for side, left, top in itertools.product((6.0, 10, 20, 44), (0.0, 3 + at), (0.0, 5, 18))
    ]
    return image(index, boxes, proposals)


SMALL_BOXES = [[4.0, 4, 10, 10], [20, 20, 27, 26]]
# One image a process; what is left when there are more processes is ordinary.
UNEVEN = {
    "one level, all levels": [image(0, SMALL_BOXES, SMALL_BOXES), ordinary(1)],
    "no ground truth": [image(0, [], [[0.0, 0, 20, 20]]), ordinary(1)],
    "no ground truth and no proposals": [image(0, [], []), ordinary(1)],
    "nothing anywhere": [image(i, [], []) for i in range(IMAGES)],
}


@contextmanager
def comparable() -> Iterator[None]:
    """Within it, float64 models train, and samplers take the same candidates of an image wherever
    it is seen: at random, that depends on how many images a process has seen before.
    """
    shuffled = torch.randperm
    # Detectron2's boxes are float32; where operators want boxes and maps of one kind, these are.
    for_pooling = poolers.convert_boxes_to_pooler_format
    for_nms = box_ops.batched_nms
    # Its result has its targets' kind, which are float32: so would the losses be.
    for_classes = nn.functional.binary_cross_entropy_with_logits
    with (
        EventStorage(),
        mock.patch(
            "torch.randperm",
            lambda n, **_: shuffled(n, generator=torch.Generator().manual_seed(n)),
        ),
        mock.patch.object(box_ops, "batched_nms", lambda box, *more: for_nms(box.double(), *more)),
        mock.patch.object(
            poolers, "convert_boxes_to_pooler_format", lambda boxes: for_pooling(boxes).double()
        ),
        mock.patch.object(
            nn.functional,
            "binary_cross_entropy_with_logits",
            lambda given, target, **more: for_classes(given, target.to(given.dtype), **more),
        ),
    ):
        yield


def step(model: nn.Module, images: list[dict]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Losses of one iteration and sketches of its gradients."""
    model.zero_grad()
    with comparable():
        losses = model(images)
    sum(losses.values()).backward()
    inner = model.module if comm.get_world_size() > 1 else model
    gradients = {
        name: sketch(parameter.grad)
        for name, parameter in inner.named_parameters()
        if parameter.requires_grad
    }
    return {name: loss.detach() for name, loss in losses.items()}, gradients


def sketch(gradient: Tensor) -> Tensor:
    """A gradient as at most 4,096 sums of its entries, whose signs are drawn. An entry that differs
    changes a sum; all gradients of all rows would be gigabytes.
    """
    values = gradient.flatten()
    if len(values) <= SUMS:
        return values.clone()
    drawn = torch.Generator().manual_seed(len(values))
    signed = values * (1 - 2 * torch.randint(2, values.shape, generator=drawn))
    return nn.functional.pad(signed, (0, -len(values) % SUMS)).view(SUMS, -1).sum(1)


def mean(each: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: sum(one[name] for one in each) / len(each) for name in each[0]}


def in_parts(model: nn.Module, images: list[dict], parts: int) -> dict[str, dict[str, Tensor]]:
    """What ``parts`` processes should get, computed by one: means over parts of the images."""
    steps = [step(model, images[part::parts]) for part in range(parts)]
    losses, gradients = zip(*steps, strict=True)
    return {"losses": mean(losses), "gradients": mean(gradients)}


def joint_step(model: nn.Module, images: list[dict]) -> dict[str, dict[str, Tensor]]:
    """What all processes get from an iteration: mean losses and all-reduced gradients."""
    world, rank = comm.get_world_size(), comm.get_rank()
    # As Detectron2 wraps it: without find_unused_parameters. DDP then refuses a parameter without
    # a gradient when the next iteration begins.
    ddp = create_ddp_model(model, broadcast_buffers=False, device_ids=None)
    for _ in range(2):
        losses, gradients = step(ddp, images[rank::world])
    return {"losses": mean(comm.all_gather(losses)), "gradients": gradients}


def all_steps(every_row: bool) -> dict[str, dict]:
    """By name: what the processes get together or, alone, what so many should get."""
    batch = [ordinary(i) for i in range(IMAGES)]
    found: dict[str, dict] = {}
    numbers = (2, 4) if every_row else (2,)  # of processes, in the tests

    def add(
        name: str, row: str, images: list[dict], *opts: str, parts: tuple[int, ...] = numbers
    ) -> None:
        model = build(row, *opts)
        if comm.get_world_size() > 1:
            found[name] = joint_step(model, images)
            return
        for number in parts:
            found[f"{name} in {number}"] = in_parts(model, images, number)

    for row in ROWS if every_row else FEW:
        add(row, row, batch, parts=(1, *numbers) if row == MASK else numbers)
    for row in FROZEN if every_row else FROZEN[:1]:
        frozen = ("MODEL.RESNETS.NORM", "FrozenBN")
        add(f"frozen {row}", row, batch, *frozen, parts=(1, *numbers))
    for name, images in UNEVEN.items():
        images = images + [ordinary(i) for i in range(len(images), IMAGES)]
        for row in (MASK, "mini/table2_c_FPN.yaml"):
            add(f"{name}: {row}", row, images)
    return found


def register(folder: Path, count: int) -> str:
    """Registers a dataset of ``count`` images, which are made by the test."""
    name = f"joint_{count}"
    if name not in DatasetCatalog:
        content = json.loads((folder / f"{count}.json").read_text())
        DatasetCatalog.register(name, lambda: content)
        MetadataCatalog.get(name).set(
            thing_classes=["square"],
            thing_dataset_id_to_contiguous_id={1: 0},
            json_file=str(folder / f"{count}.coco.json"),
            evaluator_type="coco",
        )
    return name


def make_data(folder: Path, count: int) -> None:
    """``count`` images of 64 x 48 pixels, a bright square in each, and their annotations."""
    random = np.random.default_rng(0)
    images, annotations, records = [], [], []
    for i in range(1, count + 1):
        pixels = random.integers(0, 60, (48, 64, 3), dtype=np.uint8)
        x, y, side = (int(v) for v in random.integers(4, 22, 3))
        pixels[y : y + side, x : x + side] = 220
        file = folder / f"{i}.png"
        Image.fromarray(pixels).save(file)
        images.append({"id": i, "file_name": file.name, "height": 48, "width": 64})
        box = {"bbox": [x, y, side, side], "iscrowd": 0}
        annotations.append({"id": i, "image_id": i, "category_id": 1, "area": side**2, **box})
        records.append({"file_name": str(file), "image_id": i, "height": 48, "width": 64,
                        "annotations": [{"category_id": 0, "bbox_mode": 1, **box}]})  # fmt: skip
    coco = {"info": {}, "images": images, "annotations": annotations,
            "categories": [{"id": 1, "name": "square"}]}  # fmt: skip
    (folder / f"{count}.coco.json").write_text(json.dumps(coco))
    (folder / f"{count}.json").write_text(json.dumps(records))


def config(folder: Path, count: int, *opts: str) -> CfgNode:
    name = register(folder, count)
    return load_config(FASTER, [
        *SMALL, "MODEL.ROI_HEADS.NUM_CLASSES", "1", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0",
        "DATASETS.TRAIN", f"('{name}',)", "DATASETS.TEST", f"('{name}',)",
        "INPUT.MIN_SIZE_TRAIN", "(48,)", "INPUT.MIN_SIZE_TEST", "48", "SOLVER.IMS_PER_BATCH", "4",
        "SOLVER.MAX_ITER", "3", *opts,
    ])  # fmt: skip


def evaluated(folder: Path, count: int, *opts: str) -> dict:
    """Results on a dataset of the weights named or else of seeded ones, which all processes have;
    predictions go to OUTPUT_DIR.
    """
    cfg = config(folder, count, *opts)
    torch.manual_seed(0)
    model = FPNTrainer.build_model(cfg)
    if cfg.MODEL.WEIGHTS:
        StrictCheckpointer(model).load(cfg.MODEL.WEIGHTS)
    return dict(FPNTrainer.test(cfg, model))


def trained(folder: Path, count: int, *opts: str) -> dict:
    """Results at the end of a training of three iterations, batch statistics not frozen."""
    cfg = config(folder, count, *opts)
    Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
    trainer = FPNTrainer(cfg)
    trainer.train()
    return dict(trainer.results)


def work(folder: Path, every_row: bool) -> None:
    found = {"world": comm.get_world_size(), "steps": all_steps(every_row), "results": {}}
    rpn = ("MODEL.META_ARCHITECTURE", "ProposalNetwork")
    for count, (kind, opts) in itertools.product((1, 7), {"boxes": (), "proposals": rpn}.items()):
        output = folder / f"{kind}_{count}"
        results = evaluated(folder, count, *opts, "OUTPUT_DIR", str(output))
        found["results"][output.name] = results
    found["results"]["trained"] = trained(folder, 7, "OUTPUT_DIR", str(folder / "trained"))
    if comm.is_main_process():
        torch.save(found, folder / "joint.pth")


def main() -> None:
    parser = default_argument_parser()
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--every-row", action="store_true")
    args = parser.parse_args()
    launch(work, args, "cpu", (args.folder, args.every_row))


if __name__ == "__main__":
    run_tool(main)

"""The recall of segment proposals: COCO's numbers, and the most that masks of a size can reach."""

import contextlib
import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as multiprocessing
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json, register_coco_instances
from detectron2.engine.launch import _find_free_port
from detectron2.structures import BitMasks, Instances
from detectron2.utils import comm
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from fpn_plugin import UserError, model_zoo
from fpn_plugin.engine import FPNTrainer, SegmentProposalEvaluator
from fpn_plugin.engine.segment_evaluation import encoded_segments
from fpn_plugin.mini import ensure_mini
from fpn_plugin.modeling.segment_proposals import SegmentProposals, label_cells

IMAGES = 12
STRIDES = (4, 8, 16, 32, 64)
NAME = "few_mini"


@pytest.fixture(scope="module")
def few(tmp_path_factory) -> Path:
    """The folder of a few images of mini_val, registered as NAME."""
    root = ensure_mini({"val": IMAGES}, tmp_path_factory.mktemp("few") / "mini")
    register(root)
    yield root
    DatasetCatalog.remove(NAME)
    MetadataCatalog.remove(NAME)


def register(root: Path) -> None:
    register_coco_instances(NAME, {}, str(root / "val.json"), str(root / "val"))


def records(root: Path) -> list[dict]:
    return load_coco_json(str(root / "val.json"), str(root / "val"))


def bitmasks(record: dict) -> BitMasks:
    drawn = [coco_mask.decode(each["segmentation"]) for each in record["annotations"]]
    return BitMasks(torch.from_numpy(np.stack(drawn)).bool())


def proposals_of(
    windows: torch.Tensor, masks: torch.Tensor, size: tuple[int, int] = (256, 256)
) -> Instances:
    found = Instances(size)
    found.objectness_logits = -torch.arange(len(masks)).float()
    found.proposal_masks = masks.float()
    found.mask_windows = windows / torch.tensor([*size[::-1], *size[::-1]])
    return found


def perfect(masks: BitMasks, size: int) -> Instances:
    """What a model would propose that has learned each positive's target: one for an object."""
    levels = ["p2", "p3", "p4", "p5", "p6"]
    model = SegmentProposals(
        in_features=levels, in_channels=1, strides=STRIDES, kernel_sizes=[5, 7], width=1,
        mask_size=size, object_cells=4,
    )  # fmt: skip
    centers = model.centers([(256 // s, 256 // s) for s in STRIDES], torch.device("cpu"))
    labels, objects = label_cells(
        centers, model.strides, model.sizes, masks.get_bounding_boxes().tensor
    )
    positives = labels == 1
    cells = [int(((objects == i) & positives).nonzero()[0]) for i in objects[positives].unique()]
    windows = model.windows(centers)[cells]
    targets = masks[objects[cells]].crop_and_resize(windows, size)
    return proposals_of(windows, targets)


def evaluated(outputs: dict[int, Instances], output: str | None = None, **more) -> dict:
    evaluator = SegmentProposalEvaluator(NAME, output, **more)
    evaluator.reset()
    for image_id, proposals in outputs.items():
        evaluator.process([{"image_id": image_id}], [{"proposals": proposals}])
    return evaluator.evaluate().get("segment_proposals", {})


def moved(proposals: Instances, cells: float) -> Instances:
    """Proposals whose masks are pasted some of their cells too far to the right."""
    wide = proposals.mask_windows[:, 2] - proposals.mask_windows[:, 0]
    shift = cells * wide / proposals.proposal_masks.shape[1]
    found = copy.deepcopy(proposals)
    found.mask_windows[:, 0::2] += shift[:, None]
    return found


def test_perfect_masks_reach_the_ceiling_of_their_size(few):
    """Of 14 x 14 and 28 x 28 cells; on these images AR is 63.9 and 85.8."""
    ceilings = {}
    for size, least, most in ((14, 62, 66), (28, 84, 88)):
        proposals = {each["image_id"]: perfect(bitmasks(each), size) for each in records(few)}
        found = ceilings[size] = evaluated(proposals)
        assert least < found["AR@1000"] < most
        # No image has a hundred objects.
        assert all(found[f"AR{s}@100"] == found[f"AR{s}@1000"] for s in ("", "s", "m", "l"))
        # Each is the best that there is: half a cell to either side it is much worse.
        for cells in (-0.5, 0.5):
            there = {image: moved(each, cells) for image, each in proposals.items()}
            assert evaluated(there)["AR@1000"] < found["AR@1000"] - 5
    assert all(ceilings[28][key] > value + 10 for key, value in ceilings[14].items())


def noisy(root: Path) -> dict[int, Instances]:
    """150 proposals an image: the perfect ones among others, last and moved by some cells."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for record in records(root):
        good = perfect(bitmasks(record), 28)
        others = 150 - len(good)
        corners = torch.rand(others, 2, generator=generator) * 200
        sides = 20 + torch.rand(others, 1, generator=generator) * 100
        windows = torch.cat([corners, corners + sides], dim=1)
        masks = torch.rand(others, 28, 28, generator=generator) > 0.3
        good = moved(good, float(torch.rand(1, generator=generator)))
        found[record["image_id"]] = proposals_of(
            torch.cat([windows, good.mask_windows * 256]), torch.cat([masks, good.proposal_masks])
        )
    return found


def test_the_numbers_are_cocos(tmp_path, few):
    """pycocotools on all images at once, with a crowd, an id of 0 and images without objects."""
    proposals = noisy(few)
    content = json.loads((few / "val.json").read_text())
    annotations = content["annotations"]
    annotations[0]["id"], annotations[5]["iscrowd"] = 0, 1
    content["annotations"] = [each for each in annotations if each["image_id"] != 3]
    changed = tmp_path / "val.json"
    changed.write_text(json.dumps(content))
    del proposals[4]
    empty = proposals[5][:0]
    DatasetCatalog.register("changed", list)
    MetadataCatalog.get("changed").json_file = str(changed)
    evaluator = SegmentProposalEvaluator("changed", str(tmp_path / "out"))
    DatasetCatalog.remove("changed")
    MetadataCatalog.remove("changed")
    evaluator.reset()
    for image_id, found in {**proposals, 4: empty, 5: empty}.items():
        evaluator.process([{"image_id": image_id}], [{"proposals": found}])
    ours = evaluator.evaluate()["segment_proposals"]
    del proposals[5]

    with contextlib.redirect_stdout(io.StringIO()):
        for i, each in enumerate(content["annotations"]):
            each["id"] = i + 1
        truth = COCO()
        truth.dataset = content
        truth.createIndex()
        dump = [
            {"image_id": image_id, "category_id": 1, "segmentation": segment, "score": -float(i)}
            for image_id, found in proposals.items()
            for i, segment in enumerate(encoded_segments(found))
        ]
        expected = COCOeval(truth, truth.loadRes(dump), "segm")
        expected.params.useCats, expected.params.maxDets = 0, [100, 1000]
        expected.evaluate()
        expected.accumulate()
    recall = expected.eval["recall"][:, 0]  # (IoU, size, limit)
    assert len(ours) == 8
    for size, name in enumerate(("AR", "ARs", "ARm", "ARl")):
        for place, limit in enumerate((100, 1000)):
            theirs = 100 * recall[:, size, place].mean()
            assert ours[f"{name}@{limit}"] == pytest.approx(theirs, abs=1e-9)
    # The good ones are last.
    assert ours["AR@1000"] > 30
    assert ours["AR@100"] < 5
    written = json.loads((tmp_path / "out" / "segment_recall.json").read_text())
    assert written["recall"]["small"]["1000"] == pytest.approx(recall[:, 1, 1].tolist())


def test_no_object_of_a_size_is_nan(few):
    content = json.loads((few / "val.json").read_text())
    evaluator = SegmentProposalEvaluator(NAME)
    evaluator._coco.imgToAnns = {1: [a for a in content["annotations"] if a["image_id"] == 1][:1]}
    evaluator.reset()
    evaluator.process([{"image_id": 1}], [{"proposals": perfect(bitmasks(records(few)[0]), 28)}])
    found = evaluator.evaluate()["segment_proposals"]
    assert sum(np.isnan(found[f"AR{size}@100"]) for size in "sml") == 2


def test_masks_are_pasted_into_their_windows():
    windows = torch.tensor([[10.0, 20, 50, 60], [-20, -20, 20, 20], [280, 100, 320, 140]])
    masks = torch.ones(3, 14, 14)
    masks[0, :, 7:] = 0  # the left half
    found = encoded_segments(proposals_of(windows, masks, (200, 300)))
    drawn = np.stack([coco_mask.decode(each) for each in found])
    expected = np.zeros((3, 200, 300), np.uint8)
    expected[0, 20:60, 10:30] = 1
    expected[1, :20, :20] = 1
    expected[2, 100:140, 280:] = 1
    # Corners of a pasted mask are round: a pixel of each is missing.
    assert not (drawn > expected).any()
    assert (np.abs(drawn.astype(int) - expected).sum(axis=(1, 2)) <= [8, 4, 8]).all()
    assert drawn[0, 21:59, 11:30].all()


def _in_process(rank: int, port: int, root: Path, output: Path) -> None:
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", None, 2, rank)
    comm.create_local_process_group(2)
    register(root)
    own = {i: each for i, each in noisy(root).items() if (i <= 5) == (rank == 0)}
    found = evaluated(own)
    assert bool(found) == (rank == 0)
    if found:
        output.write_text(json.dumps(found))


def test_several_processes_find_what_one_finds(few, tmp_path):
    output = tmp_path / "found.json"
    arguments = (_find_free_port(), few, output)
    multiprocessing.start_processes(_in_process, arguments, nprocs=2, start_method="spawn")
    assert json.loads(output.read_text()) == evaluated(noisy(few))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"annotations": []}, "has no annotations"),
        ({"annotations": [{"id": 7, "image_id": 1, "bbox": [0, 0, 5, 5], "category_id": 1}]},
         r"1 annotations have no segmentation \(first: id 7\)"),
    ],
    ids=["no annotations", "no masks"],
)  # fmt: skip
def test_data_that_cannot_be_evaluated_is_refused(few, tmp_path, monkeypatch, change, message):
    path = tmp_path / "val.json"
    path.write_text(json.dumps({**json.loads((few / "val.json").read_text()), **change}))
    monkeypatch.setitem(MetadataCatalog.get(NAME).__dict__, "json_file", str(path))
    with pytest.raises(UserError, match=message):
        SegmentProposalEvaluator(NAME)


def test_a_model_without_segments_is_refused(few):
    evaluator = SegmentProposalEvaluator(NAME)
    evaluator.reset()
    for output in ({"instances": Instances((9, 9))}, {"proposals": Instances((9, 9))}):
        with pytest.raises(UserError, match="set MODEL.PROPOSAL_GENERATOR.NAME to SegmentPropos"):
            evaluator.process([{"image_id": 1}], [output])


def test_the_trainer_evaluates_segment_proposals_by_it(few):
    cfg = model_zoo.get_config("mini/table6_5x5.yaml")
    cfg.merge_from_list(
        ["MODEL.DEVICE", "cpu", "MODEL.SEGMENT_PROPOSALS.WIDTH", 8, "DATASETS.TEST", (NAME,),
         "DATALOADER.NUM_WORKERS", 0, "OUTPUT_DIR", str(few.parent), "INPUT.MIN_SIZE_TEST", 64]
    )  # fmt: skip
    found = FPNTrainer.test(cfg, FPNTrainer.build_model(cfg))
    assert list(found) == ["segment_proposals"]
    assert len(found["segment_proposals"]) == 8
    assert (few.parent / "inference" / "segment_recall.json").is_file()

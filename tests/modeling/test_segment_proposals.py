"""Segment proposals: the appendix's table of scales, what is positive, losses, and proposals."""

import math

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch import nn

from fpn_plugin import SegmentProposals, UserError, model_zoo, optimize_for_inference
from fpn_plugin.modeling.segment_proposals import boxes_of_masks, label_cells

STRIDES = (4, 8, 16, 32, 64)  # P2 to P6
HALF_OCTAVE = math.sqrt(2)
SIDE = 1024


def proposer(kernels: tuple[int, ...], channels: int = 4, **more: object) -> SegmentProposals:
    levels = [f"p{k}" for k in range(2, 7)]
    return SegmentProposals(
        in_features=levels, in_channels=channels, strides=STRIDES, kernel_sizes=kernels, width=8,
        **more,
    )  # fmt: skip


def grid(model: SegmentProposals, side: int = SIDE) -> list[torch.Tensor]:
    return model.centers([(side // s, side // s) for s in STRIDES], torch.device("cpu"))


def positives(model: SegmentProposals, box: list[float]) -> dict[tuple[int, int], list]:
    """The cells that are positives of an object: row and column, by level and kernel's place."""
    centers = grid(model)
    labels, objects = label_cells(centers, model.strides, model.sizes, torch.tensor([box]))
    assert not objects.any()
    found = {}
    for slot, of_slot in enumerate(labels.split([len(cells) for cells in centers])):
        columns = SIDE // model.strides[slot]
        cells = [divmod(int(cell), columns) for cell in of_slot.nonzero()]
        if cells:
            found[2 + slot % 5, slot // 5] = cells
    return found


def square(x: float, y: float, side: float) -> list[float]:
    return [x - side / 2, y - side / 2, x + side / 2, y + side / 2]


# Longer side of an object in pixels, its level, and whether it is the 7x7 head's.
SCALES = [
    *[(32 * 2**i, 2 + i, 0) for i in range(5)],
    *[(32 * HALF_OCTAVE * 2**i, 2 + i, 1) for i in range(5)],
    # The borders are in the middle, in log space, of neighbouring scales: 38.05 and 53.8.
    (38, 2, 0), (38.1, 2, 1), (53.7, 2, 1), (53.9, 3, 0),
    # Beyond the ends.
    (3, 2, 0), (1000, 6, 1),
]  # fmt: skip


@pytest.mark.parametrize(("side", "level", "head"), SCALES)
def test_an_object_is_a_positive_of_the_appendixs_level_and_kernel(side, level, head):
    middle = 512 + 2**level / 2  # of a cell
    model = proposer((5, 7))
    [(where, cells)] = positives(model, square(middle, middle, side)).items()
    assert where == (level, head)
    # Its centre is at most a cell away from those of 3 x 3 cells.
    cell = 512 // 2**level
    assert cells == [(cell + i, cell + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    # The longer side decides.
    assert list(positives(model, [middle - side / 2, 500, middle + side / 2, 501])) == [where]


@pytest.mark.parametrize(
    ("kernel", "side", "level"),
    [(5, 32, 2), (5, 45.2, 2), (5, 45.3, 3), (5, 181, 4), (7, 32, 2), (7, 63.9, 2), (7, 64.1, 3),
     (7, 128 * HALF_OCTAVE, 4)],
)  # fmt: skip
def test_a_single_kernel_takes_objects_of_all_sizes(kernel, side, level):
    [(where, _)] = positives(proposer((kernel,)), square(514, 514, side)).items()
    assert where == (level, 0)


def test_a_centre_between_cells_has_the_cells_around_it():
    # P4's cells have their centres at 520 and 536: 526 is 6 and 10 px from these, 22 from 504.
    model = proposer((5, 7))
    assert positives(model, square(526, 540, 128)) == {(4, 0): [(33, 32), (33, 33), (34, 32),
                                                               (34, 33)]}  # fmt: skip


def test_a_cell_near_two_objects_is_of_the_nearer_one():
    model = proposer((5,))
    boxes = torch.tensor([square(516, 520, 128), square(530, 520, 128), square(520, 520, 32)])
    centers = grid(model)
    labels, objects = label_cells(centers, model.strides, model.sizes, boxes)
    before = sum(len(cells) for cells in centers[:2])
    row = before + 32 * 64  # of P4, whose centres are at y = 520
    assert labels[row + 31 : row + 35].tolist() == [1, 1, 1, 0]
    assert objects[row + 31 : row + 34].tolist() == [0, 0, 1]
    assert set(objects[:before][labels[:before] == 1].tolist()) == {2}


def test_without_objects_all_cells_are_negatives():
    model = proposer((5, 7))
    none = torch.zeros(1, 4)  # an empty mask
    for boxes in (none[:0], none):
        labels, objects = label_cells(grid(model), model.strides, model.sizes, boxes)
        assert len(labels) == 2 * sum((SIDE // s) ** 2 for s in STRIDES)
        assert not labels.any()
        assert not objects.any()


def test_a_mask_covers_the_region_of_figure_4():
    model = proposer((5, 7))
    centers = grid(model)
    windows = model.windows(centers)
    sides = (windows[:, 2:] - windows[:, :2]).split([len(cells) for cells in centers])
    expected = [40, 80, 160, 320, 640]  # px on P2 to P6
    for of_slot, side in zip(sides, expected + [s * HALF_OCTAVE for s in expected], strict=True):
        torch.testing.assert_close(of_slot, torch.full_like(of_slot, side))
    # Around the middle of the cell's pixels: the first of P2 are 0 to 4.
    assert windows[0].tolist() == [-18, -18, 22, 22]
    assert windows[1].tolist() == [-14, -18, 26, 22]


@pytest.mark.parametrize("size", [14, 28])
def test_a_target_has_the_object_in_the_middle_and_a_quarter_of_padding(size):
    model = proposer((5,))
    # 64 px in a window of 80 around the cell of P3 at (516, 516).
    box = square(516, 516, 64)
    x0, y0, x1, y1 = map(int, box)
    bitmap = torch.zeros(1, SIDE, SIDE, dtype=torch.bool)
    bitmap[:, y0:y1, x0:x1] = True
    polygon = PolygonMasks([[torch.tensor([x0, y0, x1, y0, x1, y1, x0, y1]).double().numpy()]])
    cell = 256**2 + 64 * 128 + 64
    labels, _ = label_cells(grid(model), model.strides, model.sizes, torch.tensor([box]))
    assert labels[cell] == 1
    window = model.windows(grid(model))[[cell]]
    edge = round(size * 0.1)
    expected = [edge <= i < size - edge for i in range(size)]
    for masks in (BitMasks(bitmap), polygon):
        [target] = masks.crop_and_resize(window, size)
        assert target[size // 2].tolist() == expected
        assert target[:, size // 2].tolist() == expected
        # Less than half of a corner's cell is the object's.
        assert (size - 2 * edge) ** 2 - int(target.sum()) in (0, 4)


def config(*opts: object, name: str = "table6_5x5_7x7") -> CfgNode:
    cfg = model_zoo.get_config(f"mini/{name}.yaml")
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "MODEL.SEGMENT_PROPOSALS.WIDTH", 16, *opts])
    return cfg


def record(boxes: list[list[int]], height: int = 128, width: int = 160) -> dict:
    target = Instances((height, width))
    masks = torch.zeros(len(boxes), height, width, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    target.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    target.gt_masks = BitMasks(masks)
    image = torch.randint(0, 255, (3, height, width)).float()
    return {"image": image, "instances": target, "height": height, "width": width}


# Of mini's sizes, half of the paper's: for P2 to P4 with both kernels.
BOXES = [[8, 8, 24, 20], [40, 30, 62, 50], [60, 60, 90, 92], [10, 60, 50, 105], [80, 10, 140, 74]]


def losses(model: nn.Module, *records: dict) -> dict[str, torch.Tensor]:
    with EventStorage():
        return model.train()(list(records))


@pytest.mark.parametrize("boxes", [BOXES, []], ids=["objects", "no object"])
@pytest.mark.parametrize("name", ["table6_5x5", "table6_5x5_7x7", "table6_28x28"])
def test_gradients_reach_every_parameter(name, boxes):
    model = build_model(config(name=name))
    sum(losses(model, record(boxes), record(boxes)).values()).backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    assert not [name for name, gradient in gradients.items() if gradient is None]
    zero = {name for name, gradient in gradients.items() if not gradient.abs().max() > 0}
    # Without an object there is no mask to learn.
    layers = {n for n in gradients if ".mask." in n}
    assert zero == (set() if boxes else layers)


def test_losses_are_means_and_a_mask_weighs_ten_times_a_score():
    model = build_model(config())
    for head in model.proposal_generator.heads:
        for layer in (head.score, head.mask):
            nn.init.zeros_(layer.weight)
    found = losses(model, record(BOXES), record([]))
    # A logit of 0 costs log 2, whatever is right.
    assert found["loss_segment_score"].item() == pytest.approx(math.log(2))
    assert found["loss_segment_mask"].item() == pytest.approx(10 * math.log(2))
    # A quarter of 128 are positives at most.
    for head in model.proposal_generator.heads:
        nn.init.constant_(head.score.bias, 20.0)
    many = [[x, y, x + 16, y + 16] for x in range(4, 140, 24) for y in range(4, 110, 24)]
    found = losses(model, *[record(many)] * 2)
    assert found["loss_segment_score"].item() == pytest.approx(20 * 0.75, rel=1e-5)


def test_masks_at_cells_are_those_of_the_1x1_convolution():
    model = proposer((5, 7), mask_size=3)
    feature = [torch.rand(2, 4, 64 // s, 64 // s) for s in STRIDES]
    hidden = [head(level)[0] for head in model.heads for level in feature]
    dense = []
    for slot, of_slot in enumerate(hidden):
        dense.append(model.heads[slot // 5].mask(of_slot)[1].flatten(1).t())
    dense = torch.cat(dense).view(-1, 3, 3)
    cells = torch.randperm(len(dense))[:100]
    torch.testing.assert_close(model._masks(hidden, 1, cells), dense[cells])


def test_proposals_are_the_best_cells_of_the_image_only():
    generator = build_model(config()).proposal_generator.eval()
    generator.topk_test = 500
    small, large = record(BOXES, 60, 90), record(BOXES)
    model = build_model(config()).eval()
    model.proposal_generator = generator
    # All masks are full, so that none is left out as empty.
    for head in generator.heads:
        nn.init.constant_(head.mask.bias, 20.0)
    for given in (small, large):
        del given["instances"]
    with torch.no_grad():
        found = [each["proposals"] for each in model([small, large])]
    assert [len(each) for each in found] == [500, 500]
    for each, (height, width) in zip(found, [(60, 90), (128, 160)], strict=True):
        scale = torch.tensor([width, height] * 2)
        windows = each.mask_windows * scale
        middles = (windows[:, 2:] + windows[:, :2]) / 2
        assert (middles >= 0).all()
        assert (middles[:, 0] < width).all()
        assert (middles[:, 1] < height).all()
        assert (each.objectness_logits.diff() <= 0).all()
        assert each.proposal_masks.shape == (500, 14, 14)
        # Full masks: boxes are the windows' part in the image.
        clipped = Boxes(windows)
        clipped.clip((height, width))
        torch.testing.assert_close(each.proposal_boxes.tensor, clipped.tensor)
    # In an output of another size, windows are the same parts of the image.
    doubled = {**small, "height": 120, "width": 180}
    with torch.no_grad():
        ours, theirs = (model([given])[0]["proposals"] for given in (doubled, small))
    assert ours.image_size == (120, 180)
    assert torch.equal(ours.mask_windows, theirs.mask_windows)
    torch.testing.assert_close(ours.proposal_boxes.tensor, theirs.proposal_boxes.tensor * 2)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_an_optimized_copy_proposes_the_same(dtype, close):
    model = build_model(config()).eval()
    for head in model.proposal_generator.heads:
        nn.init.constant_(head.mask.bias, 2.0)
    given = [{"image": record([])["image"]}]
    with torch.no_grad():
        [[theirs], [ours]] = model(given), optimize_for_inference(model, dtype=dtype)(given)
    ours, theirs = ours["proposals"], theirs["proposals"]
    assert len(ours) == len(theirs) == 1000
    torch.testing.assert_close(ours.objectness_logits, theirs.objectness_logits, rtol=0, atol=close)
    # Cells with nearly the same score may change places.
    same = (ours.mask_windows == theirs.mask_windows).all(dim=1)
    assert same.sum() > (900 if dtype == torch.float32 else 5)
    torch.testing.assert_close(
        ours.proposal_masks[same], theirs.proposal_masks[same], rtol=0, atol=close
    )


def test_boxes_are_those_of_masks():
    masks = torch.zeros(3, 4, 4)
    masks[0, 1:3, 2:] = 0.7
    masks[1] = 1.0
    windows = torch.tensor([[10.0, 20, 18, 28], [-4, -4, 4, 4], [0, 0, 8, 8]])
    boxes = boxes_of_masks(masks, windows)
    assert boxes[:2].tolist() == [[14, 22, 18, 26], [-4, -4, 4, 4]]
    assert not Boxes(boxes[2:]).nonempty().any()


@pytest.mark.parametrize(
    ("opts", "message"),
    [
        (["SEGMENT_PROPOSALS.IN_FEATURES", ["p2", "p7"]], "names p7; the backbone gives p2, p3"),
        (["SEGMENT_PROPOSALS.IN_FEATURES", []], "names no level"),
        (["SEGMENT_PROPOSALS.KERNEL_SIZES", [4]], r"KERNEL_SIZES .* is \[4\], expected odd"),
        (["SEGMENT_PROPOSALS.KERNEL_SIZES", []], r"KERNEL_SIZES .* is \[\], expected odd"),
        (["SEGMENT_PROPOSALS.MASK_SIZE", 0], "MASK_SIZE .* is 0, expected a number above 0"),
        (["SEGMENT_PROPOSALS.OBJECT_CELLS", -1.0], "OBJECT_CELLS .* is -1.0"),
        (["MASK_ON", False], "^MODEL.MASK_ON is False"),
        (["META_ARCHITECTURE", "GeneralizedRCNN"], "set MODEL.META_ARCHITECTURE to ProposalNet"),
        (["BACKBONE.NAME", "build_resnet_backbone", "RESNETS.OUT_FEATURES", ["res2", "res3"],
          "SEGMENT_PROPOSALS.IN_FEATURES", ["res2", "res3"]], r"have \[64, 128\] channels"),
    ],
    ids=str,
)  # fmt: skip
def test_an_error_names_the_key(opts, message):
    keys = [f"MODEL.{key}" if i % 2 == 0 else key for i, key in enumerate(opts)]
    with pytest.raises(UserError, match=message) as error:
        build_model(config(*keys))
    assert "\n" not in str(error.value)


def test_data_without_masks_is_refused():
    given = record(BOXES)
    given["instances"].remove("gt_masks")
    with pytest.raises(UserError, match="has no masks.*set MODEL.MASK_ON True"):
        losses(build_model(config()), given)
    # An image without objects has none to learn from.
    empty = record([])
    empty["instances"].remove("gt_masks")
    assert losses(build_model(config()), empty)["loss_segment_mask"] == 0

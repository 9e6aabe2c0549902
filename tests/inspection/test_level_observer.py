"""What the observer counts is what independent computations count, and it changes nothing."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from detectron2.engine import SimpleTrainer
from detectron2.modeling.matcher import Matcher
from detectron2.structures import Instances, RotatedBoxes
from detectron2.utils.events import EventStorage
from torch.nn import functional as F
from torchvision.ops import box_iou

from fpn_plugin import UserError
from fpn_plugin.engine.level_statistics import LevelStatistics
from fpn_plugin.inspection.level_observer import anchor_levels, matched_anchors, observed_levels
from fpn_plugin.inspection.level_tally import LevelTally, level_scalars

FASTER = "mini/faster_rcnn_R_18_FPN.yaml"
MODELS = [
    FASTER,
    "mini/table1_c_FPN.yaml",
    "mini/table1_a_C4.yaml",
    "mini/table2_c_FPN.yaml",
    "mini/table3_a_C4.yaml",
    "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml",
]


def step(model, batch, observe):
    """Losses, gradients, what Detectron2 logged, and what was observed."""
    torch.manual_seed(5)
    sums = None
    with EventStorage() as storage:
        if observe:
            with observed_levels(model) as tally:
                losses = model(copy.deepcopy(batch))
            sums = tally.sums()
        else:
            losses = model(copy.deepcopy(batch))
        sum(losses.values()).backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    plain = {k: v for m in model.modules() for k, v in vars(m).items() if isinstance(v, float)}
    return losses, gradients, storage.latest(), sums, torch.rand(1), plain


def count_hooks(model):
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


@pytest.mark.parametrize("name", MODELS)
def test_observing_changes_nothing_and_its_losses_are_the_whole(name, make_model, batch):
    opts = ["MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True]
    model = make_model(name, *(opts if "cascade" in name else ()))
    if "retinanet" in name:  # its scripted focal loss is another program from the third call on
        for observe in (False, True, False):
            step(copy.deepcopy(model), batch, observe)
    other = copy.deepcopy(model)  # batch norms that train have a state
    plain = step(model, batch, observe=False)
    hooks = count_hooks(other)
    seen = step(other, batch, observe=True)
    assert count_hooks(other) == hooks
    assert plain[0].keys() == seen[0].keys()
    assert all(torch.equal(plain[0][key], seen[0][key]) for key in plain[0])
    assert all(torch.equal(a, b) for a, b in zip(plain[1], seen[1], strict=True))
    assert plain[2] == seen[2]
    assert torch.equal(plain[4], seen[4])  # random numbers drawn later
    # RetinaNet's running count of anchors, for example.
    assert plain[5] == seen[5]

    losses, sums = seen[0], seen[3]
    assert sums["images"] == {"": 2}
    rpn = sum(loss.item() for key, loss in losses.items() if "rpn" in key)
    box = sum(loss.item() for key, loss in losses.items() if "rpn" not in key)
    if "retinanet" in name:
        # Its losses are divided by a running count of matched anchors.
        box *= model.loss_normalizer
    for key, loss in (("rpn_loss", rpn), ("box_loss", box)):
        assert sum(sums.get(key, {}).values()) == pytest.approx(loss, rel=1e-5)


def test_federated_loss_leaves_random_numbers_as_they_are(make_model, batch, monkeypatch):
    model = make_model(FASTER, "MODEL.ROI_BOX_HEAD.USE_SIGMOID_CE", True)
    predictor = model.roi_heads.box_predictor
    predictor.use_fed_loss, predictor.fed_loss_num_classes = True, 6
    predictor.register_buffer("fed_loss_cls_weights", torch.ones(14))
    plain = step(copy.deepcopy(model), batch, observe=False)
    seen = step(model, batch, observe=True)
    assert all(torch.equal(plain[0][key], seen[0][key]) for key in plain[0])
    assert torch.equal(plain[4], seen[4])


def levels_of(boxes, k0=4, s0=112, finest=2, coarsest=5):
    """Eq. (1) once more, box by box."""
    levels = []
    for x0, y0, x1, y1 in boxes.double().tolist():
        k = math.floor(k0 + math.log2(max(math.sqrt((x1 - x0) * (y1 - y0)) / s0, 1e-8)))
        levels.append(f"p{min(max(k, finest), coarsest)}")
    return levels


def counted(levels, chosen=None, names=("p2", "p3", "p4", "p5")):
    chosen = [1] * len(levels) if chosen is None else chosen
    return {
        name: sum(float(c) for k, c in zip(levels, chosen, strict=True) if k == name)
        for name in names
    }


def approximately(expected):
    return {name: pytest.approx(value, rel=1e-4, abs=1e-6) for name, value in expected.items()}


def test_rois_foreground_and_the_loss_of_the_box_head(make_model, batch):
    model = make_model(FASTER)
    heads = model.roi_heads
    torch.nn.init.normal_(heads.box_predictor.bbox_pred.weight, std=0.1)
    seen = {}
    heads.register_forward_hook(lambda _, args, out: seen.update(proposals=out[0]))
    heads.box_predictor.register_forward_hook(lambda _, args, out: seen.update(predictions=out))
    *_, sums, _, _ = step(model, batch, observe=True)

    boxes = torch.cat([p.proposal_boxes.tensor for p in seen["proposals"]])
    classes = torch.cat([p.gt_classes for p in seen["proposals"]])
    truths = torch.cat(
        [(p.gt_boxes if p.has("gt_boxes") else p.proposal_boxes).tensor for p in seen["proposals"]]
    )
    levels = levels_of(boxes)
    assert len(set(levels)) > 2
    assert sums["rois"] == counted(levels)
    assert sums["foreground"] == counted(levels, (classes < 14).tolist())
    scores, deltas = seen["predictions"]
    each = F.cross_entropy(scores, classes, reduction="none")
    for i in (classes < 14).nonzero()[:, 0].tolist():
        width, height = (boxes[i, 2:] - boxes[i, :2]).tolist()
        wide, high = (truths[i, 2:] - truths[i, :2]).tolist()
        target = torch.tensor(
            [
                10 * ((truths[i, 0] + truths[i, 2]) - (boxes[i, 0] + boxes[i, 2])) / 2 / width,
                10 * ((truths[i, 1] + truths[i, 3]) - (boxes[i, 1] + boxes[i, 3])) / 2 / height,
                5 * math.log(wide / width),
                5 * math.log(high / height),
            ]
        )
        c = int(classes[i])
        each[i] += (deltas[i, 4 * c : 4 * c + 4] - target).abs().sum()
    expected = counted(levels, (each / len(each)).tolist())
    assert sums["box_loss"] == approximately(expected)


@pytest.mark.parametrize("name", [FASTER, "mini/table1_c_FPN.yaml"])
def test_anchors_recall_and_the_loss_of_the_rpn(name, make_model, batch, monkeypatch):
    model = make_model(name, "MODEL.RPN.SMOOTH_L1_BETA", 0.0)
    rpn = model.proposal_generator
    given = {}
    losses = rpn.losses

    def keep(*args):
        given.setdefault("losses", args)  # the first call is the model's own
        return losses(*args)

    monkeypatch.setattr(rpn, "losses", keep)
    rpn.register_forward_hook(lambda _, args, out: given.update(proposals=out[0]))
    *_, sums, _, _ = step(model, batch, observe=True)
    names = ("p2", "p3", "p4", "p5", "p6")

    anchors, logits, labels, deltas, _ = given["losses"]
    truth = batch[0]["instances"].gt_boxes.tensor
    every = torch.cat([level.tensor for level in anchors])
    overlaps = box_iou(truth, every)
    best = overlaps.max(dim=1, keepdim=True).values
    matched = (overlaps >= 0.7).any(dim=0) | (overlaps == best).any(dim=0)
    level_of_anchor = [name for name, a in zip(names, anchors, strict=True) for _ in range(len(a))]
    assert sums["anchors"] == counted(level_of_anchor, matched.tolist(), names)

    # Boxes of 13, 37.4, 90 and 198.5 px; anchors of 16, 32, 64, 128, 256.
    assert sums["objects"] == {"p2": 1, "p3": 1, "p4": 1, "p5": 0, "p6": 1}
    covered = box_iou(truth, given["proposals"][0].proposal_boxes.tensor).max(dim=1).values >= 0.5
    assert sum(sums["recalled"].values()) == covered.sum()

    flat = torch.cat(logits, dim=1).flatten()
    wanted = torch.stack(labels).flatten()
    each = F.binary_cross_entropy_with_logits(flat, wanted.clamp(min=0).float(), reduction="none")
    each = each * (wanted >= 0)
    boxes, sizes = every.repeat(2, 1), torch.cat([every[:, 2:] - every[:, :2]] * 2)
    target = truth[overlaps.argmax(dim=0)].repeat(2, 1)
    extent = target[:, 2:] - target[:, :2]
    moved = (target[:, :2] + extent / 2 - boxes[:, :2] - sizes / 2) / sizes
    expected = torch.cat([moved, (extent / sizes).log()], dim=1)
    away = (torch.cat(deltas, dim=1).flatten(0, 1) - expected).abs().sum(dim=1)
    each = (each + away * (wanted == 1)) / (256 * 2)
    whole = counted(level_of_anchor * 2, each.tolist(), names)
    assert sums["rpn_loss"] == approximately(whole)


def test_an_object_belongs_to_the_nearest_anchors(make_model):
    rpn = make_model(FASTER).proposal_generator
    halfway = math.sqrt(32 * 64)
    sides = [1, 22, 23, halfway - 0.1, halfway + 0.1, 90, 91, 1000]
    boxes = torch.tensor([[10, 10, 10 + 2 * side, 10 + side / 2] for side in sides])
    assert anchor_levels(rpn, boxes).tolist() == [0, 0, 1, 1, 2, 2, 3, 4]


def test_feature_norms(make_model, batch):
    model = make_model(FASTER)
    kept = {}
    model.backbone.register_forward_hook(lambda _, args, out: kept.update(out))
    *_, sums, _, _ = step(model, batch, observe=True)
    logged = level_scalars([sums])
    for name, features in kept.items():
        norms = features.double().pow(2).sum(dim=1).sqrt()
        assert logged[f"fpn_feature_norm/{name}"] == pytest.approx(norms.mean().item(), rel=1e-5)


def test_figures_of_two_processes():
    tallies = []
    for of_process in (
        {"images": [1], "rois": [6, 2], "foreground": [3, 0], "box_loss": [1.0, 3.0]},
        {"images": [3], "rois": [4, 0], "foreground": [1, 0], "box_loss": [4.0, 0.0]},
    ):
        tally = LevelTally()
        for statistic, values in of_process.items():
            levels = [""] if statistic == "images" else ["p2", "p3"]
            tally.add(statistic, levels, torch.tensor(values))
        for statistic, values in (
            ("rpn_loss", [1.0, 1]),
            ("objects", [2, 0]),
            ("recalled", [1, 0]),
        ):
            tally.add(statistic, ["p2", "p6"], torch.tensor(values))
        tallies.append(tally.sums())
    assert level_scalars(tallies) == {
        "fpn_rois/p2": 2.5,
        "fpn_rois/p3": 0.5,
        "fpn_foreground/p2": 0.4,
        "fpn_foreground/p3": 0.0,
        "fpn_box_share/p2": 0.625,
        "fpn_box_share/p3": 0.375,
        "fpn_rpn_share/p2": 0.5,
        "fpn_rpn_share/p6": 0.5,
        "fpn_share/p2": pytest.approx(7 / 12),
        "fpn_share/p3": 0.25,
        "fpn_share/p6": pytest.approx(2 / 12),
        "fpn_rpn_recall/p2": 0.5,  # p6 had no object
    }


def test_the_hook_logs_the_last_iteration_of_each_period(make_model, batch):
    model = make_model(FASTER)
    trainer = SimpleTrainer(model, [batch] * 5, torch.optim.SGD(model.parameters(), lr=0.0))
    trainer.register_hooks([LevelStatistics(model, 2)])
    trainer.train(0, 5)
    histories = trainer.storage.histories()
    for name in ("fpn_share/p6", "fpn_rois/p2", "fpn_anchors_matched/p3", "fpn_feature_norm/p5"):
        assert [iteration for _, iteration in histories[name].values()] == [1, 3], name
    shares = [histories[f"fpn_share/p{k}"].latest() for k in range(2, 7)]
    assert sum(shares) == pytest.approx(1)
    assert sum(histories[f"fpn_rois/p{k}"].latest() for k in range(2, 6)) == 64
    assert not any("loss" in name for name in histories if name.startswith("fpn_"))
    with pytest.raises(UserError, match=r"LEVEL_STATS_PERIOD is -5"):
        LevelStatistics(model, -5)


def test_a_step_that_fails_leaves_the_model_as_it_was(make_model, batch):
    model = make_model(FASTER)
    del batch[0]["instances"]
    trainer = SimpleTrainer(model, [batch], torch.optim.SGD(model.parameters(), lr=0.0))
    trainer.register_hooks([LevelStatistics(model, 1)])
    hooks = count_hooks(model)
    with pytest.raises(AssertionError, match="gt_instances"):
        trainer.train(0, 1)
    assert count_hooks(model) == hooks


def test_heads_that_do_not_sample_again_alike_are_refused(make_model, batch, monkeypatch):
    model = make_model(FASTER)
    sample = model.roi_heads.label_and_sample_proposals
    calls = iter([0, 1])
    monkeypatch.setattr(
        model.roi_heads,
        "label_and_sample_proposals",
        lambda *given: [of_image[next(calls, 0) :] for of_image in sample(*given)],
    )
    with pytest.raises(UserError, match=r"LEVEL_STATS_PERIOD: FPNROIHeads predicts .* set it to 0"):
        step(model, batch, observe=True)


def test_rotated_anchors_are_matched():
    pytest.importorskip("detectron2._C", reason="rotated boxes need Detectron2's compiled part")
    rpn = SimpleNamespace(anchor_matcher=Matcher([0.5], [0, 1]), anchor_boundary_thresh=-1)
    anchors = [RotatedBoxes([[20.0, 20, 20, 10, 0]]), RotatedBoxes([[20.0, 20, 20, 10, 90]])]
    truths = Instances((40, 40), gt_boxes=RotatedBoxes([[20.0, 20, 20, 10, 85]]))
    assert matched_anchors(rpn, anchors, [truths])[0].tolist() == [False, True]


@pytest.mark.parametrize("name", [FASTER, "mini/table2_c_FPN.yaml"])
def test_training_ends_with_the_same_weights_bit_for_bit(name, make_model, batch):
    first = make_model(name)
    models = [first, copy.deepcopy(first)]
    before = copy.deepcopy(first.state_dict())
    for model, hooks in zip(models, ([], [LevelStatistics(models[1], 2)]), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
        trainer = SimpleTrainer(model, copy.deepcopy([batch] * 3), optimizer)
        trainer.register_hooks(hooks)
        torch.manual_seed(2)
        trainer.train(0, 3)
    assert "fpn_rois/p2" in trainer.storage.histories()
    plain, observed = (model.state_dict() for model in models)
    assert all(torch.equal(plain[key], observed[key]) for key in plain)
    moved = [key for key in plain if not torch.equal(plain[key], before[key])]
    assert "roi_heads.box_predictor.cls_score.weight" in moved
    assert "backbone.fpn_lateral4.weight" in moved

"""Parts for a whole batch against Detectron2's: losses, gradients, logs, random numbers, waits."""

import functools

import detectron2.model_zoo
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import Boxes, Instances
from detectron2.utils.events import EventStorage
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from fpn_plugin import model_zoo
from fpn_plugin.deploy.batched_parts import (
    BatchedFastRCNNOutputLayers,
    BatchedRPN,
    KeptAnchorGenerator,
    PatientMatcher,
)
from fpn_plugin.deploy.fast_training import use_batched_parts
from fpn_plugin.inspection.level_observer import observed_levels
from fpn_plugin.kernels import nms_fixpoint, proposals, pyramid_roi_align_by_level
from fpn_plugin.modeling import pooler
from fpn_plugin.modeling.sampling import sample_labels

FASTER = "COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml"
CASCADE = "Misc/cascade_mask_rcnn_R_50_FPN_1x.yaml"


def built(cfg: CfgNode, **opts) -> torch.nn.Module:
    cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS, cfg.MODEL.MASK_ON = "cpu", "", False
    small = {
        "MODEL.RESNETS.DEPTH": 18,
        "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
        "MODEL.FPN.OUT_CHANNELS": 16,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 16,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 64,
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 300,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 200,
    }
    for key, value in (small | {k.replace("__", "."): v for k, v in opts.items()}).items():
        cfg.merge_from_list([key, value])
    return build_model(cfg).train()


def pair(name: str, **opts) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Stock Detectron2's, and the plugin's with parts for a whole batch."""
    stock = built(detectron2.model_zoo.get_config(name), **opts)
    ours = built(model_zoo.get_config(name), **opts)
    ours.load_state_dict(stock.state_dict())
    use_batched_parts(ours)
    assert type(ours.proposal_generator) is BatchedRPN
    return stock, ours


def batch(objects=(5, 0, 3)) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    inputs = []
    for count in objects:
        corner, size = torch.rand(2, count, 2, generator=generator) * 60
        truth = Instances((96, 128))
        truth.gt_boxes = Boxes(torch.cat([corner, corner + size + 4], dim=1))
        truth.gt_classes = torch.randint(0, 80, (count,), generator=generator)
        image = torch.randint(0, 256, (3, 96, 128), generator=generator).byte()
        inputs.append({"image": image, "instances": truth})
    return inputs


def step(model, inputs):
    torch.manual_seed(3)
    with EventStorage(0) as storage:
        losses = model(inputs)
        sum(losses.values()).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return losses, gradients, {k: v[0] for k, v in storage.latest().items()}, torch.rand(1)


@pytest.mark.parametrize(
    ("name", "opts"),
    [
        (FASTER, {}),
        (FASTER, {"MODEL__RPN__BBOX_REG_LOSS_TYPE": "giou", "MODEL__RPN__BOUNDARY_THRESH": 0}),
        (FASTER, {"MODEL__ROI_BOX_HEAD__CLS_AGNOSTIC_BBOX_REG": True}),
        (FASTER, {"MODEL__ROI_BOX_HEAD__BBOX_REG_LOSS_TYPE": "ciou"}),
        (FASTER, {"MODEL__ROI_BOX_HEAD__USE_SIGMOID_CE": True}),
        (FASTER, {"MODEL__ROI_HEADS__PROPOSAL_APPEND_GT": False}),
        (CASCADE, {}),
    ],
)
def test_a_step_is_stock_detectron2s(name, opts):
    (losses, gradients, logged, drawn), (mine, my_gradients, my_logged, my_drawn) = (
        step(model, batch()) for model in pair(name, **opts)
    )
    assert mine.keys() == losses.keys() and sum(losses.values()) > 1
    for key, loss in losses.items():
        torch.testing.assert_close(mine[key], loss, rtol=1e-6, atol=1e-6)
    for key, gradient in gradients.items():
        scale = gradient.abs().max().clamp(min=1e-12)
        torch.testing.assert_close(my_gradients[key] / scale, gradient / scale, rtol=0, atol=1e-4)
    assert my_logged == pytest.approx(logged)
    assert torch.equal(my_drawn, drawn)


def test_level_statistics_are_those_of_stock_parts():
    sums = []
    for model in pair(FASTER):
        with observed_levels(model) as tally:
            step(model, batch())
        sums.append(tally.sums())
    theirs, mine = sums
    assert mine.keys() == theirs.keys() and len(mine) == 10
    for key, value in theirs.items():
        assert mine[key] == pytest.approx(value, rel=1e-4, abs=1e-6), key


def test_a_batch_without_objects():
    (losses, _, logged, _), (mine, _, my_logged, _) = (
        step(model, batch((0, 0))) for model in pair(FASTER)
    )
    for key, loss in losses.items():
        torch.testing.assert_close(mine[key], loss, rtol=1e-6, atol=1e-6)
    assert my_logged == pytest.approx(logged)


def test_proposals_that_are_not_finite_stop_a_training():
    _, ours = pair(FASTER)
    ours.proposal_generator.rpn_head.anchor_deltas.bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError), EventStorage(0):
        ours(batch())


def test_detections_are_stock_detectron2s():
    stock, ours = (model.eval() for model in pair(FASTER))
    assert type(ours.roi_heads.box_predictor) is BatchedFastRCNNOutputLayers
    with torch.no_grad():
        expected, found = ([out["instances"] for out in model(batch())] for model in (stock, ours))
    for theirs, mine in zip(expected, found, strict=True):
        assert len(mine) == len(theirs) > 0
        torch.testing.assert_close(mine.pred_boxes.tensor, theirs.pred_boxes.tensor)


class _Waits(TorchDispatchMode):
    """Counts operators that, on a GPU, wait for it."""

    NAMES = ("aten.nonzero.default", "aten._local_scalar_dense")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func).startswith(self.NAMES)
        masks = args[1] if str(func) == "aten.index.Tensor" else ()
        self.count += any(m is not None and m.dtype == torch.bool for m in masks)
        return func(*args, **(kwargs or {}))


def test_waits_do_not_grow_with_the_batch(monkeypatch):
    monkeypatch.setattr(proposals, "nms_mask", functools.partial(nms_fixpoint, rounds=99))
    monkeypatch.setattr(pooler, "non_finite_flag", lambda _: None)  # these three as on a GPU
    monkeypatch.setattr(pooler, "pyramid_roi_align", lambda *x: pyramid_roi_align_by_level(*x[:-1]))
    transfers = []  # of what a CPU has anyway, which no operator shows
    tolist = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: (transfers.append(1), tolist(t))[1])
    stock, ours = pair(FASTER)
    counts = []
    for model in (ours, stock):
        for objects in ((5, 3), (5, 3, 4, 2)):
            transfers.clear()
            with _Waits() as waits, EventStorage(0):
                model(batch(objects))
            counts.append(waits.count + len(transfers))
    few, many, stocks_few, stocks_many = counts
    # Samples of anchors, proposals, samples of proposals, statistics. The host has images' sizes,
    # which are read twice.
    assert few == many == 4 + 2 and stocks_few > 25 and stocks_many > stocks_few + 15


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6),
    offset=st.sampled_from([0.0, 0.5]),
)
def test_kept_anchors_are_detectron2s(sizes, offset):
    options = {"aspect_ratios": [[0.5, 1.0]], "strides": [4, 8], "offset": offset}
    stock, ours = (
        kind(sizes=[[32], [64]], **options)
        for kind in (DefaultAnchorGenerator, KeptAnchorGenerator)
    )
    for height, width in sizes:
        maps = [torch.zeros(1, 1, height, width), torch.zeros(1, 1, (height + 1) // 2, width)]
        for theirs, mine in zip(stock(maps), ours(maps), strict=True):
            assert torch.equal(mine.tensor, theirs.tensor)
    assert len(ours._grids[0]) == max(height for height, _ in sizes)


def test_a_box_without_width_has_a_loss_that_is_not_finite():
    _, ours = pair(FASTER)
    inputs = batch((3,))
    inputs[0]["instances"].gt_boxes.tensor[0, 2] = inputs[0]["instances"].gt_boxes.tensor[0, 0]
    losses, *_ = step(ours, inputs)
    assert not sum(losses.values()).isfinite()


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([0, 0.2, 0.4, 0.5, 0.9]), min_size=4, max_size=4), max_size=4
    ),
    low_quality=st.booleans(),
)
def test_the_matcher_is_detectron2s(rows, low_quality):
    quality = torch.tensor(rows).reshape(-1, 4)
    matchers = [kind([0.3, 0.5], [0, -1, 1], low_quality) for kind in (Matcher, PatientMatcher)]
    for theirs, mine in zip(*(matcher(quality) for matcher in matchers), strict=True):
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype


@settings(max_examples=40, deadline=None)
@given(
    labels=st.lists(st.lists(st.integers(-1, 2), max_size=30), max_size=3),
    most=st.integers(0, 12),
    fraction=st.sampled_from([0.0, 0.25, 1.0]),
)
def test_samples_are_detectron2s(labels, most, fraction):
    labels = [torch.tensor(of_image, dtype=torch.int64) for of_image in labels]
    torch.manual_seed(0)
    expected = [subsample_labels(of_image, most, fraction, 2) for of_image in labels]
    torch.manual_seed(0)
    for mine, theirs in zip(sample_labels(labels, most, fraction, 2), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))

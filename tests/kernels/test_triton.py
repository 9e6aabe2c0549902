"""Triton's kernels against the plain torch that may replace them, and torchvision.

They run on CUDA or, in a process with TRITON_INTERPRET=1, by Triton's interpreter on the CPU.
"""

import os
from functools import partial

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from hypothesis import given, settings
from hypothesis import strategies as st

from fpn_plugin import PyramidROIPooler
from fpn_plugin.errors import NonFiniteError
from fpn_plugin.kernels import (
    nms_fixpoint,
    nms_mask,
    pyramid_roi_align_by_level,
    select_proposals,
)  # fmt: skip
from fpn_plugin.kernels.levels import LevelRule, levels_of, thresholds
from fpn_plugin.kernels.nms import rounded_down
from tests.helpers.feature_maps import feature_maps

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
if INTERPRETED:
    device = "cpu"
else:
    device = "cuda"
    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
    ]
if INTERPRETED or torch.cuda.is_available():
    from fpn_plugin.kernels import nms_triton, roi_align_triton

SCALES = (1 / 4, 1 / 8, 1 / 16)
EXAMPLES = 5 if INTERPRETED else 60


maps = partial(feature_maps, SCALES, device=device)


def check(levels, rois, level_of, size=(2, 3), ratio=0, aligned=True, atol=1e-5):
    """Values and gradients are those of torchvision in float32, level after level."""
    exact = [level.detach().float().requires_grad_() for level in levels]
    ours = roi_align_triton.pyramid_roi_align(levels, rois, level_of, SCALES, size, ratio, aligned)
    theirs = pyramid_roi_align_by_level(exact, rois, level_of, SCALES, size, ratio, aligned)
    assert ours.dtype == levels[0].dtype
    step = torch.finfo(ours.dtype).eps
    torch.testing.assert_close(
        ours.float(), theirs, rtol=max(step, 1e-6), atol=max(step, atol), equal_nan=True
    )
    weight = torch.linspace(-1, 1, ours.numel(), device=ours.device).view_as(ours).to(ours.dtype)
    mine = torch.autograd.grad(ours, levels, weight)
    other = torch.autograd.grad(theirs, exact, weight.float())
    for a, b, level in zip(mine, other, levels, strict=True):
        assert a.dtype == level.dtype and a.stride() == level.stride()
        scale = b.abs().amax().clamp(min=1)  # sums of many, in any order
        torch.testing.assert_close(a.float() / scale, b / scale, rtol=step, atol=max(step, atol))
    return ours


def boxes_of(rows):
    """Rows of image, level and XYXY as RoIs and indices of levels."""
    table = torch.tensor(rows, dtype=torch.float32, device=device).reshape(-1, 6)
    return table[:, [0, 2, 3, 4, 5]], table[:, 1].long()


ROWS = [
    (0, 0, 3.0, 5, 21, 17),
    (1, 1, 8.5, 0, 60, 47),
    (0, 2, -9.0, -7, 70, 55),  # across the border
    (1, 0, 62.0, 40, 75, 61),
    (0, 1, 300.0, 300, 340, 330),  # outside
    (1, 2, 12.0, 12, 12, 12),  # without extent
    (0, 0, 20.0, 20, 9, 25),  # turned around
]


@pytest.mark.parametrize(
    ("dtype", "last", "ratio", "aligned", "channels", "size"),
    [
        (torch.float32, True, 0, True, 3, (2, 3)),
        (torch.float32, False, 0, True, 3, (2, 3)),
        (torch.float32, True, 0, False, 5, (4, 5)),
        (torch.float32, False, 2, False, 5, (3, 2)),
        (torch.float16, True, 0, True, 8, (2, 2)),
        (torch.float16, False, 1, True, 3, (2, 3)),
        (torch.bfloat16, True, 2, True, 3, (2, 3)),
        (torch.bfloat16, False, 0, False, 3, (3, 4)),
    ],
)
def test_roi_align(dtype, last, ratio, aligned, channels, size):
    rows = [row for row in ROWS if ratio == 0 or row[2] <= row[4]]  # else torchvision fails
    pooled = check(maps(channels, dtype, last), *boxes_of(rows), size, ratio, aligned)
    layout = torch.channels_last if last else torch.contiguous_format
    assert pooled.is_contiguous(memory_format=layout)


coordinate = st.floats(-30, 110, width=32)
whole = st.integers(-2, 16).map(lambda at: at * 4.0)


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    rows=st.lists(
        st.one_of(
            st.tuples(st.integers(0, 1), st.integers(0, 2), *[coordinate] * 4),
            # Edges of feature cells, where a rounding error adds a sample.
            st.tuples(st.integers(0, 1), st.integers(0, 2), *[whole] * 4),
        ),
        max_size=4,
    ),
)
def test_roi_align_of_any_boxes(rows):
    check(maps(), *boxes_of(rows))


def test_more_channels_and_cells_than_a_program_takes():
    check(maps(300, last=True, images=1), *boxes_of(ROWS[:1]), (5, 1))
    check(maps(20, last=False, images=1), *boxes_of(ROWS[:1]), (13, 5))


def test_maps_of_mixed_or_no_layout():
    mixed = [
        level.contiguous().detach().requires_grad_() if i == 0 else level
        for i, level in enumerate(maps())
    ]
    rois, level_of = boxes_of(ROWS[:3])
    results = [
        roi_align_triton.pyramid_roi_align(m, rois, level_of, SCALES, (2, 3), 0, True)
        for m in (mixed, [level.mT.contiguous().mT for level in mixed], maps())
    ]
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=0)
    torch.testing.assert_close(results[1], results[2], rtol=0, atol=0)


@pytest.mark.parametrize("column", range(1, 5))
@pytest.mark.parametrize("aligned", [False, True])
def test_a_box_that_is_not_finite_gives_nan(column, aligned):
    rois, level_of = boxes_of(ROWS[:3])
    rois[1, column] = torch.nan if column % 2 else torch.inf
    levels = maps()
    pooled = check(levels, rois, level_of, (2, 3), 0, aligned)
    assert pooled.isnan().flatten(1).all(dim=1).tolist() == [False, True, False]
    assert not pooled[[0, 2]].isnan().any()


@pytest.mark.parametrize("size", [256.0] if INTERPRETED else [256.0, 224.0, 100.0])
def test_levels_are_those_of_equation_1_at_every_boundary(size):
    rule = LevelRule(2, 4, size, 4)
    near = torch.cat(
        [
            torch.tensor(size * 2.0**k).view(torch.int32) + torch.arange(-40, 3, dtype=torch.int32)
            for k in (-2, -1, 0, 1)
        ]
    )
    side = torch.cat([near.view(torch.float32), torch.tensor([0.0, 1e19, 3e38])])
    half = side[:, None] / 2
    rois = torch.cat([half * 0, -half, -half, half, half], dim=1).to(device)
    # Each level has one value, which is that of a sample in a box's centre.
    levels = [torch.full((1, 1, 2, 2), float(i), device=device) for i in range(3)]
    pooled = roi_align_triton.pyramid_roi_align(levels, rois, rule, SCALES, (1, 1), 1, False)
    expected = levels_of(rois[:, 1:], *rule) - 2
    if INTERPRETED:  # log2 of a CPU rounds differently at the end of a vector
        edges = torch.tensor(thresholds(rule, rois.device))
        expected = (side[:, None] / size + 1e-8 >= edges).sum(dim=1)
    assert pooled.flatten().tolist() == expected.tolist()
    assert set(expected.tolist()) == {0, 1, 2}


def test_a_flag_is_set_by_boxes_that_are_not_finite():
    rois, _ = boxes_of(ROWS)
    flag = torch.zeros(1, dtype=torch.int32, pin_memory=device == "cuda")

    def pool():
        rule = LevelRule(2, 4, 224, 4)
        return roi_align_triton.pyramid_roi_align(maps(), rois, rule, SCALES, (2, 3), 1, True, flag)

    pool()
    if device == "cuda":
        torch.cuda.synchronize()
    assert flag.tolist() == [0]
    for value in (3e38, torch.inf, torch.nan):
        rois[2, 1:] = torch.tensor([-value, -value, value, value])
        assert pool()[2].isnan().all() == (value > 3.5e38 or value != value)
        if device == "cuda":
            torch.cuda.synchronize()
        assert flag.tolist() == [int(value != 3e38)]


def test_one_level_six_levels_and_int32():
    six = [maps()[0]] * 6
    rois, level_of = boxes_of(ROWS[:1] * 6)
    one = roi_align_triton.pyramid_roi_align(six[:1], rois, level_of, [1 / 4], (2, 3), 0, True)
    level_of = torch.arange(6, dtype=torch.int32, device=device)
    scaled = [level * (1 + i) for i, level in enumerate(six)]
    each = roi_align_triton.pyramid_roi_align(scaled, rois, level_of, [1 / 4] * 6, (2, 3), 0, True)
    torch.testing.assert_close(each, one * torch.arange(1, 7, device=device)[:, None, None, None])


def greedy(boxes, valid, threshold, groups=None):
    """Which boxes torchvision keeps, by its operator for CPUs."""
    boxes, valid, groups = boxes.cpu(), valid.cpu(), None if groups is None else groups.cpu()
    return nms_mask(boxes, valid, threshold, groups)[0]


def check_nms(boxes, valid, threshold, groups=None):
    expected = greedy(boxes, valid, threshold, groups)
    keep = nms_triton.nms_mask(boxes, valid, rounded_down(threshold), groups)
    assert torch.equal(keep.cpu(), expected)
    keep, exact = nms_fixpoint(boxes, valid, threshold, groups, rounds=boxes.shape[1] + 1)
    assert exact.all() and torch.equal(keep.cpu(), expected)


@settings(max_examples=EXAMPLES * 3, deadline=None)
@given(
    # Few places and sizes: many equal boxes, and overlaps of exactly 1/2 and 1/3.
    rows=st.lists(
        st.tuples(
            *[st.integers(0, 4)] * 2, *[st.integers(0, 3)] * 2, st.integers(0, 1), st.booleans()
        ),
        min_size=1,
        max_size=80,
    ),
    threshold=st.sampled_from([0.0, 0.3, 1 / 3, 0.5, 0.7, 1.0]),
    grouped=st.booleans(),
)
def test_nms_of_any_boxes(rows, threshold, grouped):
    table = torch.tensor(rows, device=device)
    boxes = torch.cat([table[:, :2], table[:, :2] + table[:, 2:4]], dim=1).float()[None]
    groups = table[None, :, 4] if grouped else None
    check_nms(boxes, table[None, :, 5] != 0, threshold, groups)


@pytest.mark.parametrize("length", [1, 64, 65, 200])
def test_nms_of_lists_of_any_length(length):
    generator = torch.Generator().manual_seed(length)
    corner, size = torch.rand(2, 3, length, 2, generator=generator) * 40
    boxes = torch.cat([corner, corner + size], dim=2).to(device)
    valid = (torch.rand(3, length, generator=generator) > 0.1).to(device)
    check_nms(boxes, valid, 0.4)
    check_nms(boxes, valid, 0.4, torch.randint(0, 4, (3, length), generator=generator).to(device))


def test_a_long_chain_of_suppression():
    """Each box overlaps the next alone: every other one stays, which no few rounds find."""
    left = torch.arange(150.0, device=device)[:, None] * 6
    zero = torch.zeros_like(left)
    boxes = torch.cat([left, zero, left + 10, zero + 10], dim=1)[None]
    valid = torch.ones(1, 150, dtype=torch.bool, device=device)
    check_nms(boxes, valid, 0.2)
    _, exact = nms_fixpoint(boxes, valid, 0.2)
    assert exact.tolist() == [False]


def test_no_boxes_at_all():
    boxes, valid = torch.zeros(2, 0, 4, device=device), torch.zeros(2, 0, device=device).bool()
    assert nms_triton.nms_mask(boxes, valid, 0.5, None).shape == (2, 0)


cuda_only = pytest.mark.skipif(INTERPRETED, reason="of CUDA alone")


@cuda_only
@pytest.mark.parametrize(
    ("dtype", "last"), [(torch.float32, True), (torch.float32, False), (torch.float16, True)]
)
def test_roi_align_at_full_size(dtype, last):
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(1000, 2, generator=generator) * torch.tensor([1000, 600])
    extent = torch.exp(torch.rand(1000, 2, generator=generator) * 4 + 1.5)
    image = torch.randint(0, 2, (1000, 1), generator=generator)
    rois = torch.cat([image, corner, corner + extent], dim=1).to(device)
    level_of = torch.randint(0, 3, (1000,), generator=generator).to(device)
    levels = maps(256, dtype, last, 2, 800, 1216)
    # A coordinate of 300 cells is rounded to 3e-5 of a cell, here and in torchvision.
    ours = check(levels, rois, level_of, (7, 7), atol=1e-4)
    if dtype == torch.float32:
        how = (level_of, SCALES, (7, 7), 0, True)
        single = [level.detach() for level in levels]
        theirs = pyramid_roi_align_by_level(single, rois, *how)
        exact = pyramid_roi_align_by_level([x.double() for x in single], rois.double(), *how)
        errors = [(each.double() - exact).abs().max() for each in (ours, theirs)]
        assert errors[0] <= 2 * errors[1]


@cuda_only
def test_nms_at_full_size():
    generator = torch.Generator().manual_seed(1)
    for lists, length in ((5, 2000), (1, 10_000)):
        corner = torch.rand(lists, length, 2, generator=generator) * 500
        size = torch.exp(torch.rand(lists, length, 2, generator=generator) * 3 + 2)
        boxes = torch.cat([corner, corner + size], dim=2).to(device)
        valid = torch.ones(lists, length, dtype=torch.bool, device=device)
        groups = torch.randint(0, 3, (lists, length), generator=generator).to(device)
        for of_box in (None, groups):
            keep, exact = nms_mask(boxes, valid, 0.7, of_box)
            assert exact.all() and torch.equal(keep.cpu(), greedy(boxes, valid, 0.7, of_box))


@cuda_only
def test_nothing_waits_for_the_device_and_all_stands_in_a_graph():
    levels = [level.detach() for level in maps(8)]
    rois, level_of = boxes_of(ROWS)
    boxes, scores = torch.rand(2, 50, 4, device=device) * 30, torch.rand(2, 50, device=device)
    boxes[:, :, 2:] += boxes[:, :, :2]
    scores = scores.sort(descending=True).values
    sizes = torch.tensor([[48, 64], [40, 50]], device=device)

    def run():
        pooled = roi_align_triton.pyramid_roi_align(levels, rois, level_of, SCALES, (7, 7), 0, True)
        return pooled, *select_proposals([boxes], [scores], sizes, 0.5, 20, 0.0)

    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for level in levels:
        level.mul_(2)
    boxes.add_(1)
    graph.replay()
    for again, now in zip(captured, run(), strict=True):
        torch.testing.assert_close(again, now, rtol=0, atol=0)


@cuda_only
@pytest.mark.parametrize("levels", [1, 3])
def test_the_pooler_waits_for_nothing_and_refuses_nan_afterwards(levels):
    pooler = PyramidROIPooler(7, SCALES[:levels], 0, "ROIAlignV2")
    features = [level.half() for level in maps(channels=8)[:levels]]
    rois, _ = boxes_of(ROWS)
    good = [Boxes(rois[:3, 1:]), Boxes(rois[3:, 1:])]
    bad = [Boxes(rois[:3, 1:] * torch.tensor([1.0, 1, 1, torch.nan], device=device)), good[1]]
    pooler(features, good)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        first = pooler(features, good)
        pooled = pooler(features, bad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    exact = pooler([f.cpu().float() for f in features], [Boxes(b.tensor.cpu()) for b in good])
    torch.testing.assert_close(first.cpu().float(), exact, rtol=1e-3, atol=1e-3)
    assert pooled[:3].isnan().all() and not pooled[3:].isnan().any()
    torch.cuda.synchronize()
    with pytest.raises(NonFiniteError, match="3 of 7 boxes"):
        pooler(features, good)


@cuda_only
def test_the_poolers_memory_is_not_above_stocks():
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(1000, 2, generator=generator) * 900
    boxes = Boxes(torch.cat([corner, corner + 150], dim=1).to(device))
    features = [level.detach() for level in maps(256, torch.float16, True, 1, 800, 1216)]
    peaks = []
    for kind in (PyramidROIPooler, ROIPooler):
        pooler = kind(7, SCALES, 0, "ROIAlignV2")
        pooler(features, [boxes])
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        pooler(features, [boxes])
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] <= peaks[1]

"""pyramid_roi_align against torchvision's operator, a map at a time."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import roi_align

from fpn_plugin.kernels import roi_align_cpu as module
from fpn_plugin.kernels.roi_align_cpu import pyramid_roi_align
from tests.helpers.feature_maps import feature_maps

SCALES = (1 / 4, 1 / 8, 1 / 16)


maps = partial(feature_maps, SCALES, height=96, width=128, last=False)


def expected(features, rois, levels, size, ratio, aligned):
    pooled = features[0].new_zeros(len(rois), features[0].shape[1], *size)
    for level, (feature, scale) in enumerate(zip(features, SCALES, strict=True)):
        here = levels == level
        pooled[here] = roi_align(feature, rois[here], size, scale, ratio, aligned)
    return pooled


def check(features, rois, levels, size=(7, 7), ratio=0, aligned=True):
    ours = pyramid_roi_align(features, rois, levels, SCALES, size, ratio, aligned)
    theirs = expected(features, rois, levels, size, ratio, aligned)
    assert ours.shape == theirs.shape and ours.is_contiguous()
    exact = rois.dtype == torch.float64
    tolerance = {"rtol": 1e-12, "atol": 1e-12} if exact else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(ours, theirs, **tolerance)
    weight = torch.linspace(-1, 1, ours.numel(), dtype=ours.dtype).view_as(ours)
    mine = torch.autograd.grad((ours * weight).sum(), features, allow_unused=False)
    other = torch.autograd.grad((theirs * weight).sum(), features, materialize_grads=True)
    for a, b, feature in zip(mine, other, features, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
        assert a.stride() == feature.stride()  # a gradient in another layout slows what follows


coordinate = st.floats(-80, 220, width=32)


@settings(max_examples=120, deadline=None)
@given(
    boxes=st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 2), *[coordinate] * 4), min_size=0, max_size=9
    ),
    size=st.sampled_from([(7, 7), (1, 1), (2, 3), (14, 14)]),
    ratio=st.integers(0, 3),
    aligned=st.booleans(),
    channels_last=st.booleans(),
)
def test_any_boxes_inside_across_outside_and_turned_around(
    boxes, size, ratio, aligned, channels_last
):
    table = torch.tensor(boxes, dtype=torch.float64).reshape(-1, 6)
    if ratio == 0:  # torchvision's operator fails on boxes turned around
        table[:, 4:] = torch.maximum(table[:, 2:4], table[:, 4:])
    rois, levels = table[:, [0, 2, 3, 4, 5]], table[:, 1].long()
    check(maps(dtype=torch.float64, last=channels_last), rois, levels, size, ratio, aligned)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("ratio", [0, 2])
def test_many_boxes_in_float32(ratio, channels_last):
    generator = torch.Generator().manual_seed(1)
    corner = torch.rand(300, 2, generator=generator) * 160 - 30
    extent = torch.exp(torch.rand(300, 2, generator=generator) * 5)
    image = torch.randint(0, 2, (300, 1), generator=generator)
    rois = torch.cat([image, corner, corner + extent], dim=1)
    levels = torch.randint(0, 3, (300,), generator=generator)
    check(maps(last=channels_last), rois, levels, ratio=ratio)


@pytest.mark.parametrize("edge", [-1.0, -0.5, 0.0, 7.5, 8.0, 9.0])
def test_samples_at_the_borders_of_the_map(edge):
    """Samples count within one cell beyond the first cell's centre, and up to the map's extent."""
    features = [torch.arange(1.0, 65).view(1, 1, 8, 8).double().requires_grad_()] * 3
    at = (edge + 0.5) * 4
    rois = torch.tensor([[0, at, at, at, at], [0, at - 4, at - 4, at + 4, at + 4]]).double()
    ours = pyramid_roi_align(features, rois, torch.tensor([0, 0]), SCALES, (2, 2), 1, True)
    theirs = roi_align(features[0], rois, (2, 2), 1 / 4, 1, True)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_one_value_by_hand():
    features = torch.arange(16.0).view(1, 1, 4, 4)
    # At stride 1 and without the half pixel, one sample at (x, y) = (1.5, 2.25).
    rois = torch.tensor([[0.0, 1.0, 1.75, 2.0, 2.75]])
    pooled = pyramid_roi_align([features], rois, torch.tensor([0]), [1.0], (1, 1), 1, False)
    assert pooled.item() == pytest.approx(4 * 2.25 + 1.5)


def test_gradcheck():
    small = maps(1, torch.float64, images=1, height=32, width=32)
    features = [m.detach().requires_grad_() for m in small]
    rois = torch.tensor([[0, 1, 2, 18, 21], [0, 0, 0, 150, 130], [0, 9, 3, 14, 30]]).double()
    levels = torch.tensor([0, 2, 1])
    for ratio in (0, 2):
        assert torch.autograd.gradcheck(
            lambda *m, r=ratio: pyramid_roi_align(m, rois, levels, SCALES, (2, 3), r, True),
            features,
        )


def test_memory_is_bounded_and_pieces_add_up(monkeypatch):
    rois = torch.tensor([[0, 0, 0, 120.0, 90]] * 40 + [[1, 5, 5, 60.0, 80]] * 40).double()
    levels = torch.zeros(80, dtype=torch.int64)
    whole = 80 * 49 * 6 * 5
    monkeypatch.setattr(module, "_MOST_TERMS", 20_000)
    held = []
    original = module.F.embedding_bag

    def recorded(cells, *args, **kwargs):
        held.append(cells.numel())
        return original(cells, *args, **kwargs)

    monkeypatch.setattr(module.F, "embedding_bag", recorded)
    check(maps(dtype=torch.float64), rois, levels)
    # A call's terms, and in the backward pass one more piece.
    assert max(held) <= 2 * 20_000 and sum(held) >= whole


@pytest.mark.parametrize("channels_last", [False, True])
def test_channels_are_pooled_in_parts_of_16_where_maps_are_large(monkeypatch, channels_last):
    monkeypatch.setattr(module, "_MOST_VALUES", 16 * 2 * 24 * 32)
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(60, 2, generator=generator, dtype=torch.float64) * 90
    sizes = torch.rand(60, 2, generator=generator, dtype=torch.float64) ** 2 * 120
    image = torch.arange(60, dtype=torch.float64)[:, None] % 2
    rois = torch.cat([image, corners, corners + sizes], dim=1)
    features = maps(channels=37, dtype=torch.float64, last=channels_last)
    assert [len(module._parts(level.shape)) for level in features] == [3, 1, 1]
    check(features, rois, torch.arange(60) % 3)


def test_boxes_outside_every_map_pool_zeros_and_give_zero_gradients():
    features = maps()
    rois = torch.tensor([[0, 900.0, 900, 990, 950], [1, 500, 20, 590, 60]])
    assert (pyramid_roi_align(features, rois, torch.tensor([0, 2]), SCALES, (7, 7)) == 0).all()
    check(features, rois, torch.tensor([0, 2]))


def test_it_is_repeatable():
    rois = torch.tensor([[0, 3.0, 3, 100, 90], [1, 10, 10, 60, 60], [0, 0, 0, 9, 9]] * 50)
    levels = torch.tensor([2, 1, 0] * 50)
    first, again = (
        torch.autograd.grad(pyramid_roi_align(m, rois, levels, SCALES, (7, 7)).sum(), m)
        for m in (maps(), maps())
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

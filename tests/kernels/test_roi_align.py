"""pyramid_roi_align on a CPU, and level after level, against torchvision's operator."""

import math
from functools import partial

import pytest
import torch
from torchvision.ops import roi_align

from fpn_plugin.kernels import pays, pyramid_roi_align, pyramid_roi_align_by_level
from tests.helpers.feature_maps import feature_maps

SCALES = (1 / 4, 1 / 8)
ROIS = torch.tensor([[0.0, 3, 5, 21, 17], [1, 0, 9, 60, 47], [0, 12, 12, 40, 30]])
LEVEL_OF = torch.tensor([0, 1, 0], dtype=torch.int32)


maps = partial(feature_maps, SCALES)


def expected(levels, rois):
    return torch.cat(
        [
            roi_align(levels[k].float(), roi[None], (2, 3), SCALES[k], 0, True)
            for roi, k in zip(rois, LEVEL_OF.tolist(), strict=True)
        ]
    )


@pytest.mark.parametrize("align", [pyramid_roi_align, pyramid_roi_align_by_level])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
def test_values_in_every_dtype_and_layout(align, dtype, last):
    levels = maps(dtype=dtype, last=last)
    pooled = align(levels, ROIS, LEVEL_OF, SCALES, (2, 3))
    assert pooled.dtype == dtype
    exact = expected(levels, ROIS)
    step = torch.finfo(dtype).eps
    torch.testing.assert_close(pooled.float(), exact, rtol=step, atol=max(step, 1e-5))
    mine = torch.autograd.grad(pooled.float().square().sum(), levels)
    theirs = torch.autograd.grad(exact.to(dtype).float().square().sum(), levels)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=2 * step, atol=max(step, 1e-5))


@pytest.mark.parametrize("align", [pyramid_roi_align, pyramid_roi_align_by_level])
def test_a_box_that_is_not_finite_gives_nan_and_no_other_box_does(align):
    for value in (math.nan, math.inf, -math.inf):
        rois = ROIS.clone()
        rois[1, 3] = value
        pooled = align(maps(), rois, LEVEL_OF, SCALES, (2, 3))
        assert pooled[1].isnan().all()
        torch.testing.assert_close(pooled[[0, 2]], expected(maps(), ROIS)[[0, 2]])


def test_a_box_turned_around_has_no_samples():
    rois = torch.tensor([[0.0, 21, 5, 3, 17], [0, 21, 17, 3, 5], [0, 3, 5, 21, 17]])
    for last in (False, True):
        pooled = pyramid_roi_align(maps(last=last), rois, LEVEL_OF * 0, SCALES, (2, 3))
        assert (pooled[:2] == 0).all() and (pooled[2] != 0).all()


def test_no_boxes_give_zero_gradients():
    for last in (False, True):
        levels = maps(last=last)
        pooled = pyramid_roi_align(levels, ROIS[:0], LEVEL_OF[:0], SCALES, (2, 3))
        assert pooled.shape == (0, 3, 2, 3)
        assert all((grad == 0).all() for grad in torch.autograd.grad(pooled.sum(), levels))


@pytest.mark.parametrize("ratio", [0, 2])
def test_gradcheck_level_after_level(ratio):
    levels = [level.detach()[:1, :1].double().requires_grad_() for level in maps()]
    rois, level_of = ROIS[[0, 2]].double(), torch.tensor([0, 1])
    assert torch.autograd.gradcheck(
        lambda *m: pyramid_roi_align_by_level(m, rois, level_of, SCALES, (2, 2), ratio), levels
    )


def test_few_boxes_on_maps_in_the_usual_layout_are_left_to_torchvision():
    large = [torch.zeros(1, 2, 200, 300), torch.zeros(1, 2, 100, 150)]
    assert not pays(large, 20) and pays(large, 300)
    assert pays([level.to(memory_format=torch.channels_last) for level in maps()], 1)

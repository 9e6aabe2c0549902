"""Eq. (1) against hand-computed values, exact arithmetic and Detectron2's own assignment."""

from fractions import Fraction

import pytest
import torch
from detectron2.modeling.poolers import assign_boxes_to_levels
from detectron2.structures import Boxes, RotatedBoxes
from hypothesis import given
from hypothesis import strategies as st

from fpn_plugin import UserError, assign_levels

PYRAMIDS = [(2, 5), (3, 7), (2, 4)]


def squares(*sizes: float) -> torch.Tensor:
    return torch.tensor([[0.0, 0.0, size, size] for size in sizes])


def test_the_papers_example():
    # Section 4.2: 224 px maps to k0 = 4, half of it to 3.
    assert assign_levels(squares(56, 111.9, 112, 223.9, 224, 447.9, 448), 2, 5).tolist() == [
        2, 2, 3, 3, 4, 4, 5,
    ]  # fmt: skip


@pytest.mark.parametrize("k0", [3, 4, 5])
@pytest.mark.parametrize(("low", "high"), PYRAMIDS)
def test_exact_at_boundaries(k0, low, high):
    for k in range(0, 10):
        boundary = 224.0 * 2.0 ** (k - k0)
        below = boundary * (1 - 1e-6)
        levels = assign_levels(squares(boundary, below), low, high, 224, k0).tolist()
        assert levels == [min(max(k, low), high), min(max(k - 1, low), high)]


def exact_level(width: int, height: int, low: int, high: int, s0: int, k0: int) -> int:
    """The greatest k with w h >= s0^2 4^(k - k0), in rational arithmetic, clamped."""
    k = low
    while k < high and width * height >= s0**2 * Fraction(4) ** (k + 1 - k0):
        k += 1
    return k


@given(
    side=st.tuples(st.integers(1, 1000), st.integers(1, 1000)),
    corner=st.tuples(st.integers(-500, 4000), st.integers(-500, 4000)),
    s0=st.sampled_from([56, 112, 160, 224, 300]),
    k0=st.integers(2, 6),
    pyramid=st.sampled_from(PYRAMIDS),
)
def test_agrees_with_exact_arithmetic(side, corner, s0, k0, pyramid):
    (width, height), (x, y) = side, corner
    box = torch.tensor([[x, y, x + width, y + height]], dtype=torch.float32)
    assert assign_levels(box, *pyramid, s0, k0).item() == exact_level(
        width, height, *pyramid, s0, k0
    )


@pytest.mark.parametrize("k0", [3, 4, 5])
@pytest.mark.parametrize(("low", "high"), PYRAMIDS)
def test_agrees_with_detectron2_on_a_million_boxes(k0, low, high):
    corner = torch.rand(1_000_000, 2) * 1000
    size = torch.exp(torch.rand(1_000_000, 2) * 8.5)  # 1 to 4900 px
    boxes = torch.cat([corner, corner + size], dim=1)
    theirs = assign_boxes_to_levels([Boxes(boxes)], low, high, 224, k0) + low
    ours = assign_levels(boxes, low, high, 224, k0)
    assert ours.dtype == torch.int64
    assert ours.unique().tolist() == list(range(low, high + 1))
    assert (ours != theirs).sum() == 0


def test_zero_and_negative_extent_go_to_the_finest_level():
    boxes = torch.tensor(
        [
            [5.0, 5, 5, 5],
            [0, 0, 0, 900],
            [900, 900, 0, 0],  # both sides negative: their product is not an area
            [0, 0, -900, 900],
            [-3e38, 0, 3e38, 0],  # a side that overflows float32, times nothing
        ]
    )
    assert assign_levels(boxes, 2, 5).tolist() == [2] * 5


def test_huge_boxes_go_to_the_coarsest_level():
    assert assign_levels(squares(1e9, 1e20, 3e38), 2, 5).tolist() == [5] * 3
    assert assign_levels(torch.tensor([[-3e38, -3e38, 3e38, 3e38]]), 2, 5).tolist() == [5]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_coordinates_without_a_level_are_an_error(bad):
    boxes = squares(*range(10, 20))
    boxes[3, 2] = boxes[7, 0] = bad
    with pytest.raises(UserError, match=r"2 of 10 boxes have NaN or infinite .* is box 3"):
        assign_levels(boxes, 2, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype):
    # 300 x 300 overflows float16; 448 x 112 = 224^2 is a boundary that bfloat16 would round.
    boxes = torch.tensor([[0, 0, 300, 300], [0, 0, 448, 112], [0, 0, 111, 111]], dtype=dtype)
    assert assign_levels(boxes, 2, 5).tolist() == [4, 4, 2]


def test_boxes_of_several_images_are_taken_in_order():
    assert assign_levels(Boxes(squares(30, 500)), 2, 5).tolist() == [2, 5]
    lists = [Boxes(squares(30)), Boxes(torch.zeros(0, 4)), Boxes(squares(500, 112))]
    assert assign_levels(lists, 2, 5).tolist() == [2, 5, 3]
    assert assign_levels([], 2, 5).tolist() == []
    assert assign_levels(torch.zeros(0, 4), 2, 5).dtype == torch.int64


def test_rotated_boxes_are_sized_by_their_sides():
    rotated = [RotatedBoxes(torch.tensor([[500.0, 500, 224, 224, 45], [9, 9, 50, 50, 10]]))]
    assert assign_levels(rotated, 2, 5).tolist() == [4, 2]

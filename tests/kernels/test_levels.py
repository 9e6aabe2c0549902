"""Thresholds of Eq. (1) against its formula."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fpn_plugin.kernels.levels import LevelRule, levels_of, thresholds


@settings(max_examples=100, deadline=None)
@given(
    finest=st.integers(0, 4),
    count=st.integers(1, 6),
    k0=st.integers(-3, 40),
    step=st.integers(-300, 3),
)
def test_thresholds_are_where_the_formula_changes(finest, count, k0, step):
    rule = LevelRule(finest, finest + count - 1, 1.0, k0)
    edges = thresholds(rule, torch.device("cpu"))
    assert edges == sorted(edges) and len(edges) == count - 1
    for level in range(finest, finest + count + 1):
        power = torch.tensor(2.0 ** (level - k0))
        x = (power.view(torch.int32) + step).view(torch.float32)
        # In a vector: log2 of a CPU rounds differently at its end.
        formula = (k0 + torch.log2(x.repeat(256))).floor()[0].clamp(rule.min_level, rule.max_level)
        assert finest + sum(x.item() >= edge for edge in edges) == formula


def test_levels_of_sizes_at_the_papers_boundaries():
    side = torch.tensor([0.0, 111, 112, 223, 224, 447, 448, 1e30])
    boxes = torch.stack([torch.zeros(8), torch.zeros(8), side, side], dim=1)
    assert levels_of(boxes, 2, 5, 224, 4).tolist() == [2, 2, 3, 3, 4, 4, 5, 5]

"""Boxes with NaN or infinite coordinates are refused or give NaN, never values of some level."""

import warnings

import pytest
import torch
from detectron2.structures import Boxes

from fpn_plugin import PyramidROIPooler
from fpn_plugin.errors import NonFiniteError

NAN, INF = float("nan"), float("inf")
BAD = [(NAN, 0, 50, 50), (0, 0, INF, 50), (0, -INF, 50, 50), (NAN, NAN, NAN, NAN), (INF,) * 4]
GOOD = (4.0, 4, 60, 60)


def pyramid(levels: int, memory_format=torch.contiguous_format) -> list[torch.Tensor]:
    return [
        torch.rand(2, 8, 64 >> i, 64 >> i).to(memory_format=memory_format) for i in range(levels)
    ]


@pytest.mark.parametrize("box", BAD)
@pytest.mark.parametrize("levels", [1, 4])
@pytest.mark.parametrize("kind", ["ROIAlign", "ROIAlignV2", "ROIPool"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_each_path_refuses_them(box, levels, kind, layout):
    pooler = PyramidROIPooler(7, [1 / (4 << i) for i in range(levels)], 0, kind)
    boxes = [Boxes(torch.tensor([GOOD])), Boxes(torch.tensor([GOOD, box]))]
    with pytest.raises(NonFiniteError, match=r"1 of 3 boxes .* the first is box 2"):
        pooler(pyramid(levels, layout), boxes)


@pytest.mark.parametrize("levels", [1, 4])
def test_a_trace_gives_nan_for_them_and_values_for_others(levels):
    pooler = PyramidROIPooler(7, [1 / (4 << i) for i in range(levels)], 0, "ROIAlignV2")
    features = pyramid(levels)

    def pool(boxes: torch.Tensor, *maps: torch.Tensor) -> torch.Tensor:
        return pooler(list(maps), [Boxes(boxes), Boxes(boxes[:0])])

    good = torch.tensor([GOOD, (0.0, 0, 200, 200)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(pool, (good, *features), check_trace=False)
    boxes = torch.tensor([GOOD, *BAD, (0.0, 0, 200, 200)])
    pooled = traced(boxes, *features)
    torch.testing.assert_close(pooled[[0, -1]], pool(good, *features))
    assert pooled[1:-1].isnan().all()

"""Boxes with NaN or infinite coordinates are refused or give NaN, never values of some level."""

import warnings

import pytest
import torch
from detectron2.structures import Boxes

from fpn_plugin import PyramidROIPooler
from fpn_plugin.errors import NonFiniteError
from fpn_plugin.modeling import levels
from fpn_plugin.modeling.levels import check_finite

NAN, INF = float("nan"), float("inf")
BAD = [(NAN, 0, 50, 50), (0, 0, INF, 50), (0, -INF, 50, 50), (NAN, NAN, NAN, NAN), (INF,) * 4]
GOOD = (4.0, 4, 60, 60)


def pyramid(count: int, memory_format=torch.contiguous_format) -> list[torch.Tensor]:
    return [
        torch.rand(2, 8, 64 >> i, 64 >> i).to(memory_format=memory_format) for i in range(count)
    ]


@pytest.mark.parametrize("box", BAD)
@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("kind", ["ROIAlign", "ROIAlignV2", "ROIPool"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_each_path_refuses_them(box, count, kind, layout):
    pooler = PyramidROIPooler(7, [1 / (4 << i) for i in range(count)], 0, kind)
    boxes = [Boxes(torch.tensor([GOOD])), Boxes(torch.tensor([GOOD, box]))]
    with pytest.raises(NonFiniteError, match=r"1 of 3 boxes .* the first is box 2"):
        pooler(pyramid(count, layout), boxes)


@pytest.mark.parametrize("count", [1, 4])
def test_a_trace_gives_nan_for_them_and_values_for_others(count):
    pooler = PyramidROIPooler(7, [1 / (4 << i) for i in range(count)], 0, "ROIAlignV2")
    features = pyramid(count)

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


class _OnGPU:
    """In place of boxes on a GPU, whose kernel runs when it is told to."""

    is_cuda = True

    def __init__(self, *boxes):
        self.boxes = torch.tensor(boxes)

    def detach(self):
        return self


@pytest.fixture
def pooled(monkeypatch):
    pooled = levels._Pooled()
    pooled.flag = torch.zeros(1, dtype=torch.int32)  # pinned only where there is a GPU
    monkeypatch.setattr(levels, "_pooled", pooled)
    monkeypatch.setattr(levels.torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(levels, "check_finite", lambda given: check_finite(given.boxes))
    return pooled


@pytest.mark.parametrize("box", BAD)
def test_on_a_gpu_they_are_refused_once_known(pooled, box):
    assert levels.non_finite_flag(_OnGPU(GOOD)) is pooled.flag
    levels.non_finite_flag(_OnGPU(GOOD, box))
    levels.raise_non_finite()  # its kernel has not run
    pooled.flag.fill_(1)
    with pytest.raises(NonFiniteError, match=r"1 of 2 boxes .* the first is box 1"):
        levels.non_finite_flag(_OnGPU(GOOD))
    levels.non_finite_flag(_OnGPU(GOOD))  # is reported once


def test_boxes_of_long_ago_are_refused_too(pooled):
    for _ in range(100):
        levels.non_finite_flag(_OnGPU(GOOD))
    pooled.flag.fill_(1)
    with pytest.raises(NonFiniteError, match="pooled earlier"):
        levels.raise_non_finite()


def test_a_captured_graph_has_no_check(pooled, monkeypatch):
    monkeypatch.setattr(levels.torch.cuda, "is_current_stream_capturing", lambda: True)
    assert levels.non_finite_flag(_OnGPU(GOOD)) is None and not pooled.boxes

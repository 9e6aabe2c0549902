"""Suppression of many lists at once against torchvision's and Detectron2's, on the CPU."""

import math
from types import SimpleNamespace

import pytest
import torch
from detectron2.modeling.proposal_generator.proposal_utils import find_top_rpn_proposals
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import ops

from fpn_plugin.kernels import fallback, nms_fixpoint, nms_mask, select_proposals
from fpn_plugin.kernels.nms import rounded_down

box = st.tuples(*[st.integers(0, 5)] * 2, *[st.integers(0, 3)] * 2).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)


@settings(max_examples=80, deadline=None)
@given(
    rows=st.lists(st.tuples(box, st.integers(0, 2), st.booleans()), min_size=1, max_size=30),
    threshold=st.sampled_from([0.0, 0.3, 1 / 3, 0.5, 0.7]),
)
def test_it_is_torchvisions_nms_of_each_group(rows, threshold):
    boxes = torch.tensor([row[0] for row in rows]).float()[None]
    groups = torch.tensor([[row[1] for row in rows]])
    valid = torch.tensor([[row[2] for row in rows]])
    scores = -torch.arange(len(rows), dtype=torch.float32)
    expected = set()
    for group in range(3):
        members = (valid[0] & (groups[0] == group)).nonzero()[:, 0]
        expected |= set(members[ops.nms(boxes[0, members], scores[members], threshold)].tolist())
    for keep, exact in (
        nms_mask(boxes, valid, threshold, groups),
        nms_fixpoint(boxes, valid, threshold, groups, rounds=len(rows) + 1),
    ):
        assert exact.tolist() == [True]
        assert set(keep[0].nonzero()[:, 0].tolist()) == expected


def test_lists_do_not_touch_each_other():
    boxes = torch.tensor([[[0.0, 0, 9, 9], [0, 0, 9, 8]], [[0, 0, 9, 9], [20, 0, 29, 9]]])
    for nms in (nms_mask, nms_fixpoint):
        keep, _ = nms(boxes, torch.ones(2, 2, dtype=torch.bool), 0.5)
        assert keep.tolist() == [[True, False], [True, True]]


def test_a_few_rounds_of_a_long_chain_are_not_called_exact():
    left = torch.arange(9.0)[:, None] * 6
    boxes = torch.cat([left, left * 0, left + 10, left * 0 + 10], dim=1)[None]
    valid = torch.ones(1, 9, dtype=torch.bool)
    assert nms_fixpoint(boxes, valid, 0.2, rounds=4)[1].tolist() == [False]
    keep, exact = nms_fixpoint(boxes, valid, 0.2, rounds=10)
    assert exact.all() and keep[0].tolist() == [i % 2 == 0 for i in range(9)]


@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3, 0.5, 0.7, 1 / 3, 1.0])
def test_a_threshold_rounded_down_parts_float32_as_it_does_itself(threshold):
    low = rounded_down(threshold)
    near = torch.tensor([low] * 3).nextafter(torch.tensor([-1.0, low, 2.0]))
    assert [v > threshold for v in near.double().tolist()] == (near > low).tolist()


def levels_of_proposals(images, sizes, ties, generator):
    boxes, scores = [], []
    for size in sizes:
        corner, extent = torch.rand(2, images, size, 2, generator=generator) * 90 - 5
        boxes.append(torch.cat([corner, corner + extent.clamp(min=-2)], dim=2))
        score = torch.rand(images, size, generator=generator)
        scores.append((score * 5).round() / 5 if ties else score)
    return boxes, scores


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize(("before", "after"), [(2000, 1000), (40, 25), (40, 1000)])
@pytest.mark.parametrize("min_size", [0.0, 30.0])
def test_proposals_are_detectron2s(ties, before, after, min_size):
    generator = torch.Generator().manual_seed(before + after)
    boxes, scores = levels_of_proposals(3, (60, 50, 7), ties, generator)
    boxes[1][1, 3, 2], scores[0][2, 4] = math.nan, -math.inf
    image_sizes = [(64, 80), (70, 75), (90, 90)]
    theirs = find_top_rpn_proposals(
        boxes, scores, image_sizes, 0.6, before, after, min_size, training=False
    )
    best = [score.topk(min(before, score.shape[1]), dim=1) for score in scores]
    ours = select_proposals(
        [
            b.gather(1, t.indices[:, :, None].expand(-1, -1, 4))
            for b, t in zip(boxes, best, strict=True)
        ],
        [t.values for t in best],
        torch.tensor(image_sizes),
        0.6,
        after,
        min_size,
    )
    assert ours.exact.all() and ours.counts.tolist() == [len(of_image) for of_image in theirs]
    assert ours.finite[0] and bool(ours.finite[2]) == (before < 60)
    for i, of_image in enumerate(theirs):
        count = len(of_image)
        assert torch.equal(ours.boxes[i, :count], of_image.proposal_boxes.tensor)
        assert torch.equal(ours.scores[i, :count], of_image.objectness_logits)
        assert (ours.scores[i, count:] == -math.inf).all()


@pytest.fixture
def gpu(monkeypatch):
    """Stands for a tensor on a GPU where Triton has not been tried yet."""
    monkeypatch.setattr(fallback, "_failed", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: pytest.MonkeyPatch().context())
    return SimpleNamespace(is_cuda=True, device="cuda:0")


def broken():
    raise ImportError("No module named 'triton'")


def test_without_triton_the_plain_way_is_taken_and_said_once(gpu, recwarn):
    assert fallback.triton_or_plain(gpu, lambda: "fast", lambda: "plain") == "fast"
    for _ in range(2):
        assert fallback.triton_or_plain(gpu, broken, lambda: "plain") == "plain"
    assert fallback.triton_or_plain(gpu, lambda: "fast", lambda: "plain") == "plain"
    told = [str(warning.message) for warning in recwarn]
    assert len(told) == 1 and "\n" not in told[0]
    assert "No module named 'triton'" in told[0] and "cuda:0" in told[0]


def test_a_gpu_too_old_is_said_by_name(gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    with pytest.warns(UserWarning, match="Old GPU is too old"):
        assert fallback.triton_or_plain(gpu, lambda: "fast", lambda: "plain") == "plain"


def test_too_little_memory_is_no_failure_of_triton(gpu):
    def full():
        raise torch.cuda.OutOfMemoryError("out of memory")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        fallback.triton_or_plain(gpu, full, lambda: "plain")
    assert fallback.triton_or_plain(gpu, lambda: "fast", lambda: "plain") == "fast"

"""The block of memory that an optimised pyramid keeps never shows in what it gives."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from fpn_plugin import optimize_for_inference
from fpn_plugin.deploy import fused

SIZES = [(1, 64, 96), (1, 96, 64), (2, 64, 64), (1, 32, 32), (1, 128, 96), (1, 64, 96)]


@pytest.fixture
def backbones(trained, monkeypatch):
    """A pyramid, and its optimised copy, to which every map is a large one."""
    monkeypatch.setattr(fused, "_LARGE", 0)
    model = trained("faster")
    return model.backbone, optimize_for_inference(model).backbone


def inputs():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, 3, h, w, generator=generator) for n, h, w in SIZES]


@torch.no_grad()
def test_levels_are_the_originals_whatever_was_computed_before(backbones):
    original, fast = backbones
    kept = []
    results = []
    for x in inputs():
        results.append(fast(x))
        (block,) = fast._kept
        kept.append(block.data_ptr())
        assert all(block.data_ptr() != level.data_ptr() for level in results[-1].values())
    # It is taken again where it is large enough; the largest is the last but one.
    assert kept[0] == kept[1]
    assert kept[2:4] == [kept[2]] * 2
    assert kept[4:] == [kept[4]] * 2
    # Compared when all are computed: none was overwritten by a later one.
    for x, result in zip(inputs(), results, strict=True):
        expected = original(x)
        assert result.keys() == expected.keys()
        for name, level in expected.items():
            torch.testing.assert_close(result[name], level, rtol=1e-4, atol=1e-4)


def test_threads_do_not_share_it(backbones):
    _, fast = backbones
    images = inputs() * 8
    with torch.no_grad():
        expected = [fast(x)["p2"] for x in images]

    def run(x):
        with torch.no_grad():
            return fast(x)["p2"]

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, images))
    for result, alone in zip(results, expected, strict=True):
        assert torch.equal(result, alone)
    assert 1 <= len(fast._kept) <= 4


def test_it_serves_in_and_out_of_inference_mode(backbones):
    _, fast = backbones
    x = inputs()[0]
    with torch.inference_mode():
        first = fast(x)["p2"]
    with torch.no_grad():
        second = fast(x)["p2"]
    with torch.inference_mode():
        third = fast(x)["p2"]
    assert torch.equal(first, second) and torch.equal(second, third)


@torch.no_grad()
def test_copies_have_none_of_it(backbones):
    _, fast = backbones
    fast(inputs()[0])
    assert copy.deepcopy(fast)._kept == []
    assert len(fast._kept) == 1


@torch.no_grad()
def test_small_maps_and_maps_that_are_given_away_are_not_kept(backbones, monkeypatch):
    _, fast = backbones
    del fast.fpn_output2  # P2 is then the sum itself
    first = fast(inputs()[0])["p2"].clone()
    assert fast._kept == []
    monkeypatch.undo()
    assert torch.equal(fast(inputs()[0])["p2"], first)

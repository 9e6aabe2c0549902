"""A training step on CUDA as ``fpn-plugin train`` takes it, against stock Detectron2's."""

import warnings

import pytest
import torch
from detectron2.utils.events import EventStorage

from evidence.benchmark.models import photograph, plugin_model, stock_model, training_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here"),
]
# All anchors and proposals are sampled: a rounding error changes no other box's turn.
EVERY = {
    "MODEL__RPN__BATCH_SIZE_PER_IMAGE": 8192,
    "MODEL__RPN__PRE_NMS_TOPK_TRAIN": 8192,
    "MODEL__RPN__POST_NMS_TOPK_TRAIN": 8192,
    "MODEL__RPN__NMS_THRESH": 1.0,
    "MODEL__RPN__POSITIVE_FRACTION": 1.0,
    "MODEL__ROI_HEADS__BATCH_SIZE_PER_IMAGE": 8192,
    "MODEL__ROI_HEADS__POSITIVE_FRACTION": 1.0,
}


@pytest.fixture(scope="module")
def image():
    pytest.importorskip("sklearn", reason="has the photograph")
    return photograph(None, 128, 160)


def step(model, batch, dtype=None):
    torch.manual_seed(1)
    model.train().zero_grad()
    with EventStorage(0), torch.autocast("cuda", dtype=dtype, enabled=dtype is not None):
        losses = model(batch)
        sum(losses.values()).backward()
    return losses


def test_losses_are_stocks_and_half_precision_is_near(image, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    stock = stock_model("cuda", image, **EVERY)
    ours = plugin_model(stock, "cuda", **EVERY)
    batch = training_batch(image, 2)
    expected, losses = step(stock, batch), step(ours, batch)
    for name, loss in expected.items():
        assert loss > 0.01
        torch.testing.assert_close(losses[name], loss, rtol=1e-5, atol=1e-5)
    for (name, mine), theirs in zip(ours.named_parameters(), stock.parameters(), strict=True):
        if theirs.requires_grad:
            # What is next to 0 or to a threshold may be on the other side of it.
            assert (mine.grad - theirs.grad).norm() < 0.05 * theirs.grad.norm(), name
    for dtype in (torch.float16, torch.bfloat16):
        for name, loss in step(ours, batch, dtype).items():
            torch.testing.assert_close(loss.float(), losses[name], rtol=0.05, atol=0.02)


def waits(model, batch):
    step(model, batch)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(model, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(one.message) for one in caught)


def test_the_device_is_waited_for_as_often_however_large_the_batch(image):
    stock = stock_model("cuda", image)
    ours = plugin_model(stock, "cuda")
    few, many = (waits(ours, training_batch(image, count)) for count in (2, 4))
    # Samples of anchors, proposals, samples of proposals, statistics.
    assert few == many == 4, f"{few}, {many}; stock {waits(stock, training_batch(image, 2))}"

"""PyramidROIPooler against Detectron2's ROIPooler, and what that one cannot do."""

import pytest
import torch
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.ops import MultiScaleRoIAlign

from fpn_plugin import PyramidROIPooler, UserError
from fpn_plugin.kernels import pyramid_roi_align_by_level
from fpn_plugin.modeling import pooler as pooler_module

SCALES = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
TYPES = ["ROIAlign", "ROIAlignV2", "ROIPool"]
IMAGE = 256


def features(images: int = 2, channels: int = 3, dtype=torch.float32) -> list[torch.Tensor]:
    return [
        torch.randn(images, channels, int(IMAGE * s), int(IMAGE * s), dtype=dtype) for s in SCALES
    ]


def boxes(count: int, spread: float = 1.0) -> Boxes:
    """Random boxes of 2 to 1000 px: inside, across and, with a larger spread, outside the image."""
    center = (torch.rand(count, 2) - 0.5) * spread * IMAGE + IMAGE / 2
    size = torch.exp(torch.rand(count, 2) * 6.2) * 2
    return Boxes(torch.cat([center - size / 2, center + size / 2], dim=1))


def assert_pooled_alike(ours, theirs, pooler_type):
    """On a CPU sums of RoIAlign have another order; RoIPool picks values, the same ones."""
    tolerance = 0 if pooler_type == "ROIPool" else 2e-6
    torch.testing.assert_close(ours, theirs, rtol=0, atol=tolerance)


def pool_with_gradients(pooler, maps, box_lists):
    maps = [m.clone().requires_grad_() for m in maps]
    pooled = pooler(maps, box_lists)
    weight = torch.linspace(-1, 1, pooled.numel()).reshape(pooled.shape)
    (pooled * weight.to(pooled)).sum().backward()
    return pooled.detach(), [m.grad for m in maps]


@pytest.mark.parametrize("pooler_type", TYPES)
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("spread", [0.5, 1.0, 3.0])
def test_values_and_gradients_are_detectron2s(pooler_type, sampling_ratio, spread):
    args = (7, SCALES, sampling_ratio, pooler_type)
    maps, box_lists = features(), [boxes(60, spread), boxes(45, spread)]
    ours, our_grads = pool_with_gradients(PyramidROIPooler(*args), maps, box_lists)
    theirs, their_grads = pool_with_gradients(ROIPooler(*args), maps, box_lists)
    assert_pooled_alike(ours, theirs, pooler_type)
    for mine, other in zip(our_grads, their_grads, strict=True):
        assert other.abs().sum() > 0
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    corners=st.lists(st.tuples(*[st.floats(-300, 600, width=32)] * 4), min_size=0, max_size=8),
    split=st.integers(0, 8),
    pooler_type=st.sampled_from(TYPES),
    canonical=st.tuples(st.sampled_from([56, 112, 224]), st.integers(3, 5)),
)
def test_any_boxes_pool_as_in_detectron2(corners, split, pooler_type, canonical):
    maps = features(channels=2)
    # Negative extent is where Detectron2 reads no level at all; it has a test of its own.
    tensor = torch.tensor(corners, dtype=torch.float32).reshape(-1, 4)
    tensor = torch.cat([tensor[:, :2], tensor[:, :2] + (tensor[:, 2:]).abs()], dim=1)
    box_lists = [Boxes(tensor[:split]), Boxes(tensor[split:])]
    args = (5, SCALES, 0, pooler_type, *canonical)
    ours, theirs = (kind(*args)(maps, box_lists) for kind in (PyramidROIPooler, ROIPooler))
    assert_pooled_alike(ours, theirs, pooler_type)


def test_torchvisions_pooler_agrees():
    maps, box_lists = features(), [boxes(50), boxes(50)]
    torchvisions = MultiScaleRoIAlign(["0", "1", "2", "3"], 7, 2)
    named, tensors = dict(zip("0123", maps, strict=True)), [b.tensor for b in box_lists]
    theirs = torchvisions(named, tensors, [(IMAGE, IMAGE)] * 2)
    ours = PyramidROIPooler(7, SCALES, 2, "ROIAlign")(maps, box_lists)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooler_type", TYPES)
def test_gradcheck(pooler_type):
    maps = [m[:, :1, :6, :6].contiguous().requires_grad_() for m in features(1, 1, torch.float64)]
    box_lists = [Boxes(torch.tensor([[1.0, 2, 18, 21], [0, 0, 150, 130], [3, 3, 300, 200]]))]
    pooler = PyramidROIPooler((2, 3), SCALES, 2, pooler_type)
    assert torch.autograd.gradcheck(lambda *m: pooler(list(m), box_lists), maps)


def test_output_need_not_be_square():
    maps, box_lists = features(), [boxes(20), boxes(20)]
    wide = PyramidROIPooler((7, 14), SCALES, 2, "ROIAlignV2")(maps, box_lists)
    assert wide.shape == (40, 3, 7, 14)
    # Each level on its own, where Detectron2 does take such an output.
    for k, scale in enumerate(SCALES):
        single = ROIPooler((7, 14), [scale], 2, "ROIAlignV2")(maps[k : k + 1], box_lists)
        of_level = torch.cat([b.tensor for b in box_lists])
        size = ((of_level[:, 2] - of_level[:, 0]) * (of_level[:, 3] - of_level[:, 1])).sqrt()
        low = 0 if k == 0 else 56 * 2**k
        high = torch.inf if k == 3 else 112 * 2**k
        here = (size >= low) & (size < high)
        assert_pooled_alike(wide[here], single[here], "ROIAlignV2")


@pytest.mark.parametrize(
    ("s0", "k0", "expected"),
    [
        (224, 4, [2, 2, 3, 4, 5]),
        (224, 5, [2, 3, 4, 5, 5]),
        (112, 4, [2, 3, 4, 5, 5]),
        (448, 4, [2, 2, 2, 3, 4]),
        (224, 3, [2, 2, 2, 3, 4]),
    ],
)
def test_each_box_is_read_from_its_level(s0, k0, expected):
    maps = [torch.full((1, 1, int(1024 * s), int(1024 * s)), 2.0 + k) for k, s in enumerate(SCALES)]
    sizes = [40, 56, 112, 224, 448]
    box_lists = [Boxes(torch.tensor([[100.0, 100, 100 + s, 100 + s] for s in sizes]))]
    pooled = PyramidROIPooler(3, SCALES, 0, "ROIAlignV2", s0, k0)(maps, box_lists)
    assert pooled.amax(dim=(1, 2, 3)).tolist() == pytest.approx(expected)
    assert pooled.amin(dim=(1, 2, 3)).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("counts", [[0], [0, 0], [0, 5], [5, 0]])
@pytest.mark.parametrize("levels", [1, 4])
def test_images_without_boxes(counts, levels):
    maps = [m.requires_grad_() for m in features(len(counts))[:levels]]
    pooler = PyramidROIPooler(7, SCALES[:levels], 0, "ROIAlignV2")
    pooled = pooler(maps, [boxes(n) for n in counts])
    assert pooled.shape == (sum(counts), 3, 7, 7)
    pooled.sum().backward()
    # Distributed training waits for a gradient of every parameter, be it zero.
    assert all(m.grad is not None for m in maps)


def test_a_batch_without_images():
    empty = [m[:0] for m in features()]
    assert PyramidROIPooler(7, SCALES, 0, "ROIAlignV2")(empty, []).shape == (0, 3, 7, 7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pooler_type", TYPES)
@pytest.mark.parametrize("levels", [1, 4])
def test_coordinates_are_not_rounded_to_the_features_dtype(dtype, pooler_type, levels):
    # bfloat16 would make this box (1000, 700, 1064, 760).
    box_lists = [Boxes(torch.tensor([[1001.3, 701.7, 1060.9, 760.2]]))]
    ramps = []
    for scale in SCALES[:levels]:
        side = int(1280 * scale)
        ramp = torch.arange(side, dtype=torch.float32).expand(side, side) / 4
        ramps.append(ramp[None, None].to(dtype))
    pooler = PyramidROIPooler(4, SCALES[:levels], 2, pooler_type)
    pooled = pooler(ramps, box_lists)
    exact = pooler([ramp.float() for ramp in ramps], box_lists)
    assert pooled.dtype == dtype
    torch.testing.assert_close(pooled, exact.to(dtype), rtol=0, atol=0)


def test_coordinates_are_not_rounded_under_autocast():
    box_lists = [Boxes(torch.tensor([[101.3, 71.7, 160.9, 130.2]]))]
    conv = torch.nn.Conv2d(3, 3, 1)
    pooler = PyramidROIPooler(4, SCALES, 2, "ROIAlignV2")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        maps = [conv(m) for m in features(1)]
        assert maps[0].dtype == torch.bfloat16
        pooled = pooler(maps, box_lists)
    exact = pooler([m.float() for m in maps], box_lists)
    torch.testing.assert_close(pooled, exact.to(torch.bfloat16), rtol=0, atol=0)


def test_negative_extent_reads_the_finest_level():
    maps = [torch.full_like(m, 2.0 + k) for k, m in enumerate(features(1))]
    turned = [Boxes(torch.tensor([[200.0, 200, 10, 10]]))]
    pooled = PyramidROIPooler(2, SCALES, 2, "ROIAlign")(maps, turned)
    assert pooled.unique().tolist() == [2.0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((7, [1 / 4, 1 / 16], 0, "ROIAlign"), "^`scales` .* not a pyramid"),
        ((7, [1 / 8, 1 / 4], 0, "ROIAlign"), "not a pyramid"),
        ((7, [1 / 6, 1 / 12], 0, "ROIAlign"), "not a pyramid"),
        ((7, [], 0, "ROIAlign"), "not a pyramid"),
        ((7, [0.0], 0, "ROIAlign"), "not a pyramid"),
        ((7, SCALES, 0, "ROIAlin"), "^`pooler_type` 'ROIAlin' .* did you mean ROIAlign"),
        (((7, 7, 7), SCALES, 0, "ROIAlign"), "^`output_size` is"),
        ((0, SCALES, 0, "ROIAlign"), "^`output_size` is"),
        ((7, SCALES, 0, "ROIAlign", 0), "^`canonical_box_size` is 0"),
    ],
)
def test_arguments_that_do_not_fit_are_named(args, message):
    with pytest.raises(UserError, match=message) as error:
        PyramidROIPooler(*args)
    assert "MODEL." not in str(error.value)  # nobody wrote a config


def test_calls_that_do_not_fit_are_named():
    pooler = PyramidROIPooler(7, SCALES, 0, "ROIAlignV2")
    with pytest.raises(UserError, match="3 feature maps.*4 levels, p2 to p5"):
        pooler(features(1)[:3], [boxes(1)])
    with pytest.raises(UserError, match="boxes of 2 images and features of 1"):
        pooler(features(1), [boxes(1), boxes(1)])


class _Transfers(TorchDispatchMode):
    """Counts what makes a GPU's queue run empty: operators whose result's size or value the host
    must know."""

    WAITS = ("aten.nonzero", "aten._local_scalar_dense", "aten.bincount", "aten.repeat_interleave")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += str(func).startswith(self.WAITS)
        # Indexing by a mask waits for the number of its True.
        masks = args[1] if str(func) == "aten.index.Tensor" else ()
        self.count += any(m is not None and m.dtype == torch.bool for m in masks)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("kernels", "expected"),
    # The kernel sets a flag on the host, which is read later.
    [(False, ["tolist"]), (True, [])],
)
def test_the_host_waits_once_and_with_kernels_never(monkeypatch, kernels, expected):
    monkeypatch.setattr(pooler_module, "pays", lambda *_: kernels)  # as on a GPU
    by_level = pyramid_roi_align_by_level
    monkeypatch.setattr(pooler_module, "pyramid_roi_align", lambda *x: by_level(*x[:-1]))
    monkeypatch.setattr(pooler_module, "non_finite_flag", lambda _: None)
    asked = []  # what brings values to the host, which the mode does not see on a CPU
    for name in ("tolist", "cpu", "item", "numpy", "__bool__", "__int__", "__float__"):
        original = getattr(torch.Tensor, name)

        def counted(tensor, *args, original=original, name=name):
            asked.append(name)
            return original(tensor, *args)

        monkeypatch.setattr(torch.Tensor, name, counted)
    maps, box_lists = features(), [boxes(50), boxes(50)]
    counts, called = [], []
    for kind in (PyramidROIPooler, ROIPooler):
        pooler = kind(7, SCALES, 0, "ROIAlignV2")
        with _Transfers() as transfers:
            pooler(maps, box_lists)
        counts.append(transfers.count)
        called.append(list(asked))
        asked.clear()
    assert counts == [0, 5]
    assert called == [expected, []]


def test_it_has_no_state():
    assert PyramidROIPooler(7, SCALES, 0, "ROIAlignV2").state_dict() == {}

"""Each measurement of tools/benchmark.py, once, on a network small enough for a test."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from fpn_plugin import UserError
from fpn_plugin.benchmark import measure, run
from fpn_plugin.benchmark.models import photograph
from fpn_plugin.deploy.convolution import FusedConv2d

OPTS = {
    "MODEL__RESNETS__DEPTH": 18,
    "MODEL__RESNETS__RES2_OUT_CHANNELS": 64,
    "MODEL__FPN__OUT_CHANNELS": 16,
    "MODEL__ROI_BOX_HEAD__FC_DIM": 16,
    "MODEL__RPN__POST_NMS_TOPK_TEST": 60,
    "INPUT__MIN_SIZE_TEST": 96,
}
SIZE = (96, 128)


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("picture") / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(SIZE[::-1]).save(path)
    return str(path)


@pytest.fixture(scope="module")
def bench(picture) -> measure.Bench:
    return measure.Bench("cpu", photograph(picture, *SIZE), 1, proposals=20, **OPTS)


@pytest.fixture
def no_compiler(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fails)


def test_too_few_proposals_are_named(picture):
    with pytest.raises(UserError, match=r"only \d+ proposals .* 128 x 96 px, and 61 are needed"):
        measure.Bench("cpu", photograph(picture, *SIZE), 1, proposals=61, **OPTS)


def test_detections_are_compared(bench):
    found = bench.differences()
    assert found["matched"] == found["detections"] > 0
    assert found["missing"] == found["extra"] == 0
    assert found["box_px"] < 0.05


def test_every_comparison_is_made(bench, no_compiler):
    made = {part: [each.name for each in getattr(bench, part)()] for part in run._COMPARING}
    assert [len(names) for names in made.values()] == [8, 4, 4]
    assert len(set(made["comparisons"])) == 7  # the first of them against two others
    for kind in ("float32", "bfloat16", "compiled float32"):
        assert bench.first_calls[f"{kind}: making"] > 0
        assert bench.first_calls[f"{kind}: first call"] > 0


def test_the_floor_is_every_convolution_as_the_model_calls_it(bench):
    called = measure.bare_convolutions(bench.fast, bench.inputs)
    modules = [m for m in bench.fast.modules() if isinstance(m, FusedConv2d)]
    owners = [call.__self__ for call, _ in called if hasattr(call, "__self__")]
    assert set(map(id, owners)) == set(map(id, modules))
    # The RPN's two convolutions on each of five levels; others once; two linear predictors.
    assert len(owners) == len(modules) + 2 * 4
    assert len(called) == len(owners) + 2
    assert not any("_input" in vars(module) for module in modules)
    conv = next(module for module in modules if module.relu)
    x = torch.randn(1, conv.weight.shape[1], 9, 9)
    torch.testing.assert_close(conv.bare(x).relu(), conv(x))
    assert conv.bare(x).min() < 0
    assert bench.floor().keys() == {"model", "convolutions"}


def test_convolutions_that_are_not_fused_count_too():
    from detectron2.layers import Conv2d

    model = torch.nn.Sequential(
        Conv2d(3, 4, 3, norm=torch.nn.BatchNorm2d(4), activation=torch.relu),
        torch.nn.Conv2d(4, 2, 1),
    ).eval()
    called = measure.bare_convolutions(model, torch.randn(1, 3, 8, 8))
    assert [tuple(x.shape) for _, x in called] == [(1, 3, 8, 8), (1, 4, 6, 6)]
    assert called[0][0](called[0][1]).min() < 0  # neither norm nor activation


def test_the_profile_says_where_the_rest_goes(bench):
    spent = bench.profile()
    first, *others, last = spent
    assert (first, last) == ("convolutions, matrix products", "all others")
    assert spent[first] > 0
    assert not any("conv" in name or "addmm" in name for name in others)
    times = [spent[name] for name in others]
    assert times == sorted(times, reverse=True)
    assert len(times) == 15


@pytest.mark.parametrize("what", measure.SCALINGS)
def test_every_quantity_is_scaled(what, picture):
    value = {"image side": 96, "proposals": 20, "batch": 2, "channels": 8}[what]
    found = measure.scaling(what, value, "cpu", picture, side=96, **OPTS)
    assert found["stock"] > 0
    assert found["optimised"] > 0


def test_memory_is_that_of_a_process_of_its_own(picture, monkeypatch):
    monkeypatch.setattr(measure, "_MEMORY_KINDS", ("pooler",))
    assert 0 <= measure.memory("cpu", *SIZE, picture)["pooler"] < 500


def test_the_command_writes_and_prints(picture, bench, no_compiler, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run, "Bench", lambda *_: bench)
    monkeypatch.setattr(run, "_PARTS", ("comparisons", "profile"))
    run.benchmark_main(
        ["--image", picture, "--output", str(tmp_path), "--pairs", "1",
         "--parts", "comparisons", "profile"]
    )  # fmt: skip
    said = capsys.readouterr().out
    assert f"threads: {torch.get_num_threads()}" in said
    assert f"torch: {torch.__version__}" in said
    assert "pairs: 1, a trial: below 7" in said
    line = next(line for line in said.splitlines() if line.startswith("neck alone"))
    assert line.count("(") == 3  # medians with their spread: both sides', and the ratio's
    written = json.loads((tmp_path / "benchmark.json").read_text())
    assert {"differences", "first_calls", "floor", "profile"} <= written.keys()
    text = (tmp_path / "benchmark.md").read_text()
    assert "| convolutions, matrix products |" in text
    assert "first call" in text

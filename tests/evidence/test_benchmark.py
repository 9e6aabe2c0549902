"""Each measurement of the benchmark, once, on a network small enough for a test."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from evidence.benchmark import cuda, measure, report, run
from evidence.benchmark.models import FASTER_R50, photograph, training_batch
from evidence.benchmark.timing import Comparison
from fpn_plugin import UserError
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


def test_bare_convolutions_are_all_of_the_model_as_it_calls_them(bench):
    called = measure.bare_convolutions(bench.fast, bench.inputs)
    modules = [m for m in bench.fast.modules() if isinstance(m, FusedConv2d)]
    owners = [call.__self__ for call, _ in called if hasattr(call, "__self__")]
    assert {id(each.weight) for each in owners} == {id(each.weight) for each in modules}
    # The RPN's two convolutions on each of five levels; others once; two linear predictors.
    assert len(owners) == len(modules) + 2 * 4
    assert len(called) == len(owners) + 2
    assert not any("_input" in vars(module) for module in modules)
    conv = next(module for module in modules if module.relu)
    bare = next(each for each in owners if each.weight is conv.weight)
    x = torch.randn(1, conv.weight.shape[1], 9, 9)
    torch.testing.assert_close(bare(x).relu(), conv(x))
    assert bare(x).min() < 0
    assert len(called) == len(owners) + 2  # calls of the bare convolutions are not recorded
    assert bench.convolution_seconds().keys() == {"model", "convolutions"}


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
    assert (first, last) == ("convolutions, matrix products", "all others") and spent[first] > 0
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
    pooled = 1000 * 256 * 7 * 7 * 4 / 2**20  # MiB of the output, float32
    assert pooled < measure.memory("cpu", *SIZE, picture)["pooler"] < 4 * pooled


def test_the_command_writes_and_prints(picture, bench, no_compiler, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(run._BENCHES, "cpu", lambda *_: bench)
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
    assert {"differences", "first_calls", "bare_convolutions", "profile"} <= written.keys()
    text = (tmp_path / "benchmark.md").read_text()
    assert re.search(r"\| convolutions, matrix products +\|", text)  # padded to the longest name
    assert "first call" in text


def test_a_gpus_rows_are_all_made_on_the_cpu_too(picture, no_compiler, monkeypatch):
    """But for what only a GPU has, which is noted and stops nothing."""

    def once(name, baseline, *calls, pairs, target=None, limit=None):
        for call in calls:
            call()
        return Comparison(name, baseline, [1.0], [1.0], target, limit)

    monkeypatch.setattr(cuda, "compare", once)
    monkeypatch.setattr(cuda, "training_batch", lambda image, _: training_batch(image, 1))
    image = photograph(picture, *SIZE)
    opts = {**OPTS, "MODEL__ROI_MASK_HEAD__CONV_DIM": 16}
    bench = cuda.CudaBench("cpu", image, 1, proposals=20, **opts)
    found, made, rows = {}, [], []
    for part, of_part in cuda.ROWS.items():
        if part == "steps":
            bench.half = torch.float16  # the CPU's pooling knows no bfloat16, its autocast no other
            poolers = [row for row in cuda.ROWS["comparisons"] if "pooler" in row.name]
            made += [each for row in poolers for each in bench._row(row)]
            bench.half, rows = torch.bfloat16, [*rows, *poolers]
        made += getattr(bench, part)()
        rows += [row for row in of_part if "pooler" not in row.name]
        found |= dict(bench.figures(part))
    assert [(each.baseline, each.target, each.limit) for each in made] == [
        (row.baseline, row.aim, row.limit) for row in rows
    ]
    assert found["bare_convolutions"].keys() == {"model", "convolutions"}
    assert found["differences_without_tf32"]["matched"] > 0
    assert torch.backends.cudnn.allow_tf32  # as before
    counts = [count.name for counts in cuda.COUNTS.values() for count in counts]
    assert [name for name in found["failed"] if not name.startswith("pooler")] == counts


def test_results_come_to_the_host_but_for_what_is_left(picture, bench):
    class Found(list):
        remove = list.append

        def to(self, device):
            return [*self, device]

    def model(given):
        return [{"instances": Found()} for _ in given]

    assert cuda.CudaBench._call(bench, model)() == [["cpu"]]
    few = cuda.CudaBench._call(bench, model, [1, 2], left=("pred_masks",))
    assert few() == [["pred_masks", "cpu"]] * 2


def event(name, start, kind=torch.autograd.DeviceType.CPU):
    return SimpleNamespace(
        name=name, device_type=kind, time_range=SimpleNamespace(start=start, end=start + 10)
    )


def test_waits_are_those_of_the_call():
    on_gpu = torch.autograd.DeviceType.CUDA
    waiting = ["cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize"]
    waiting += ["cudaMemcpy", "cuStreamSynchronize"]
    others = ["cudaLaunchKernel", "cudaMemcpyAsync", "cudaStreamWaitEvent", "aten::item"]
    events = [
        event("cudaStreamSynchronize", 50),
        event("counted", 0, on_gpu),
        event("counted", 100),
        *(event(name, 105) for name in (*waiting, *others)),
        event("cudaStreamSynchronize", 106, on_gpu),
        event("cudaDeviceSynchronize", 120),
    ]
    assert cuda.waits_among(events) == len(waiting)
    with pytest.raises(RuntimeError, match="sees no CUDA functions"):
        cuda.waits_among([event("counted", 0), event("aten::item", 5)])


def test_a_row_that_fails_is_noted_and_the_next_is_made():
    def full(_):
        raise torch.cuda.OutOfMemoryError("CUDA out of\nmemory")

    bench = SimpleNamespace(pairs=1, half=torch.float16, failed={})
    bench._measured = lambda *given: cuda.CudaBench._measured(bench, *given)
    for calls in (full, lambda _: (str, str)):
        row = cuda.Row("training, {half}", "stock", calls, 2)
        made = list(cuda.CudaBench._row(bench, row))
    assert [each.name for each in made] == ["training, float16"]
    assert bench.failed == {
        "training, float16, against stock": "OutOfMemoryError: CUDA out of memory"
    }


def test_graphs_are_told_of_by_what_became_of_calls():
    model = SimpleNamespace(graphs=SimpleNamespace(counts={"replayed": 3, "under autocast": 1}))
    assert cuda.graph_calls({(FASTER_R50, True): model, (FASTER_R50, False): None}) == {
        "faster_rcnn, half precision: replayed": 3,
        "faster_rcnn, half precision: under autocast": 1,
    }


def test_a_gpus_aims_are_listed_with_whether_they_are_met(tmp_path):
    def row(ours, target, limit=None):
        return Comparison("detector", "stock", [0.02], [ours], target, limit)

    made = [row(0.0039, 5, 0.004), row(0.0041, 3, 0.004), row(0.01, 3), row(0.01, None)]
    counted = [{"name": "waits", "stock": 40, "plugin": 1, "aim": 1}]
    content = {
        "environment": {"device": "cuda, NVIDIA H100"},
        "counted": counted,
        "failed": {"training": "OutOfMemoryError: CUDA out of memory"},
    }
    text = report.write_report(tmp_path, content, {"comparisons": made}).read_text()
    aims = text.split("## Aims")[1].split("## ")[0]
    lines = [" ".join(line.split()) for line in aims.splitlines() if "| stock" in line]
    assert lines == [
        "| detector | stock | 20.00 ms | 3.90 ms | 5.13 | >= 5, <= 4 ms | yes |",
        "| detector | stock | 20.00 ms | 4.10 ms | 4.88 | >= 3, <= 4 ms | no |",
        "| detector | stock | 20.00 ms | 10.00 ms | 2.00 | >= 3 | no |",
        "| waits | stock Detectron2 | 40 | 1 | - | <= 1 | yes |",
    ]
    assert "| plugin's ms |" in " ".join(text.split())
    assert "| training | OutOfMemoryError: CUDA out of memory |" in text
    content["environment"]["device"] = "cpu, EPYC"
    text = report.write_report(tmp_path, content, {"comparisons": made}).read_text()
    assert "## Aims" not in text
    assert "plugin's seconds" in text


FAKE = """#!/bin/sh
echo "$PYTHONPATH"
case "$*" in
  *pytest*) echo "$*"; echo "3 passed in 1.00s" ;;
  *) printf '# Benchmark\n\ncuda, H100.\n\n## Aims\n\n| waits |\n\n## Inference\n\n| no |\n' \
       >output/gpu_check/benchmark.md; echo "$*"; exit 3 ;;
esac
"""


def test_the_check_of_a_gpu_runs_both_and_prints_one_table(tmp_path):
    script = Path(__file__).parents[2] / "evidence" / "gpu_check.sh"
    for folder in ("evidence", "tests"):
        (tmp_path / folder).mkdir()
    shutil.copy(script, tmp_path / "evidence")
    (tmp_path / "tests" / "test_one.py").write_text("pytest.mark.gpu")
    (tmp_path / "tests" / "test_two.py").write_text("pytest.mark.long")
    python = tmp_path / "python"
    python.write_text(FAKE)
    python.chmod(0o755)
    run = subprocess.run(
        [tmp_path / "evidence" / "gpu_check.sh", "--pairs", "9"],
        env=os.environ | {"PYTHON": str(python), "PYTHONPATH": "packages"},
        capture_output=True,
        text=True,
    )
    tests, benchmark, *table, last = run.stdout.splitlines()
    assert (tests, table) == ("tests: 3 passed in 1.00s", ["cuda, H100.", "| waits |"])
    assert benchmark.startswith("benchmark: -m evidence.benchmark --device cuda --pairs 5")
    assert benchmark.endswith("--pairs 9")
    assert "more in output/gpu_check/benchmark.md" in last
    assert run.returncode == 1
    log = (tmp_path / "output" / "gpu_check" / "tests.log").read_text().splitlines()
    assert log[0] == f"{tmp_path}:packages"
    assert log[1].startswith("-m pytest -m gpu ")
    assert log[1].endswith(" tests/test_one.py")

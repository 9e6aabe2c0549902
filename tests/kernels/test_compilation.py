"""The kernels compile for a GPU, which needs none: Triton's interpreter checks no types."""

import pytest

triton = pytest.importorskip("triton", reason="Triton comes with torch for CUDA on Linux")
if int(triton.__version__.split(".")[0]) < 3:
    pytest.skip(
        f"Triton {triton.__version__} compiles only where a GPU is", allow_module_level=True
    )

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from fpn_plugin.kernels import nms_triton, roi_align_triton  # noqa: E402


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compiled(kernel, types: dict[str, str], constants: dict[str, object], capability: int) -> str:
    signature = types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, {name: signature[name] for name in kernel.arg_names}, constants)
    options = {"num_warps": 4, "enable_fp_fusion": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm[
        "ptx"
    ]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "last", "backward", "by_rule"),
    [("fp16", True, False, True), ("fp32", False, True, False), ("bf16", True, False, False)],
)
def test_roi_align(dtype, last, backward, by_rule, capability):
    kinds = {"p": f"*{dtype}", "h": "i32", "w": "i32", "s": "fp32"}
    types = {f"{name}{i}": kind for name, kind in kinds.items() for i in range(6)}
    types |= dict.fromkeys(["inverse", *(f"t{i}" for i in range(1, 6))], "fp32")
    types |= {"rois": "*fp32", "level_of": "*fp32" if by_rule else "*i64"}
    types |= {"non_finite": "*i32", "pooled": f"*{dtype}"}
    constants = {"BY_RULE": by_rule, "CHECKED": by_rule, "C": 256, "PH": 7, "PW": 7, "RATIO": 0}
    constants |= {"ALIGNED": True, "LAST": last, "CELLS": 4, "BLOCK": 256, "BACKWARD": backward}
    assert "_align" in compiled(roi_align_triton._align, types, constants, capability)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("grouped", [False, True])
def test_nms(grouped, capability):
    types = {"boxes": "*fp32", "groups": "*i64" if grouped else "*fp32", "words": "*i64"}
    types |= {"valid": "*i1", "keep": "*i1", "length": "i32", "blocks": "i32", "threshold": "fp32"}
    constants = {"GROUPED": grouped, "WORD": 64}
    assert "_overlaps" in compiled(nms_triton._overlaps, types, constants, capability)
    constants = {"WORD": 64, "MOST": 16}
    assert "_scan" in compiled(nms_triton._scan, types, constants, capability)

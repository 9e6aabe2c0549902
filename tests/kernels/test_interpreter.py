"""The kernels on the CPU: Triton's interpreter has to be chosen before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def test_the_kernels_by_tritons_interpreter():
    triton = pytest.importorskip("triton", reason="Triton comes with torch for CUDA on Linux")
    if int(triton.__version__.split(".")[0]) < 3:
        pytest.skip(f"the interpreter of Triton {triton.__version__} lacks reductions of our own")
    tests = Path(__file__).with_name("test_triton.py")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", tests],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        cwd=tests.parents[2],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]

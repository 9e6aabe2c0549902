"""The wheel: it holds everything, and works without the checkout."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import detectron2
import pytest
import torch

from fpn_plugin import model_zoo
from fpn_plugin.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]

PROGRAM = """
import json
from detectron2.config import instantiate
import fpn_plugin
from fpn_plugin import model_zoo
from fpn_plugin.__main__ import COMMANDS
from fpn_plugin.lazy import load_lazy_config
from fpn_plugin.lazy import model_node
model = model_zoo.get("mini/faster_rcnn_R_18_FPN.yaml", device="cpu")
retinanet = model_zoo.get("COCO-Detection/retinanet_R_50_FPN_1x.yaml", device="cpu")
lazy = instantiate(load_lazy_config("lazy/mini/faster_rcnn_R_18_FPN.py").model)
print(json.dumps({
    "file": fpn_plugin.__file__, "names": model_zoo.names(), "lazy": model_zoo.lazy_names(),
    "model": list(model.state_dict()), "lazy_model": list(lazy.state_dict()),
    "retinanet": list(retinanet.state_dict()),
}))
"""


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """An environment of its own with the plugin's wheel, and what it needs from this one."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "output", "datasets", "*.egg-info", "build")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    shutil.rmtree(source)
    made = folder / "environment"
    venv.create(made, with_pip=False)
    python = str(made / "bin" / "python")
    install = [*pip, "--python", python, "install", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    # A folder that a .pth names is searched last, and its own .pth files, an editable plugin's
    # among them, are not read.
    needed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    needed |= {str(Path(module.__file__).parents[1]) for module in (torch, detectron2)}
    (_packages(made) / "needed.pth").write_text("\n".join(sorted(needed)))
    return made


def _packages(environment: Path) -> Path:
    [packages] = environment.glob("lib/python*/site-packages")
    return packages


def test_models_are_built_by_name_from_the_wheel(environment, tmp_path):
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [environment / "bin" / "python", "-I", "-c", PROGRAM],
        cwd=tmp_path,
        env={**clean, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    installed = _packages(environment) / "fpn_plugin"
    assert told["file"] == str(installed / "__init__.py")
    assert told["names"] == model_zoo.names()
    assert told["lazy"] == model_zoo.lazy_names()
    assert (
        told["model"]
        == told["lazy_model"]
        == list(model_zoo.get("mini/faster_rcnn_R_18_FPN.yaml", device="cpu").state_dict())
    )
    assert {"backbone.top_block.p7.weight", "head.cls_score.weight"} <= set(told["retinanet"])
    bases = [*(ROOT / "configs").rglob("Base*.yaml")]
    assert bases and all(
        (installed / "configs" / path.relative_to(ROOT / "configs")).is_file() for path in bases
    )


def test_the_command_runs_from_the_wheel(environment, tmp_path):
    def run(*args: str) -> str:
        clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        command = [environment / "bin" / "fpn-plugin", *args]
        done = subprocess.run(command, cwd=tmp_path, env=clean, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        return done.stdout

    assert [line.split()[0] for line in run().splitlines() if line[:2] == "  "] == list(COMMANDS)
    config = ["--config-file", "mini/faster_rcnn_R_18_FPN.yaml", "MODEL.DEVICE", "cpu"]
    assert "| bottom-up" in run("inspect", *config)
    assert (tmp_path / "output" / "model.png").stat().st_size > 10_000
    top = {path.name for path in _packages(environment).iterdir()}
    assert {name for name in top if "." not in name} == {"fpn_plugin"}


def test_the_wheel_asks_for_no_version_of_what_a_user_has(environment):
    [metadata] = _packages(environment).glob("fpn_plugin*.dist-info/METADATA")
    required = [
        line.partition(": ")[2]
        for line in metadata.read_text().splitlines()
        if line.startswith("Requires-Dist") and "extra" not in line
    ]
    assert "torch" in required
    assert not [line for line in required if "detectron2" in line or any(c in line for c in "<>=~")]

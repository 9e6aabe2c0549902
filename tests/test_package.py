"""The wheel: it holds everything, and works without the checkout."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fpn_plugin import model_zoo

ROOT = Path(__file__).parents[1]

PROGRAM = """
import json
from detectron2.config import instantiate
import fpn_plugin
from fpn_plugin import model_zoo
from fpn_plugin.engine.lazy_training import load_lazy_config
from fpn_plugin.lazy import model_node
model = model_zoo.get("mini/faster_rcnn_R_18_FPN.yaml", device="cpu")
lazy = instantiate(load_lazy_config("lazy/mini/faster_rcnn_R_18_FPN.py").model)
print(json.dumps({
    "file": fpn_plugin.__file__, "names": model_zoo.names(), "lazy": model_zoo.lazy_names(),
    "model": list(model.state_dict()), "lazy_model": list(lazy.state_dict()),
}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder with the plugin as pip installs it from its wheel, and nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    ignored = shutil.ignore_patterns(".git", ".venv", "output", "datasets", "*.egg-info", "build")
    shutil.copytree(ROOT, source, ignore=ignored)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source]
    subprocess.run(build, check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    target = folder / "installed"
    install = [*pip, "install", "--no-deps", "--no-index", "--target", target, wheel]
    subprocess.run(install, check=True, capture_output=True)
    shutil.rmtree(source)
    return target


def test_models_are_built_by_name_from_the_wheel(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    assert told["file"] == str(installed / "fpn_plugin" / "__init__.py")
    assert told["names"] == model_zoo.names()
    assert told["lazy"] == model_zoo.lazy_names()
    assert (
        told["model"]
        == told["lazy_model"]
        == list(model_zoo.get("mini/faster_rcnn_R_18_FPN.yaml", device="cpu").state_dict())
    )
    bases = [*(ROOT / "configs").rglob("Base*.yaml")]
    assert bases and all(
        (installed / "fpn_plugin" / "configs" / path.relative_to(ROOT / "configs")).is_file()
        for path in bases
    )


def test_the_wheel_asks_for_no_version_of_what_a_user_has(installed):
    [metadata] = installed.glob("*.dist-info/METADATA")
    required = [
        line.partition(": ")[2]
        for line in metadata.read_text().splitlines()
        if line.startswith("Requires-Dist") and "extra" not in line
    ]
    assert "torch" in required
    assert not [line for line in required if "detectron2" in line or any(c in line for c in "<>=~")]

"""Every test works in folders of its own: no user's files, no checkout, no network."""

import os
import sys
import tempfile

# Detectron2 and the plugin read it when they are imported.
_DATASETS = tempfile.TemporaryDirectory(prefix="fpn-plugin-tests-")
os.environ["DETECTRON2_DATASETS"] = _DATASETS.name
# Tests are of the CPU, whatever the machine has; those marked gpu are asked for by pytest -m gpu.
if "gpu" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest  # noqa: E402
import torch  # noqa: E402

from evidence.tiny import make_squares  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def squares(tmp_path_factory) -> str:
    """What --dataset takes to register eight images of squares."""
    return make_squares(tmp_path_factory.mktemp("squares") / "data", 8)

"""Every test works in folders of its own: no user's files, no checkout, no network."""

import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# Detectron2 and the plugin read it when they are imported.
_DATASETS = tempfile.TemporaryDirectory(prefix="fpn-plugin-tests-")
os.environ["DETECTRON2_DATASETS"] = _DATASETS.name
# Tests are of the CPU, whatever the machine has; those marked gpu are asked for by pytest -m gpu.
if "gpu" not in sys.argv:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

import pytest  # noqa: E402
import torch  # noqa: E402

from evidence.tiny import make_squares  # noqa: E402

# Files of a minute or more. They begin first, so that no process works on one alone at the end.
LONGEST = (
    "test_export.py", "test_resume.py", "test_joint.py", "test_train_and_detect.py",
    "test_determinism.py", "test_deaths.py", "test_lazy.py", "test_networks.py",
    "test_optimize.py", "test_reproduce.py", "test_models.py", "test_exact.py",
    "test_interpreter.py", "test_commands.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sorts the longest files to the front."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def caplog(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """pytest's, also after a run has set up the plugin's logger, which then does not propagate."""
    logger = logging.getLogger("fpn_plugin")
    before = logger.propagate, logger.level
    logger.propagate = False
    logger.setLevel(logging.NOTSET)
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.propagate, logger.level = before


@pytest.fixture(scope="session")
def squares(tmp_path_factory) -> str:
    """What --dataset takes to register eight images of squares."""
    return make_squares(tmp_path_factory.mktemp("squares") / "data", 8)


@pytest.fixture
def coco_json(tmp_path) -> Callable[..., Path]:
    """Writes a COCO JSON of boxes [x, y, width, height] in one image of 200 x 100 px."""

    def write(boxes: Sequence[Sequence[float]], **extra: object) -> Path:
        annotations = [
            {"id": i + 1, "image_id": 7, "category_id": 1, "bbox": list(box), "iscrowd": 0}
            for i, box in enumerate(boxes)
        ]
        content = {
            "images": [{"id": 7, "file_name": "a.jpg", "width": 200, "height": 100}],
            "annotations": annotations,
            "categories": [{"id": 1, "name": "thing"}],
            **extra,
        }
        path = tmp_path / "boxes.json"
        path.write_text(json.dumps(content))
        return path

    return write

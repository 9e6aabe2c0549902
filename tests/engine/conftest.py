import logging
import os

import pytest
from detectron2.engine import defaults

from tests.helpers.detectors import config_of, detector  # noqa: F401


@pytest.fixture(autouse=True)
def _quiet_and_quick(monkeypatch) -> None:
    # Detectron2's log handlers outlive the streams that a test captures.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # nobody pulls the plug meanwhile
    monkeypatch.setattr(defaults, "collect_env_info", lambda: "")

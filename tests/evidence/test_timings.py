"""The timings of a check and of a fit."""

import re

from evidence.time_check import time_check_main
from evidence.time_fit import time_fit_main


def test_a_check_is_timed(capsys):
    time_check_main(["--images", "1", "--per-image", "1", "--runs", "1"])
    assert "1 images, 1 annotations" in capsys.readouterr().out


def test_a_fit_is_timed_with_its_memory(capsys):
    time_fit_main(["--images", "30", "--per-image", "10", "--runs", "1"])
    told = capsys.readouterr().out
    assert "30 images, 300 annotations" in told
    assert re.search(r"^\d+\.\d s; peak memory [1-9][\d,]+ MiB$", told, re.MULTILINE)

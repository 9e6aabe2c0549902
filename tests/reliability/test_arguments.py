"""Arguments with which a tool would show nothing are refused in a line that names them."""

import re

import pytest

from fpn_plugin.data.check_tool import check_main
from fpn_plugin.reliability.check_speed import time_check_main
from fpn_plugin.reliability.fit_speed import time_fit_main
from fpn_plugin.reliability.fuzz_data import fuzz_main
from fpn_plugin.reliability.killing import kill_main
from fpn_plugin.reliability.soak import soak_main


@pytest.mark.parametrize(
    ("main", "flag", "value", "least"),
    [
        (fuzz_main, "--cases", "0", 1),
        (fuzz_main, "--cases", "-3", 1),
        (fuzz_main, "--seed", "-1", 0),
        (time_check_main, "--images", "0", 1),
        (time_check_main, "--images", "-1", 1),
        (time_check_main, "--per-image", "0", 1),
        (time_check_main, "--runs", "0", 1),
        (time_fit_main, "--per-image", "0", 1),
        (kill_main, "--kills", "0", 1),
        (kill_main, "--kills", "-2", 1),
        (kill_main, "--kills", "many", 1),
        (kill_main, "--workers", "-1", 0),
        (soak_main, "--images", "1.5", 1),
        (soak_main, "--warm-up", "-1", 0),
        (check_main, "--keypoints", "-1", 0),
        (check_main, "--threads", "0", 1),
        (check_main, "--max-size", "0", 1),
        (check_main, "--examples", "-1", 0),
    ],
)
def test_arguments_out_of_range_are_refused(main, flag, value, least, capsys):
    data = ["data.json", "images"] if main is check_main else []
    with pytest.raises(SystemExit) as ended:
        main([*data, flag, value])
    assert ended.value.code == 2
    told = capsys.readouterr().err.splitlines()
    expected = rf"error: argument {flag}: '{value}', expected a whole number, {least} or more$"
    assert [bool(re.search(expected, line)) for line in told].count(True) == 1


def test_the_least_is_taken(capsys):
    time_check_main(["--images", "1", "--per-image", "1", "--runs", "1"])
    assert "1 images, 1 annotations" in capsys.readouterr().out


def test_a_fit_is_timed_with_its_memory(capsys):
    time_fit_main(["--images", "30", "--per-image", "10", "--runs", "1"])
    told = capsys.readouterr().out
    assert "30 images, 300 annotations" in told
    assert re.search(r"^\d+\.\d s; peak memory [1-9][\d,]+ MiB$", told, re.MULTILINE)

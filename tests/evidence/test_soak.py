"""The slope of memory over a long run."""

import numpy as np
import pytest

from evidence.soak import slope, soak_main
from fpn_plugin import UserError


def test_a_leak_is_seen_and_a_flat_line_is_flat():
    steps = np.arange(2000)
    leak = slope((10**9 + 4096 * steps).tolist(), 400)
    assert leak["bytes_per_step"] == pytest.approx(4096)
    assert leak["interval_95"] < 1
    assert leak["steps"] == 1600
    flat = slope([10**9] * 2000, 400)
    assert (flat["bytes_per_step"], flat["interval_95"]) == (0, 0)


def test_the_interval_holds_the_slope_where_readings_wander():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        # Plateaus of some 20 steps, as allocators make them, over a slope of 100 bytes a step.
        noise = np.repeat(rng.normal(0, 1e6, 100), 20)
        found = slope(10**9 + 100 * np.arange(2000) + noise, 0)
        held += abs(found["bytes_per_step"] - 100) <= found["interval_95"]
    assert 180 <= held <= 199  # 190 in the mean


def test_warming_up_must_leave_readings(tmp_path):
    with pytest.raises(UserError, match="--warm-up leaves fewer than 100 readings"):
        soak_main(["--iterations", "400", "--output", str(tmp_path / "new")])
    with pytest.raises(UserError, match="exists already"):
        soak_main(["--output", str(tmp_path)])
    (tmp_path / "file").write_text("")
    for name in (tmp_path / "file" / "new", "n" * 300, "a\0b"):
        with pytest.raises(UserError, match="^argument --output: .* cannot be made: "):
            soak_main(["--output", str(name)])

"""``python -m evidence.time_fit``: times a fit to a million boxes, and measures its memory."""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from fpn_plugin.cli.common import ToolParser, at_least
from fpn_plugin.engine import load_config, run_tool
from fpn_plugin.errors import UserError

from .time_check import write_big_dataset

__all__ = ["time_fit_main"]

_FIT = (
    "from fpn_plugin.engine import run_tool; from fpn_plugin.cli.fit import fit_main; "
    "run_tool(fit_main)"
)
_UNIT = 1024 if sys.platform.startswith("linux") else 1  # bytes, of ru_maxrss


def time_fit_main(argv: Sequence[str] | None = None) -> None:
    """Makes a JSON, fits a config to it as ``fpn-plugin fit`` does, in a process of its own, and
    prints its time, with imports, reading and charts, and its peak memory.

    Args:
        argv: arguments; those of the command line by default.

    Raises:
        UserError: the fit failed.
    """
    parser = ToolParser(description="Time a fit to a COCO JSON of a million boxes.")
    parser.add_argument("--config-file", default="COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml")
    parser.add_argument("--images", type=at_least(1), default=100_000)
    parser.add_argument("--per-image", type=at_least(1), default=10, help="annotations of an image")
    parser.add_argument("--runs", type=at_least(1), default=3)
    args = parser.parse_args(argv)
    load_config(args.config_file)  # an error in it shows before the JSON is made
    with tempfile.TemporaryDirectory() as folder:
        file = write_big_dataset(Path(folder), args.images, args.per_image)
        command = [sys.executable, "-c", _FIT, "--config-file", args.config_file]
        command += ["--data", str(file), "--output", str(Path(folder, "fit"))]
        for _ in range(args.runs):
            begun = time.perf_counter()
            done = subprocess.run(command, capture_output=True, text=True)
            wall = time.perf_counter() - begun
            if done.returncode:
                raise UserError(f"the fit failed: {done.stderr.strip().splitlines()[-1]}")
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * _UNIT
            print(f"{wall:.1f} s; peak memory {peak / 2**20:,.0f} MiB", flush=True)


if __name__ == "__main__":
    run_tool(time_fit_main)

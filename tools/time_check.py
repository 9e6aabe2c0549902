#!/usr/bin/env python
"""Time the check of a COCO JSON of 100,000 images. See --help."""

from evidence.time_check import time_check_main
from fpn_plugin.engine import run_tool

if __name__ == "__main__":
    run_tool(time_check_main)

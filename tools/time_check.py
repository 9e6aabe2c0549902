#!/usr/bin/env python
"""Time the check of a COCO JSON of 100,000 images. See --help."""

from fpn_plugin.engine import run_tool
from fpn_plugin.reliability.check_speed import time_check_main

if __name__ == "__main__":
    run_tool(time_check_main)

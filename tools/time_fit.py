#!/usr/bin/env python
"""Time a fit of a pyramid to a million boxes, and its memory. See --help."""

from fpn_plugin.engine import run_tool
from fpn_plugin.reliability.fit_speed import time_fit_main

if __name__ == "__main__":
    run_tool(time_fit_main)

#!/usr/bin/env python
"""Time a fit of a pyramid to a million boxes, and its memory. See --help."""

from evidence.time_fit import time_fit_main
from fpn_plugin.engine import run_tool

if __name__ == "__main__":
    run_tool(time_fit_main)

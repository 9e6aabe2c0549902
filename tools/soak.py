#!/usr/bin/env python
"""Train and evaluate for long, and say whether memory grows. See --help."""

from evidence.soak import soak_main
from fpn_plugin.engine import run_tool

if __name__ == "__main__":
    run_tool(soak_main)

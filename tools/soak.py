#!/usr/bin/env python
"""Train and evaluate for long, and say whether memory grows. See --help."""

from fpn_plugin.engine import run_tool
from fpn_plugin.reliability.soak import soak_main

if __name__ == "__main__":
    run_tool(soak_main)

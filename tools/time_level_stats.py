#!/usr/bin/env python
"""Time what statistics of pyramid levels cost a training. See --help."""

from evidence.level_statistics_cost import cost_main
from fpn_plugin.engine import run_tool

if __name__ == "__main__":
    run_tool(cost_main)

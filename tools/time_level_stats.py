#!/usr/bin/env python
"""Time what statistics of pyramid levels cost a training. See --help."""

from fpn_plugin.engine import run_tool
from fpn_plugin.inspection.cost import cost_main

if __name__ == "__main__":
    run_tool(cost_main)

#!/usr/bin/env python
"""Say what a config's model is made of: levels, anchors, parameters and FLOPs. See --help."""

from fpn_plugin.engine import run_tool
from fpn_plugin.inspection.inspect_model import inspect_main

if __name__ == "__main__":
    run_tool(inspect_main)

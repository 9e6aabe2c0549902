#!/usr/bin/env python
"""Say what a config's model is made of: levels, anchors, parameters and FLOPs. See --help."""

from fpn_plugin.cli.inspect import inspect_main
from fpn_plugin.engine import run_tool

if __name__ == "__main__":
    run_tool(inspect_main)

#!/usr/bin/env python
"""Draw what trained models do with images, level by level. See --help."""

from fpn_plugin.cli.visualize import visualize_main
from fpn_plugin.engine import run_tool

if __name__ == "__main__":
    run_tool(visualize_main)

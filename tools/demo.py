#!/usr/bin/env python
"""Draw a trained detector's boxes on images, tinted by pyramid level. See --help."""

from fpn_plugin.cli.detect import demo_main
from fpn_plugin.engine import run_tool

if __name__ == "__main__":
    run_tool(demo_main)

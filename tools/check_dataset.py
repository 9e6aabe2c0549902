#!/usr/bin/env python
"""Find whatever is wrong with COCO-format data before training on it. See --help."""

from fpn_plugin.cli.check import check_main
from fpn_plugin.engine import run_tool

if __name__ == "__main__":
    run_tool(check_main)

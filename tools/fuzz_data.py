#!/usr/bin/env python
"""Break COCO-format datasets at random, and see each refused or loaded right. See --help."""

from evidence.fuzz_data import fuzz_main
from fpn_plugin.engine import run_tool

if __name__ == "__main__":
    run_tool(fuzz_main)

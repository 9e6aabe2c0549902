#!/usr/bin/env python
"""Break COCO-format datasets at random, and see each refused or loaded right. See --help."""

from fpn_plugin.engine import run_tool
from fpn_plugin.reliability.fuzz_data import fuzz_main

if __name__ == "__main__":
    run_tool(fuzz_main)

#!/usr/bin/env python3
"""Write a trained RPN's proposals for Fast R-CNN: --help tells the arguments."""

from fpn_plugin.engine import run_tool
from fpn_plugin.proposals import dump_main

if __name__ == "__main__":
    run_tool(dump_main)

#!/usr/bin/env python3
"""Write a trained RPN's proposals for Fast R-CNN: --help tells the arguments."""

from fpn_plugin.cli.dump_proposals import dump_main
from fpn_plugin.engine import run_tool

if __name__ == "__main__":
    run_tool(dump_main)

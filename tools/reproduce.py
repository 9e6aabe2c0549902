#!/usr/bin/env python3
"""Train rows of the paper's tables and report them beside its figures: --help tells how."""

from fpn_plugin.cli.reproduce import reproduce_main
from fpn_plugin.engine import run_tool

if __name__ == "__main__":
    run_tool(reproduce_main)

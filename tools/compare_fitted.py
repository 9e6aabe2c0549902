#!/usr/bin/env python3
"""Train a config and its fitted sibling on mini datasets, and compare them. See --help."""

from fpn_plugin.engine import run_tool
from fpn_plugin.fitting.compare import compare_main

if __name__ == "__main__":
    run_tool(compare_main)

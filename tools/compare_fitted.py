#!/usr/bin/env python3
"""Train a config and its fitted sibling on mini datasets, and compare them. See --help."""

from evidence.compare_fitted import compare_main
from fpn_plugin.engine import run_tool

if __name__ == "__main__":
    run_tool(compare_main)

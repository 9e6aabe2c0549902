#!/usr/bin/env python3
"""Train or evaluate the model of a lazy config: --help tells the arguments."""

from fpn_plugin.cli.train import lazy_main
from fpn_plugin.engine import run_tool

if __name__ == "__main__":
    run_tool(lazy_main)

#!/usr/bin/env python3
"""Train or evaluate the model of a lazy config: --help tells the arguments."""

from fpn_plugin.engine import run_tool
from fpn_plugin.lazy.trainer import lazy_main

if __name__ == "__main__":
    run_tool(lazy_main)

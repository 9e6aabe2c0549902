#!/usr/bin/env python
"""The command ``fpn-plugin train`` for lazy configs, packaged ones by the names of their YAML."""

from fpn_plugin.cli.train import lazy_main
from fpn_plugin.engine import run_tool

if __name__ == "__main__":
    run_tool(lazy_main)

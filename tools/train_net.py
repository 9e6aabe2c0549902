#!/usr/bin/env python
"""Train or evaluate a detector: Detectron2's arguments, the plugin's configs. See --help."""

from fpn_plugin.cli.train import train_main
from fpn_plugin.engine import run_tool

if __name__ == "__main__":
    run_tool(train_main)

#!/usr/bin/env python
"""Train or evaluate a detector: Detectron2's arguments, the plugin's configs. See --help."""

from fpn_plugin.engine import run_tool
from fpn_plugin.engine.training import train_main

if __name__ == "__main__":
    run_tool(train_main)

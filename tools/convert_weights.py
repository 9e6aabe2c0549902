#!/usr/bin/env python3
"""Convert weights from and to torchvision and mmdetection: --help tells how."""

from fpn_plugin.conversion import convert_main
from fpn_plugin.engine import run_tool

if __name__ == "__main__":
    run_tool(convert_main)

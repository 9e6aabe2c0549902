#!/usr/bin/env python
"""Time the plugin against stock Detectron2 and torchvision. See --help."""

from evidence.benchmark import benchmark_main
from fpn_plugin.engine import run_tool

if __name__ == "__main__":
    run_tool(benchmark_main)

"""Runs the benchmark: ``python -m evidence.benchmark``."""

from fpn_plugin.engine import run_tool

from .run import benchmark_main

if __name__ == "__main__":
    run_tool(benchmark_main)

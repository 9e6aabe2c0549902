#!/usr/bin/env python
"""Put a run's curves, results, levels and errors into one file of HTML. See --help."""

from fpn_plugin.cli.report import report_main
from fpn_plugin.engine import run_tool

if __name__ == "__main__":
    run_tool(report_main)

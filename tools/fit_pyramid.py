#!/usr/bin/env python3
"""Fit levels, canonical size and anchors to a dataset, and say why. See --help."""

from fpn_plugin.cli.fit import fit_main
from fpn_plugin.engine import run_tool

if __name__ == "__main__":
    run_tool(fit_main)

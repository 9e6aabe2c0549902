#!/usr/bin/env python3
"""Fit levels, canonical size and anchors to a dataset, and say why. See --help."""

from fpn_plugin.engine import run_tool
from fpn_plugin.fitting import fit_main

if __name__ == "__main__":
    run_tool(fit_main)

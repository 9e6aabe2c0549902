#!/usr/bin/env python
"""Optimise a trained model, and say what that brings on images of yours. See --help."""

from fpn_plugin.cli.optimize import optimize_main
from fpn_plugin.engine import run_tool

if __name__ == "__main__":
    run_tool(optimize_main)

#!/usr/bin/env python
"""Kill a training at random moments, resume it, compare it with an uncut one. See --help."""

from fpn_plugin.engine import run_tool
from fpn_plugin.reliability.killing import kill_main

if __name__ == "__main__":
    run_tool(kill_main)

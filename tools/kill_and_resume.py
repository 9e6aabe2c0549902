#!/usr/bin/env python
"""Kill a training at random moments, resume it, compare it with an uncut one. See --help."""

from evidence.kill_and_resume import kill_main
from fpn_plugin.engine import run_tool

if __name__ == "__main__":
    run_tool(kill_main)

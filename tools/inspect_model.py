#!/usr/bin/env python
"""The command ``fpn-plugin inspect``."""

from fpn_plugin.__main__ import main

if __name__ == "__main__":
    main("inspect")

#!/usr/bin/env python
"""Export a trained detector to TorchScript, torch.export and ONNX. See --help."""

from fpn_plugin.cli.export import export_main
from fpn_plugin.engine import run_tool

if __name__ == "__main__":
    run_tool(export_main)

"""The command ``fpn-plugin``; ``python -m fpn_plugin`` is the same."""

import importlib
import sys

from .errors import near_names

__all__ = ["COMMANDS", "main"]

COMMANDS = {
    "train": "train a detector and evaluate it",
    "evaluate": "evaluate a trained detector",
    "detect": "draw a detector's boxes on images",
    "check": "find what is wrong with a dataset",
    "fit": "fit levels, canonical size and anchors to your data",
    "inspect": "show levels, anchors, parameters and multiply-adds of a model",
    "report": "write a run's curves, results and errors to one file of HTML",
    "visualize": "draw what models do with images, level by level",
    "optimize": "measure what optimising brings on your images",
    "export": "write TorchScript, torch.export and ONNX files",
    "convert": "convert weights from and to torchvision and mmdetection",
    "reproduce": "train rows of the paper's tables and report them",
    "dump-proposals": "write an RPN's proposals for Fast R-CNN",
}
"""Each command's name, which is its module's in :mod:`fpn_plugin.cli`, and what it does."""


def main(*command: str) -> None:
    """Runs the command that the command line names.

    Args:
        command: words before those of the command line, such as the name of a command.
    """
    name, *argv = [*command, *sys.argv[1:]] or ["--help"]
    if name in ("-h", "--help"):
        lines = (f"  {each:<16}{does}" for each, does in COMMANDS.items())
        print("usage: fpn-plugin COMMAND ...\n\nCommands:", *lines, sep="\n")
        print("\nfpn-plugin COMMAND --help shows a command's arguments.")
    elif name in COMMANDS:
        from .engine import run_tool  # what it imports takes seconds, and --help does without

        name = name.replace("-", "_")
        module = importlib.import_module(f"fpn_plugin.cli.{name}")
        run_tool(lambda: getattr(module, f"{name}_main")(argv))
    else:
        print(f"error: no command {name!r}: {near_names(name, COMMANDS)}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

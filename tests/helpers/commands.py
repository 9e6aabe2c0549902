"""The commands and the measurements, by name, and the parsers of their arguments."""

import functools
import importlib
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from fpn_plugin.__main__ import COMMANDS
from fpn_plugin.cli.common import ToolParser

ROOT = Path(__file__).parents[2]
LAZY = "lazyconfig_train_net.py"
_EVIDENCE = [path for path in ROOT.glob("evidence/*.py") if "_main(argv" in path.read_text()]
NAMES = [*COMMANDS, LAZY, "evidence.benchmark", *sorted(f"evidence.{p.stem}" for p in _EVIDENCE)]


class Parsed(Exception):
    """Carries what a command's parser gives out of the command."""


@functools.cache
def main_of(name: str) -> Callable[[list[str]], None]:
    if name == LAZY:
        return importlib.import_module("fpn_plugin.cli.train").lazy_main
    if name in COMMANDS:
        name = name.replace("-", "_")
        return getattr(importlib.import_module(f"fpn_plugin.cli.{name}"), f"{name}_main")
    module = importlib.import_module(name)
    [main] = [name for name in module.__all__ if name.endswith("_main")]
    return getattr(module, main)


@functools.cache
def parser_of(name: str) -> ToolParser:
    def parse_known_args(parser: ToolParser, *_: object) -> None:
        raise Parsed(parser)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ToolParser, "parse_known_args", parse_known_args)
        with pytest.raises(Parsed) as raised:
            main_of(name)([])
    return raised.value.args[0]


def stubs() -> dict[str, str]:
    """The command that each file of tools/ runs."""
    found = {path.name: path.read_text() for path in ROOT.glob("tools/*.py")}
    named = {name: re.findall(r'^    main\("(\S+)"\)$', text, re.M) for name, text in found.items()}
    return {name: commands[0] if commands else LAZY for name, commands in named.items()}

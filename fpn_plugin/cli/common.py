"""Arguments of the commands: the parser, arguments that several share, and types that check."""

from __future__ import annotations

import argparse
import difflib
import functools
import math
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from detectron2.config import get_cfg

from fpn_plugin.config import add_fpn_config, flat_keys
from fpn_plugin.data.given_images import GivenImage, images_in, images_of_dataset
from fpn_plugin.errors import UserError, near_names

__all__ = [
    "DTYPES",
    "Arguments",
    "ToolParser",
    "add_shared",
    "at_least",
    "between",
    "command_parser",
    "dist_url",
    "given_images",
    "input_file",
    "output_file",
    "output_folder",
]


DTYPES = ("float32", "bfloat16", "float16")
"""Dtypes that models can be optimised for."""

Arguments = Sequence[str] | Mapping[str, Any] | None
"""Of a command: words; values by name, such as ``{"config_file": "my.yaml"}``; None for those of
the command line."""


class ToolParser(argparse.ArgumentParser):
    """argparse's parser, whose errors are a :class:`UserError`.

    If it has an argument ``opts``, the first config key ends the values of the option before it,
    as in ``--input a.jpg b.jpg MODEL.WEIGHTS w.pth``. argparse's intermixed parsing would give all
    of these to ``--input``, and does not support ``REMAINDER``.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*args, **kwargs)

    def parse_known_args(  # type: ignore[override]
        self, args: Arguments = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Parses arguments; ``opts`` are the config keys and values at their end."""
        if isinstance(args, Mapping):
            args = self._words(args)
        given = list(sys.argv[1:] if args is None else args)
        first = len(given)
        if any(action.dest == "opts" for action in self._actions):
            first = next((i for i, word in enumerate(given) if _is_config_key(word)), first)
        self._check_options(given)
        self._check_not_empty(given[:first])
        parsed, left = super().parse_known_args(given[:first], namespace)
        if first < len(given):
            parsed.opts = [*parsed.opts, *given[first:]]
        return parsed, left

    def error(self, message: str) -> NoReturn:
        """Raises a :class:`UserError`, which the commands print as one line with exit status 2."""
        raise UserError(" ".join(message.splitlines()))

    def _words(self, values: Mapping[str, Any]) -> list[str]:
        """The command line that has these values; None and False stand for no argument."""
        actions = {action.dest: action for action in self._actions if action.dest != "help"}
        for name in values:
            if name not in actions:
                self.error(f"no argument {name}: {near_names(name, actions)}")
        words, last = [], []
        for name, action in actions.items():  # positional ones have an order
            value = values.get(name)
            if value is None or value is False:
                continue
            several = isinstance(value, list | tuple)
            flag, repeats = action.nargs == 0, action.nargs == argparse.REMAINDER
            repeats = repeats or action.default == []
            if flag != (value is True) or (several and not repeats):
                expected = "True or False" if flag else "a single value"
                self.error(f"argument {name} is {value!r}, expected {expected}")
            given = [str(each) for each in (value if several else [value])]
            if action.option_strings:
                option = action.option_strings[-1]
                words += [option] if flag else [f"{option}={word}" for word in given]
            else:
                last += given
        return [*words, *last]

    def _check_options(self, words: Sequence[str]) -> None:
        """Refuses unknown options, with near names."""
        options = [option for action in self._actions for option in action.option_strings]
        for word in words:
            name = word.partition("=")[0]
            # argparse takes the beginning of an option for the option.
            if re.match("--?[A-Za-z]", word) and not any(o.startswith(name) for o in options):
                self.error(f"no option {name}: {near_names(name, options)}")

    def _check_not_empty(self, words: Sequence[str]) -> None:
        for before, word in pairwise(["", *words]):
            name, equals, value = word.partition("=")
            named = bool(equals) and name.startswith("--")
            if not (value if named else word).strip():
                argument = name if named else before
                where = f"argument {argument}: " if argument.startswith("-") else ""
                self.error(f"{where}{word!r} is empty, expected a value")


def command_parser(name: str, text: str | None, **changes: Any) -> ToolParser:
    """The parser of a command.

    Args:
        name: of the command.
        text: its help: what it does, an empty line, examples. The docstring of its module.
        changes: further arguments of :class:`ToolParser`.
    """
    description, _, examples = (text or "").partition("\n\n")
    return ToolParser(f"fpn-plugin {name}", description=description, epilog=examples, **changes)


def _is_config_key(word: str) -> bool:
    """Whether a word of a command line is a config key, or a mistyped one."""
    keys, sections = _config_keys()
    if word in keys:
        return True
    dotted = re.fullmatch(r"([A-Z][A-Z0-9_]*)(\.[A-Z0-9_]+)+", word)
    if word.upper() not in keys and (
        dotted is None or not difflib.get_close_matches(dotted[1], sections, cutoff=0.75)
    ):
        return False
    return not os.path.exists(word)


@functools.cache
def _config_keys() -> tuple[frozenset[str], list[str]]:
    """All config keys that have a value, and the names of the sections at the top."""
    cfg = get_cfg()
    add_fpn_config(cfg)
    keys = set(flat_keys(cfg))
    sections = {key.rpartition(".")[0] for key in keys} - {""}
    return frozenset(keys - sections), sorted(name for name in sections if "." not in name)


def at_least(least: int, most: int = sys.maxsize) -> Callable[[str], int]:
    """Argparse's ``type`` for a whole number from ``least`` to ``most``."""
    expected = f"a whole number, {least} " + ("or more" if most == sys.maxsize else f"to {most}")

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r}, expected {expected}")
        return value

    return read


def between(least: float, most: float) -> Callable[[str], float]:
    """Argparse's ``type`` for a number from ``least`` to ``most``, not NaN."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text!r}, expected a number from {least} to {most}")
        return value

    return read


def input_file(text: str) -> str:
    """Argparse's ``type`` for a file to read."""
    if os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text!r} is a folder, expected a file")
    if not os.path.isfile(text):
        raise argparse.ArgumentTypeError(f"no file {text!r}")
    return text


def output_folder(text: str) -> str:
    """Argparse's ``type`` for a folder to write to, which need not exist."""
    if os.path.lexists(text) and not os.path.isdir(text):
        raise argparse.ArgumentTypeError(f"{text!r} is a file, expected a folder to write to")
    _check_writable(text)
    return text


def output_file(*suffixes: str) -> Callable[[str], str]:
    """Argparse's ``type`` for a file to write, whose folder need not exist.

    Args:
        suffixes: its name must end in one of them, if any are given.
    """

    def read(text: str) -> str:
        if os.path.isdir(text):
            raise argparse.ArgumentTypeError(f"{text!r} is a folder, expected a file to write")
        if suffixes and Path(text).suffix.lower() not in suffixes:
            raise argparse.ArgumentTypeError(
                f"{text!r}, expected a name that ends in {', '.join(suffixes)}"
            )
        _check_writable(text)
        return text

    return read


def _check_writable(text: str) -> None:
    """Refuses the name of a file or folder that cannot be written. It need not exist."""
    path = Path(text)
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError) as error:  # a name that is too long, or has a NUL
        reason = getattr(error, "strerror", None) or error
        raise argparse.ArgumentTypeError(f"{text!r} cannot be made: {reason}") from error
    found = next(each for each in (path, *path.absolute().parents) if os.path.lexists(each))
    if found != path and not found.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} cannot be made: {str(found)!r} is not a folder")
    if not os.access(found, os.W_OK):
        raise argparse.ArgumentTypeError(
            f"{text!r} cannot be written: no permission for {str(found)!r}"
        )


def dist_url(text: str) -> str:
    """Argparse's ``type`` for the address where processes find each other."""
    known = re.fullmatch(r"tcp://\S+:(\d{1,5})|auto|env://|file:///.+", text)
    if known is None or (known[1] and not 0 < int(known[1]) < 2**16):
        raise argparse.ArgumentTypeError(
            f"{text!r}, expected tcp://HOST:PORT with a port from 1 to 65535, or auto"
        )
    return text


_SHARED: dict[str, dict[str, Any]] = {
    "--config-file": {
        "required": True,
        "metavar": "FILE",
        "help": "path of a config, or name of a packaged one",
    },
    "--dataset": {
        "action": "append",
        "default": [],
        "metavar": "NAME=DATA",
        "help": "register data under a name: JSON:IMAGES of COCO's format, or FOLDER or "
        "FOLDER:SPLIT of VOC's, YOLO's or LabelMe's; repeat for several datasets",
    },
    "opts": {"nargs": argparse.REMAINDER, "help": "config keys and values: KEY VALUE ..."},
    "--output": {"type": output_folder, "help": "folder to write to (default: %(default)s)"},
    "--threshold": {
        "type": between(0, 1),
        "default": 0.5,
        "help": "lowest score of detections to draw and count (default: %(default)s)",
    },
    "--input": {"nargs": "+", "metavar": "PATH", "help": "images, or folders of images"},
    "--ground-truth": {
        "metavar": "DATASET",
        "help": "use a dataset's images, and draw its labels next to the detections",
    },
    "--color-by": {
        "choices": ("level", "class"),
        "default": "level",
        "help": "what the colour of a detection stands for; datasets.json of the run has the "
        "colours of classes (default: %(default)s)",
    },
    "--max-images": {"type": at_least(1), "help": "use only the first images, up to this number"},
    "--optimize": {
        "choices": DTYPES,
        "help": "run a fast copy of the model: float32 gives the same detections",
    },
    "--num-gpus": {
        "type": at_least(1, 1024),
        "default": 1,
        "help": "GPUs of this machine to use; with MODEL.DEVICE cpu, number of processes",
    },
    "--dist-url": {
        "type": dist_url,
        "default": "auto",
        "help": "where processes find each other: auto, or tcp://HOST:PORT",
    },
}


def add_shared(container: argparse._ActionsContainer, *names: str, **changes: Any) -> None:
    """Adds arguments that several commands have.

    Args:
        container: a parser, or a group of one.
        names: of ``_SHARED``, such as ``"--dataset"``, or ``"opts"`` for config keys.
        changes: what differs in this command: a default, a help text.
    """
    for name in names:
        container.add_argument(name, **(_SHARED[name] | changes))


def given_images(args: argparse.Namespace) -> list[GivenImage]:
    """The images of --input or --ground-truth, up to --max-images."""
    if args.ground_truth:
        return images_of_dataset(args.ground_truth, "--ground-truth")[: args.max_images]
    return images_in(args.input, "--input")[: args.max_images]

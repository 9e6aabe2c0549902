"""Errors that speak to the user, and the near names they suggest."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

__all__ = [
    "NonFiniteError",
    "UserError",
    "by_keys",
    "naming_keys",
    "near_names",
    "one_line",
]


class UserError(ValueError):
    """Something the user gave cannot be used: a key, a file, a name, a value.

    The message is one line: what was given, what was expected, and which key or command corrects
    it. The commands print it without a traceback and exit with status 2. Code that catches
    ``ValueError`` catches it too.
    """


class NonFiniteError(UserError, FloatingPointError):
    """A number is NaN or infinite where that has no meaning: a loss, a weight, a coordinate.

    Code that catches Detectron2's ``FloatingPointError`` catches it too.
    """


def by_keys(message: str, keys: Mapping[str, str]) -> str:
    """Replaces the names of `arguments` in a message, in backquotes, by their config keys.

    Args:
        message: what it says.
        keys: the key of each argument; others stay as they are.
    """
    return re.sub(r"`(\w+)`", lambda name: keys.get(name[1], name[0]), message)


def one_line(error: BaseException, most: int = 500) -> str:
    """An error's message in one line of ``most`` characters; its type's name if it has none."""
    return " ".join(str(error).split())[:most] or type(error).__name__


@contextmanager
def naming_keys(keys: Mapping[str, str]) -> Iterator[None]:
    """Makes errors raised within it name config keys instead of arguments, see :func:`by_keys`.

    It is for code that calls a function with values of a config.
    """
    try:
        yield
    except UserError as error:
        raise type(error)(by_keys(str(error), keys)) from error


def near_names(name: str, known: Iterable[str]) -> str:
    """The known names that the user may have meant by ``name``.

    Returns:
        ``"did you mean A or B?"`` with up to three near names. If there are none,
        ``"known: A, B, ..."`` with all names, or the first twenty and a count of the others.
    """
    name, known = str(name), sorted(set(known))
    lowered = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), lowered, n=3, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(lowered[match] for match in near)}?"
    if not known:
        return "there are none"
    shown = ", ".join(known[:20])
    return f"known: {shown}" + (f" and {len(known) - 20} more" if len(known) > 20 else "")

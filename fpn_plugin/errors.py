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
    "first_line",
    "naming_keys",
    "near_names",
    "one_line",
]


class UserError(ValueError):
    """Something the user gave cannot be used: a key, a file, a name, a value.

    The message is one line that says what was given, what was expected and which key or command
    mends it. The commands print it without a traceback and exit with status 2. Code that catches
    ``ValueError`` catches it too.
    """


def one_line(error: BaseException, most: int = 200) -> str:
    """An error's message in one line of ``most`` characters; its type's name if it has none."""
    return " ".join(str(error).split())[:most] or type(error).__name__


class NonFiniteError(UserError, FloatingPointError):
    """A number is NaN or infinite where that has no meaning: a loss, a weight, a coordinate.

    Code that catches Detectron2's ``FloatingPointError`` catches it too.
    """


def by_keys(message: str, keys: Mapping[str, str]) -> str:
    """A message that names `arguments`, with the config keys they were read from in their place.

    Args:
        message: with each argument's name in backquotes.
        keys: the key of each argument; others stay as they are.
    """
    return re.sub(r"`(\w+)`", lambda name: keys.get(name[1], name[0]), message)


def first_line(error: Exception) -> str:
    """The first line of an error's message, or the name of its type if it has no message."""
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def naming_keys(keys: Mapping[str, str]) -> Iterator[None]:
    """Makes errors raised within it name config keys instead of arguments, see :func:`by_keys`.

    Classes and functions name their arguments. Code that calls them with values of a config wraps
    the call in this.
    """
    try:
        yield
    except UserError as error:
        raise type(error)(by_keys(str(error), keys)) from error


def near_names(name: str, known: Iterable[str], most: int = 3) -> str:
    """Says which of the known names the user may have meant.

    Args:
        name: what the user wrote.
        known: the names there are.
        most: how many names to suggest at most.

    Returns:
        ``"did you mean A or B?"`` if a name is near, else ``"known: A, B, ..."`` with all names,
        or the first twenty and a count if there are more.
    """
    name, known = str(name), sorted(set(known))
    lowered = {candidate.lower(): candidate for candidate in known}
    near = difflib.get_close_matches(name.lower(), lowered, n=most, cutoff=0.6)
    if near:
        return f"did you mean {' or '.join(lowered[match] for match in near)}?"
    if not known:
        return "there are none"
    shown = ", ".join(known[:20])
    return f"known: {shown}" + (f" and {len(known) - 20} more" if len(known) > 20 else "")

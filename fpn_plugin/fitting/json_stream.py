"""Reading a large JSON record by record, so that it never lies in memory as a whole."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from json.decoder import WHITESPACE
from typing import Any, TextIO

__all__ = ["JsonStream"]

_COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")
_DECODER = json.JSONDecoder()
_CHARACTERS = 1 << 22  # read at a time
_FOLLOWS = frozenset(",:]} \t\r\n")  # what may stand after a value


class JsonStream:
    """The parts of a JSON object, in the order of the file.

    Each record is decoded by the standard library's decoder and may be dropped before the next is
    read; what is kept is a window of text.

    Args:
        stream: the text, open for reading.
        on_read: called after each read.

    Example::

        >>> stream = JsonStream(io.StringIO('{"info": 1, "images": [{"id": 3}, {"id": 4}]}'))
        >>> {key: list(stream.items()) for key in stream.keys() if key == "images"}
        {'images': [{'id': 3}, {'id': 4}]}
    """

    def __init__(self, stream: TextIO, on_read: Callable[[], None] = lambda: None) -> None:
        self._stream, self._on_read = stream, on_read
        self._text, self._at, self._ended = "", 0, False

    def keys(self) -> Iterator[str]:
        """Each key of the object; its value is read by :meth:`items` or :meth:`value`, or skipped
        when the next key is asked for.

        Raises:
            ValueError: the text is not JSON, or not an object.
        """
        self._take("{")
        more = self._peek() != "}"
        while more:
            key = self.value()
            if not isinstance(key, str):
                raise ValueError(f"a key is {key!r}, expected a string")
            self._take(":")
            self._unread = True
            yield key
            if self._unread:
                self.value()
            more = self._next_is(",")
        self._take("}")
        if self._peek():
            raise ValueError(f"expected the end, found {self._text[self._at :][:20]!r}")

    def items(self) -> Iterator[Any]:
        """The items of the list that is the present key's value.

        Raises:
            ValueError: the text is not JSON, or the value is not a list.
        """
        self._unread = False
        self._take("[")
        if self._next_is("]"):
            return
        while True:
            yield self.value()
            comma = _COMMA.match(self._text, self._at)
            if comma and comma.end() < len(self._text):  # as a rule, and at a third of the time
                self._at = comma.end()
            elif not self._next_is(","):
                break
        self._take("]")

    def value(self) -> Any:
        """The value that comes next.

        Raises:
            ValueError: the text is not JSON, or nested too deeply.
        """
        self._unread = False
        while True:
            text, at = self._text, self._at
            try:
                value, end = _DECODER.raw_decode(text, at)
            except RecursionError as error:
                raise ValueError("lists or objects lie within one another too deeply") from error
            except ValueError:
                self._peek()  # there may be white space before it
                if self._at > at or self._text is not text:
                    continue
                if self._ended:
                    raise
            else:
                # A number at the end of the window may go on beyond it: of 0.5, "0." reads as 0.
                if text[end : end + 1] in _FOLLOWS or self._ended:
                    self._at = end
                    return value
            self._read()

    def _peek(self) -> str:
        """The next character that is not white space, "" at the end."""
        while True:
            self._at = WHITESPACE.match(self._text, self._at).end()
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read()

    def _next_is(self, character: str) -> bool:
        if self._peek() != character:
            return False
        self._at += 1
        return True

    def _take(self, character: str) -> None:
        if not self._next_is(character):
            raise ValueError(f"expected {character!r}, found {self._text[self._at :][:20]!r}")

    def _read(self) -> None:
        # As much again as is there: a long value is then decoded a few times, not many.
        rest = self._text[self._at :]
        more = self._stream.read(max(_CHARACTERS, len(rest)))
        self._text, self._at, self._ended = rest + more, 0, not more
        self._on_read()

"""Reads a COCO JSON record by record, so that its text is never in memory as a whole."""

from __future__ import annotations

import codecs
import gc
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from json.decoder import WHITESPACE
from pathlib import Path
from typing import Any, BinaryIO

from tqdm import tqdm

from fpn_plugin.errors import UserError

from .problems import Problem

__all__ = ["JsonStream", "digest_of", "no_garbage_collection", "read_json"]

_COMMA = re.compile(r"[ \t\n\r]*,[ \t\n\r]*")
_FIRST_KEY = re.compile(r'[{][ \t\n\r]*"[^"]*"')
_DECODER = json.JSONDecoder()
_BYTES = 1 << 22  # read at a time
_FOLLOWS = frozenset(",:]} \t\r\n")  # what may stand after a value


def read_json(
    json_file: str,
    annotations: Callable[[Iterator[Any], dict[str, Any]], Any] | None = None,
) -> tuple[Any, list[Problem], str]:
    """The content of a JSON file, what is wrong with its encoding, and its digest.

    Args:
        json_file: path of the file.
        annotations: is called with the records of the list "annotations" and the content before it
            in the file. Its result replaces the list. None keeps the records.

    Raises:
        UserError: the file is not there or not JSON.
    """
    content: Any = {}
    try:
        with (
            open(json_file, "rb") as file,
            no_garbage_collection(),
            tqdm(
                total=os.path.getsize(json_file), desc=f"reading {Path(json_file).name}", unit="B",
                unit_scale=True, leave=False, delay=2,
            ) as bar,
        ):  # fmt: skip
            stream = JsonStream(file, bar.update)
            try:
                for key in stream.keys():  # noqa: SIM118
                    if not stream.at_list():
                        content[key] = stream.value()
                    elif key == "annotations" and annotations is not None:
                        content[key] = annotations(stream.items(), content)
                    else:
                        content[key] = list(stream.items(kept=True))
            except UserError:
                raise
            except ValueError:  # json reads other values, and says where a file is not JSON
                file.seek(0)
                content = json.loads(file.read())
    except OSError as error:
        raise UserError(f"cannot read {json_file}: {error.strerror or error}") from error
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{json_file} is not JSON: {error}") from error
    message = f"is written in {stream.encoding}, read as such; expected utf-8"
    changes = [Problem("filled_in", "", message)] if stream.encoding != "utf-8" else []
    return content, changes, stream.digest.hexdigest()


def digest_of(json_file: str) -> str:
    """The digest of a file's bytes; "" if it cannot be read."""
    try:
        return hashlib.blake2b(Path(json_file).read_bytes()).hexdigest()
    except OSError:
        return ""


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Stops the collector, which would visit millions of records again and again."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class JsonStream:
    """The parts of a JSON object, in the order of the file.

    The standard library's decoder decodes one record at a time. Only a window of text is kept.

    Args:
        file: open for reading bytes.
        on_read: is called after each read with the number of bytes.

    Attributes:
        encoding: of the text: UTF-8, -16 or -32.
        digest: of the bytes that were read.

    Example::

        >>> text = b'{"info": 1, "images": [{"id": 3}, {"id": 4}]}'
        >>> stream = JsonStream(io.BufferedReader(io.BytesIO(text)))
        >>> {key: list(stream.items()) for key in stream.keys() if key == "images"}
        {'images': [{'id': 3}, {'id': 4}]}
    """

    def __init__(
        self, file: BinaryIO, on_read: Callable[[int], object] = lambda count: None
    ) -> None:
        self._file, self._on_read = file, on_read
        self.encoding, self.digest = json.detect_encoding(file.peek(4)), hashlib.blake2b()
        # Surrogates pass, as they do in json.
        self._decoder = codecs.getincrementaldecoder(self.encoding)("surrogatepass")
        self._text, self._at, self._ended = "", 0, False
        self._decoded: str | None = None

    def keys(self) -> Iterator[str]:
        """Each key of the object. :meth:`items` or :meth:`value` read its value; the next key skips
        it.

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

    def at_list(self) -> bool:
        """Whether the current key's value is a list."""
        return self._peek() == "["

    def items(self, *, kept: bool = False) -> Iterator[Any]:
        """The items of the list that is the current key's value.

        Args:
            kept: whether all stay in memory. Then many are decoded at once, which share the strings
                of their keys. Items that are dropped one by one stay in the processor's cache.

        Raises:
            ValueError: the text is not JSON, or the value is not a list.
        """
        self._unread = False
        self._take("[")
        if self._next_is("]"):
            return
        while True:
            if kept:
                yield from self._records()
            yield self.value()
            comma = _COMMA.match(self._text, self._at)
            if comma and comma.end() < len(self._text):  # most often, and in a third of the time
                self._at = comma.end()
            elif not self._next_is(","):
                break
        self._take("]")

    def _records(self) -> list[Any]:
        """The list's objects in the window, without the last; none if a window is tried again."""
        text, at = self._text, self._at
        begins = _FIRST_KEY.match(text, at)
        if text is self._decoded or begins is None:
            return []
        self._decoded = text
        cut = text.rfind(",", at, text.rfind(begins.group()))
        try:
            records = json.loads(f"[{text[at:cut]}]") if cut > at else []
        except (ValueError, RecursionError):  # the cut is within an object or a string
            return []
        self._at = cut + 1 if records else at
        return records

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
                # A number at the end of the window may continue: of 0.5, "0." reads as 0.
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
        # As much again as is there, so that a long value is decoded only a few times.
        rest = self._text[self._at :]
        more = self._file.read(max(_BYTES, len(rest)))
        self.digest.update(more)
        text = self._decoder.decode(more, final=not more)
        self._text, self._at, self._ended = rest + text, 0, not more
        self._on_read(len(more))

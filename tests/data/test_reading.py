"""Reading a JSON as a stream: the same as json reads, whatever the window and the encoding."""

import hashlib
import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fpn_plugin.data import reading
from fpn_plugin.data.reading import JsonStream

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


# Records that are decoded many at once, if each is cut from the next where it ends.
RECORDS = st.sampled_from(
    [{"id": 1}, {"id": ', {"id": 2'}, {"id": 3, "of": [{"id": 4}, {"id": 5}]}, {"of": {"id": 6}}, 7]
)


def stream_of(text: str, encoding: str = "utf-8") -> JsonStream:
    return JsonStream(io.BufferedReader(io.BytesIO(text.encode(encoding))))


@settings(deadline=None)
@given(
    content=st.dictionaries(st.text(), VALUES | st.lists(RECORDS), max_size=5),
    window=st.integers(1, 80),
    indent=st.sampled_from([None, 0, 2]),
    kept=st.booleans(),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_a_stream_reads_what_json_reads_whatever_its_window(
    content, window, indent, kept, encoding
):
    text = json.dumps(content, indent=indent, ensure_ascii=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "_BYTES", window)
        stream = stream_of(text, encoding)
        read = {
            key: list(stream.items(kept=kept)) if stream.at_list() else stream.value()
            for key in stream.keys()  # noqa: SIM118
        }
    assert read == content
    assert stream.encoding == encoding
    assert stream.digest.digest() == hashlib.blake2b(text.encode(encoding)).digest()


def test_a_stream_skips_what_is_not_asked_for():
    stream = stream_of('{"a": [1, {"b": 2}], "c": 12, "d": [3]}')
    assert [list(stream.items()) for key in stream.keys() if key == "d"] == [[3]]  # noqa: SIM118


@pytest.mark.parametrize("text", ["", "[1]", '{"a": [1, 2', '{"a" 1}', '{"a": 1} {', "{1: 2}"])
def test_a_stream_refuses_what_is_not_an_object(text):
    stream = stream_of(text)
    with pytest.raises(ValueError):
        list(stream.keys())

"""The incremental JSON parser agrees with the OVSDB library's own, however the stream is cut."""

from __future__ import annotations

import json
from typing import Any

import ovs.json
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from agent_helper.json_parser import Parser

_TEXT = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=12)  # the library has no null bytes
_SCALARS = st.none() | st.booleans() | st.integers(-(2**53), 2**53) | _TEXT
_VALUES = st.recursive(_SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3))
_MESSAGES = st.dictionaries(_TEXT, _VALUES, max_size=3) | st.lists(_VALUES, max_size=3)


def read(text: str, size: int) -> list[Any]:
    """As ovs.jsonrpc.Connection.recv does."""
    found: list[Any] = []
    parser = Parser()
    for start in range(0, len(text), size):
        rest = text[start : start + size]
        while rest:
            rest = rest[parser.feed(rest) :]
            if parser.is_done():
                found.append(parser.finish())
                parser = Parser()
    return found


@given(st.lists(_MESSAGES, max_size=4), st.integers(1, 40), st.booleans())
@example([{"a": 'x"]}\\'}, ["\\", '"']], 1, False)
def test_messages_are_found_in_a_stream_however_it_is_cut(messages: list[Any], size: int, ascii_only: bool) -> None:
    text = "".join(json.dumps(message, ensure_ascii=ascii_only) for message in messages)
    assert read(text, size) == messages


@given(_MESSAGES, st.sampled_from(["", " ", "\n"]))
def test_whole_texts_are_read_as_the_library_reads_them(message: Any, trailer: str) -> None:
    parser = Parser(check_trailer=True)
    text = json.dumps(message, indent=1) + trailer
    assert parser.feed(text) == len(text)
    assert parser.finish() == message == ovs.json.from_string(text)


@pytest.mark.parametrize("text", ["}", '{"a":}', "x", "[1,]", "{]", '{"a":"\x01\x02', "", "[1", "[1] 2", "[" * 5000])
def test_what_is_not_json_is_said_in_words(text: str) -> None:
    parser = Parser(check_trailer=True)
    parser.feed(text)
    assert isinstance(parser.finish(), str)


def test_a_large_message_is_read_in_no_time_in_small_pieces() -> None:
    message = [{"row": ["map", [["key", "value"] * 10]], "n": n} for n in range(3000)]
    assert read(json.dumps(message), 4096) == [message]

"""Length-prefixed messages."""

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taploom.rpc.framing import (
    CompressedMessageError,
    FramingError,
    MessageReader,
    MessageTooLargeError,
    frame_message,
)


@given(st.lists(st.binary(max_size=100)), st.lists(st.integers(1, 50), min_size=1))
def test_messages_survive_any_segmentation(messages: list[bytes], sizes: list[int]) -> None:
    data = b"".join(map(frame_message, messages))
    reader = MessageReader(100)
    received: list[bytes] = []
    position = turn = 0
    while position < len(data):
        size = sizes[turn % len(sizes)]
        received += reader.feed(data[position : position + size])
        position += size
        turn += 1
    assert received == messages
    assert reader.pending == 0


def test_the_limit_is_checked_before_the_message_arrives() -> None:
    reader = MessageReader(10)
    assert reader.feed(frame_message(b"x" * 10)) == [b"x" * 10]
    with pytest.raises(MessageTooLargeError, match="11 bytes exceeds the limit of 10"):
        reader.feed(struct.pack(">BI", 0, 11))


def test_compressed_messages_are_refused() -> None:
    with pytest.raises(CompressedMessageError):
        MessageReader(10).feed(struct.pack(">BI", 1, 3) + b"abc")


@given(st.binary(max_size=64))
def test_any_bytes_are_messages_or_a_framing_error(data: bytes) -> None:
    reader = MessageReader(32)
    try:
        messages = reader.feed(data)
    except FramingError:
        return
    assert b"".join(map(frame_message, messages)) == data[: len(data) - reader.pending]

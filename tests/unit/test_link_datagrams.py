"""Datagrams in a stream, however it is cut."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taploom.link.datagrams import MAX_DATAGRAM, DatagramError, DatagramScanner


def framed(*datagrams: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(data)) + data for data in datagrams)


@given(st.lists(st.binary(max_size=40), max_size=20), st.lists(st.integers(1, 30), min_size=1))
def test_datagrams_survive_any_cuts(datagrams: list[bytes], cuts: list[int]) -> None:
    scanner, stream, found, position, turn = DatagramScanner(), framed(*datagrams), [], 0, 0
    while position < len(stream):
        size = cuts[turn % len(cuts)]
        # A buffer that is used again for each read.
        buffer = bytearray(stream[position : position + size])
        found += [bytes(datagram) for datagram in scanner.feed(memoryview(buffer))]
        buffer[:] = bytes(len(buffer))
        position += size
        turn += 1
    assert found == datagrams


@given(st.binary(max_size=300))
def test_any_bytes_are_datagrams_or_an_error(data: bytes) -> None:
    try:
        for datagram in DatagramScanner().feed(memoryview(data)):
            assert len(datagram) <= MAX_DATAGRAM
    except DatagramError as error:
        assert str(error)


def test_the_largest() -> None:
    largest = bytes(MAX_DATAGRAM)
    assert [len(datagram) for datagram in DatagramScanner().feed(memoryview(framed(largest)))] == [MAX_DATAGRAM]
    with pytest.raises(DatagramError, match="65508 bytes"):
        list(DatagramScanner().feed(memoryview(framed(largest + b"x"))))

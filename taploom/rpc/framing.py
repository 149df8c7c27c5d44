"""gRPC's length-prefixed messages, sans-IO: a flag byte, a 4-byte big-endian length, the message."""

from __future__ import annotations

import struct

_PREFIX = struct.Struct(">BI")
PREFIX_SIZE = _PREFIX.size


class FramingError(Exception):
    """The bytes of a call that are not length-prefixed messages."""


class MessageTooLargeError(FramingError):
    """A message larger than the limit."""


class CompressedMessageError(FramingError):
    """A message with the compressed flag; this implementation offers no compression."""


def frame_message(message: bytes) -> bytes:
    """`message` with its prefix, uncompressed."""
    return _PREFIX.pack(0, len(message)) + message


class MessageReader:
    """Cuts a call's bytes into messages.

    The limit is checked as soon as the prefix is there, before the message is buffered.
    """

    def __init__(self, max_message_size: int) -> None:
        self._limit = max_message_size
        self._buffer = bytearray()
        self._length: int | None = None

    @property
    def pending(self) -> int:
        """Bytes of an incomplete message, its prefix included."""
        return len(self._buffer)

    def feed(self, data: bytes) -> list[bytes]:
        """The messages that `data` completes. FramingError (or one of its kinds) ends the call."""
        buffer = self._buffer
        buffer += data
        messages: list[bytes] = []
        position = 0
        try:
            while True:
                if self._length is None:
                    if len(buffer) - position < PREFIX_SIZE:
                        break
                    self._length = self._parse_prefix(position)
                end = position + PREFIX_SIZE + self._length
                if len(buffer) < end:
                    break
                messages.append(bytes(buffer[position + PREFIX_SIZE : end]))
                position = end
                self._length = None
        finally:
            del buffer[:position]
        return messages

    def _parse_prefix(self, position: int) -> int:
        flag, length = _PREFIX.unpack_from(self._buffer, position)
        if flag == 1:
            raise CompressedMessageError("the message is compressed, and no compression was agreed on")
        if flag:
            raise FramingError(f"illegal message flag {flag}")
        if length > self._limit:
            raise MessageTooLargeError(f"a message of {length} bytes exceeds the limit of {self._limit}")
        return int(length)

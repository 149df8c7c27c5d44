"""Statistics that the integration bridge tells by OpenFlow 1.3 (7.3.5, "Multipart Messages")."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import trio

__all__ = ["AGGREGATE", "METER", "multipart"]

AGGREGATE: Final = 2
METER: Final = 9

_VERSION = 4  # OpenFlow 1.3
_HELLO, _ERROR, _ECHO_REQUEST, _ECHO_REPLY, _MULTIPART_REQUEST, _MULTIPART_REPLY = 0, 1, 2, 3, 18, 19
_HEADER = struct.Struct("!BBHI")
_PART = struct.Struct("!HH4x")
_MORE = 1
# In one write; vswitchd answers them in order.
_AT_ONCE = 200


async def multipart(mgmt: Path, kind: int, requests: Sequence[bytes]) -> list[bytes]:
    """The answers to requests of one kind, in their order: the bodies after the multipart header, parts put together.

    Args:
        mgmt: where the bridge takes OpenFlow connections.

    Raises:
        OSError, trio.BrokenResourceError: it does not answer.
        ValueError: it refuses, or speaks something else.
    """
    answers = [b""] * len(requests)
    if not requests:
        return answers
    async with await trio.open_unix_socket(str(mgmt)) as stream:
        messages = _Messages(stream)
        await stream.send_all(_HEADER.pack(_VERSION, _HELLO, _HEADER.size, 0))
        for first in range(0, len(requests), _AT_ONCE):
            numbers = range(first, min(first + _AT_ONCE, len(requests)))
            await stream.send_all(b"".join(_request(number + 1, kind, requests[number]) for number in numbers))
            asked = set(numbers)
            while asked:
                message, xid, body = await messages.next()
                if message == _ECHO_REQUEST:
                    await stream.send_all(_HEADER.pack(_VERSION, _ECHO_REPLY, _HEADER.size + len(body), xid) + body)
                elif message == _ERROR:
                    raise ValueError(f"ovs-vswitchd refused with OpenFlow error {body[:4].hex()}")
                elif message == _MULTIPART_REPLY and xid - 1 in asked:
                    _, flags = _PART.unpack_from(body)
                    answers[xid - 1] += body[_PART.size :]
                    if not flags & _MORE:
                        asked.discard(xid - 1)
    return answers


def _request(xid: int, kind: int, body: bytes) -> bytes:
    length = _HEADER.size + _PART.size + len(body)
    return _HEADER.pack(_VERSION, _MULTIPART_REQUEST, length, xid) + _PART.pack(kind, 0) + body


class _Messages:
    """OpenFlow messages from a stream."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._data = bytearray()

    async def next(self) -> tuple[int, int, bytes]:
        """Type, transaction id and body of the next one."""
        await self._fill(_HEADER.size)
        _, kind, length, xid = _HEADER.unpack_from(self._data)
        if length < _HEADER.size:
            raise ValueError("ovs-vswitchd does not speak OpenFlow")
        await self._fill(length)
        body = bytes(self._data[_HEADER.size : length])
        del self._data[:length]
        return kind, xid, body

    async def _fill(self, size: int) -> None:
        while len(self._data) < size:
            chunk = await self._stream.receive_some(65536)
            if not chunk:
                raise ValueError("ovs-vswitchd closed the connection")
            self._data += chunk

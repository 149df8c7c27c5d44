"""What the integration bridge tells by OpenFlow: statistics, and which flows come and go."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Final

import trio

__all__ = ["AGGREGATE", "METER", "Connection", "multipart", "open_connection"]

AGGREGATE: Final = 2
METER: Final = 9

_HELLO, _ERROR, _ECHO_REQUEST, _ECHO_REPLY, _MULTIPART_REQUEST, _MULTIPART_REPLY = 0, 1, 2, 3, 18, 19
_HEADER = struct.Struct("!BBHI")
_PART = struct.Struct("!HH4x")
_MORE = 1
# In one write; vswitchd answers them in order.
_AT_ONCE = 200


class Connection:
    """Messages of one version of OpenFlow, to and from a bridge."""

    def __init__(self, stream: trio.abc.Stream, version: int) -> None:
        self._stream = stream
        self._version = version
        self._data = bytearray()

    def message(self, kind: int, xid: int, body: bytes) -> bytes:
        """A message as it is sent."""
        return _HEADER.pack(self._version, kind, _HEADER.size + len(body), xid) + body

    async def send(self, *messages: bytes) -> None:
        await self._stream.send_all(b"".join(messages))

    async def next(self) -> tuple[int, int, bytes]:
        """Type, transaction id and body of the next one. What asks whether we are there is answered.

        Raises:
            ValueError: it refuses, has closed the connection, or speaks something else.
        """
        while True:
            await self._fill(_HEADER.size)
            _, kind, length, xid = _HEADER.unpack_from(self._data)
            if length < _HEADER.size:
                raise ValueError("ovs-vswitchd does not speak OpenFlow")
            await self._fill(length)
            body = bytes(self._data[_HEADER.size : length])
            del self._data[:length]
            if kind == _ECHO_REQUEST:
                await self.send(self.message(_ECHO_REPLY, xid, body))
            elif kind == _ERROR:
                raise ValueError(f"ovs-vswitchd refused with OpenFlow error {body[:4].hex()}")
            else:
                return kind, xid, body

    async def _fill(self, size: int) -> None:
        while len(self._data) < size:
            chunk = await self._stream.receive_some(65536)
            if not chunk:
                raise ValueError("ovs-vswitchd closed the connection")
            self._data += chunk


@contextlib.asynccontextmanager
async def open_connection(mgmt: Path, version: int) -> AsyncIterator[Connection]:
    """A connection that speaks a version of OpenFlow, as in its header.

    Args:
        mgmt: where the bridge takes OpenFlow connections.

    Raises:
        OSError, trio.BrokenResourceError: it does not answer.
    """
    async with await trio.open_unix_socket(str(mgmt)) as stream:
        connection = Connection(stream, version)
        await connection.send(connection.message(_HELLO, 0, b""))
        yield connection


async def multipart(mgmt: Path, kind: int, requests: Sequence[bytes]) -> list[bytes]:
    """The answers to requests of one kind, in their order: the bodies after the multipart header, parts put together.
    (OpenFlow 1.3, 7.3.5, "Multipart Messages".)

    Args:
        mgmt: where the bridge takes OpenFlow connections.

    Raises:
        OSError, trio.BrokenResourceError: it does not answer.
        ValueError: it refuses, or speaks something else.
    """
    answers = [b""] * len(requests)
    if not requests:
        return answers
    async with open_connection(mgmt, 4) as connection:
        for first in range(0, len(requests), _AT_ONCE):
            asked = set(range(first, min(first + _AT_ONCE, len(requests))))
            await connection.send(
                *(
                    connection.message(_MULTIPART_REQUEST, number + 1, _PART.pack(kind, 0) + requests[number])
                    for number in sorted(asked)
                )
            )
            while asked:
                message, xid, body = await connection.next()
                if message == _MULTIPART_REPLY and xid - 1 in asked:
                    _, flags = _PART.unpack_from(body)
                    answers[xid - 1] += body[_PART.size :]
                    if not flags & _MORE:
                        asked.discard(xid - 1)
    return answers

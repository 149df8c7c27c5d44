"""The host's side of vsockpeer.c: streams to VMs that run it, and what they measured."""

from __future__ import annotations

import enum
import struct
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import trio

from taploom.address import Address, connect

__all__ = ["PORT", "Operation", "PeerError", "Result", "compile_static", "open_stream", "result"]

PORT: Final = 7000
_REQUEST: Final = struct.Struct("<IIIIQQ")
_RESULT: Final = struct.Struct("<7Q")
_RIGHT: Final = (1 << 64) - 1


class PeerError(Exception):
    """The program in the VM did not do what it was asked for."""


class Operation(enum.IntEnum):
    """What a stream is for; see vsockpeer.c."""

    STREAM = 1
    PING = 2
    ECHO = 3
    RESULT = 4
    JOIN = 5


@dataclass(frozen=True)
class Result:
    """What one end of a stream saw.

    Attributes:
        sent, received: bytes.
        wrong: the offset of the first byte received that is not the pattern's; None: all are right.
        seconds: from the request to the last byte.
        error: errno of the failure that ended it; 0: none.
        p50, p99: round trips in seconds.
    """

    sent: int
    received: int
    wrong: int | None
    seconds: float
    error: int
    p50: float
    p99: float


def compile_static(target: Path) -> Path:
    """Compiles vsockpeer.c to a program that needs nothing else. Raises subprocess.CalledProcessError."""
    source = Path(__file__).with_name("vsockpeer.c")
    subprocess.run(["cc", "-O2", "-Wall", "-static", "-o", str(target), str(source)], check=True)
    return target


async def open_stream(
    address: Address,
    operation: Operation,
    number: int,
    *,
    size: int = 0,
    pause: float = 0,
    send: int = 0,
    receive: int = 0,
    timeout: float = 30,  # noqa: ASYNC109 - part of what connect()'s error says
) -> trio.SocketStream:
    """A stream on which the VM at ``address`` does something; its first byte is the other end's first.

    ``number`` is what its result is asked for by, 0 to 4095; ``pause`` in seconds.
    """
    stream = await connect(address, timeout=timeout)
    # Whoever gives up on it now gives up on a stream that is there, which is nothing special.
    request = _REQUEST.pack(operation, number, size, int(pause * 1e6), send, receive)
    await stream.send_all(request)
    if await stream.receive_some(1) != b"k":
        raise PeerError(f"{address} does not answer as vsockpeer does")
    return stream


async def result(address: Address, number: int) -> Result:
    """What became of the stream with that number, once its job is done."""
    async with await connect(address, timeout=30) as stream:
        await stream.send_all(_REQUEST.pack(Operation.RESULT, number, 0, 0, 0, 0))
        data = b""
        while len(data) < _RESULT.size:
            more = await stream.receive_some(_RESULT.size - len(data))
            if not more:
                raise PeerError(f"{address} gives no result")
            data += more
    sent, received, wrong, nanoseconds, error, p50, p99 = _RESULT.unpack(data)
    return Result(sent, received, None if wrong == _RIGHT else wrong, nanoseconds / 1e9, error, p50 / 1e9, p99 / 1e9)

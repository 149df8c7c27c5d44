"""The dialling side of streams: bytes or datagrams to an address in the helper's networks, over its data port."""

from __future__ import annotations

import errno
import functools
from typing import Final

import trio

from taploom.address import Address, AddressError, connect
from taploom.contracts.taploom.link.v1 import LinkHello, LinkRefusal, LinkReply, StreamProtocol, StreamTarget
from taploom.link.handshake import (
    LINK_VERSION,
    HandshakeError,
    RefusedError,
    check_reply,
    decode_message,
    encode_message,
    ready,
    receive_encoded,
)

__all__ = [
    "STREAM_TIMEOUT",
    "StreamError",
    "StreamUnauthorizedError",
    "StreamUnavailableError",
    "StreamUnreachableError",
    "open_stream",
    "stream_hello",
]

STREAM_TIMEOUT: Final = 15.0
"""Seconds that opening a stream may take; the helper gives its target 10 of them."""


class StreamError(Exception):
    """A stream cannot be opened. ``refusal``: the listener's reason, if it gave one."""

    def __init__(self, message: str, refusal: LinkRefusal | None = None) -> None:
        super().__init__(message)
        self.refusal: Final = refusal


class StreamUnreachableError(StreamError):
    """The target refused, or cannot be reached."""


class StreamUnauthorizedError(StreamError):
    """The secret is not the one of AuthorizeStreams, or the token names nothing that is waited for."""


class StreamUnavailableError(StreamError):
    """The agent cannot carry the stream: it does not answer, has too many, or is older than streams."""


_ERRORS: Final = {
    LinkRefusal.UNREACHABLE: StreamUnreachableError,
    LinkRefusal.UNAUTHORIZED: StreamUnauthorizedError,
    LinkRefusal.UNAVAILABLE: StreamUnavailableError,
    # What an agent says that does not know streams: to it, the endpoint id is missing.
    LinkRefusal.MALFORMED: StreamUnavailableError,
    LinkRefusal.VERSION: StreamUnavailableError,
}


async def open_stream(
    address: Address,
    target: StreamTarget,
    secret: bytes,
    *,
    timeout: float = STREAM_TIMEOUT,  # noqa: ASYNC109 - part of what the error says
) -> trio.SocketStream:
    """Connect to a data port and have the stream joined to ``target``; the next byte in either direction is the
    target's.

    Raises StreamUnreachableError, StreamUnauthorizedError, StreamUnavailableError, or StreamError for an answer that
    makes no sense.
    """
    hello = stream_hello(target.protocol, target.address, target.port, secret, target.token)
    with trio.move_on_after(timeout):
        try:
            stream = await _connect(address)
        except (OSError, AddressError) as error:
            raise StreamUnavailableError(str(error)) from error
        try:
            await stream.send_all(hello)
            reply = await receive_encoded(stream)
            if reply != _READY:
                check_reply(decode_message(LinkReply, reply), ())
        except RefusedError as error:
            await trio.aclose_forcefully(stream)
            raise _ERRORS.get(error.refusal, StreamError)(str(error), error.refusal) from error
        except HandshakeError as error:
            await trio.aclose_forcefully(stream)
            raise StreamError(str(error)) from error
        except trio.BrokenResourceError as error:
            await trio.aclose_forcefully(stream)
            raise StreamUnavailableError(f"{address} closed the stream: {error.__cause__ or error}") from error
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream
    raise StreamUnavailableError(f"{address} did not answer within {timeout:g} s")


# Connections come by the hundred to one target, and making a message takes longer than sending it.
@functools.lru_cache(maxsize=256)
def stream_hello(protocol: StreamProtocol, address: str, port: int, secret: bytes, token: bytes = b"") -> bytes:
    """What is sent to the data port first, encoded."""
    target = StreamTarget(protocol=protocol, address=address, port=port, token=token)
    return encode_message(LinkHello(version=LINK_VERSION, secret=secret, stream=target))


# What nearly every answer is.
_READY: Final = ready(LINK_VERSION, ())[4:]


async def _connect(address: Address) -> trio.SocketStream:
    """As ``connect``, but wait for room in the listener's queue.

    When that is full, connect(2) on a Unix socket that does not block fails with EAGAIN, and the socket then seems
    writable: trio takes it for connected.
    """
    delay = 0.002
    while True:
        stream = await connect(address)
        try:
            stream.socket.getpeername()
        except OSError as error:
            stream.socket.close()
            if error.errno != errno.ENOTCONN:
                raise
        else:
            return stream
        await trio.sleep(delay)
        delay = min(2 * delay, 0.1)

"""The data link's handshake: what is said before the first frame.

Each message is a 4-byte big-endian length and that many bytes of protobuf (``taploom.link.v1``), 1 to 4096 of them.
The side that dialled sends one LinkHello; the side that listened answers with one LinkReply: ``ready``, after
which frames follow in both directions, or ``refused``, after which it closes the stream. Nothing may follow the
hello before the reply is there. The listener gives a dialler 10 s for its hello.

Encoding and decoding are sans-IO; ``receive_message`` reads exactly one message, so that the frames behind
it stay in the stream.
"""

from __future__ import annotations

import functools
import ipaddress
import re
import struct
from collections.abc import Iterable
from typing import Final, TypeVar

import betterproto2
import trio

from taploom.contracts.taploom.link.v1 import (
    LinkFeature,
    LinkHello,
    LinkReady,
    LinkRefusal,
    LinkRefused,
    LinkReply,
    StreamProtocol,
    StreamTarget,
)
from taploom.rpc.wirecheck import WireError, parse_strict

__all__ = [
    "HELLO_TIMEOUT",
    "LINK_VERSION",
    "MAX_MESSAGE",
    "HandshakeError",
    "RefusedError",
    "check_hello",
    "check_reply",
    "decode_length",
    "decode_message",
    "encode_message",
    "negotiate",
    "ready",
    "receive_encoded",
    "receive_message",
    "refused",
]

LINK_VERSION: Final = 1
"""The newest link contract that this code speaks."""
MAX_MESSAGE: Final = 4096
"""Bytes that a handshake message has at most."""
HELLO_TIMEOUT: Final = 10.0
"""Seconds that a dialler has for its hello."""
MIN_SECRET: Final = 16
MAX_SECRET: Final = 64
_MAX_REASON: Final = 200
_ENDPOINT_ID: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_LENGTH: Final = struct.Struct(">I")

M = TypeVar("M", bound=betterproto2.Message)


class HandshakeError(Exception):
    """The peer's side of the handshake is not valid; ``refusal`` is what a listener answers."""

    def __init__(self, message: str, refusal: LinkRefusal = LinkRefusal.MALFORMED) -> None:
        super().__init__(message)
        self.refusal: Final = refusal


class RefusedError(Exception):
    """The listener refused the link; ``refusal`` is its reason."""

    def __init__(self, message: str, refusal: LinkRefusal) -> None:
        super().__init__(message)
        self.refusal: Final = refusal


def encode_message(message: betterproto2.Message) -> bytes:
    """The message with its length before it. Raises ValueError when it is larger than MAX_MESSAGE."""
    data = bytes(message)
    if not 1 <= len(data) <= MAX_MESSAGE:
        raise ValueError(f"a handshake message has 1 to {MAX_MESSAGE} bytes, not {len(data)}")
    return _LENGTH.pack(len(data)) + data


def decode_length(prefix: bytes) -> int:
    """The size that a message's first 4 bytes announce. Raises HandshakeError."""
    (length,) = _LENGTH.unpack(prefix)
    if not 1 <= length <= MAX_MESSAGE:
        raise HandshakeError(f"handshake message of {length} bytes: 1 to {MAX_MESSAGE} are allowed")
    return int(length)


def decode_message(message_type: type[M], data: bytes) -> M:
    """Parse a message's bytes (without the length), strictly. Raises HandshakeError."""
    try:
        return parse_strict(message_type, data)
    except WireError as error:
        raise HandshakeError(f"not a valid {message_type.__name__}: {error}") from error


def check_hello(hello: LinkHello) -> None:
    """Check a hello's fields, but not who it is. Raises HandshakeError."""
    if hello.version < 1:
        raise HandshakeError(f"link version {hello.version}: at least 1 is needed", LinkRefusal.VERSION)
    if not MIN_SECRET <= len(hello.secret) <= MAX_SECRET:
        raise HandshakeError(f"the secret has {len(hello.secret)} bytes, not {MIN_SECRET} to {MAX_SECRET}")
    if hello.stream is not None:
        if hello.endpoint_id or hello.features:
            raise HandshakeError("a stream has neither an endpoint id nor features")
        _check_target(hello.stream)
        return
    if not _ENDPOINT_ID.fullmatch(hello.endpoint_id):
        raise HandshakeError("the endpoint id is not 1 to 64 characters of [a-zA-Z0-9_.-]")
    if len(hello.features) > 64:
        raise HandshakeError(f"{len(hello.features)} features: at most 64 are allowed")


def _check_target(target: StreamTarget) -> None:
    if target.protocol not in (StreamProtocol.TCP, StreamProtocol.UDP, StreamProtocol.TCP_RECORDS):
        # One that is newer than this code is no fault of the dialler's.
        missing = target.protocol == StreamProtocol.UNSPECIFIED
        refusal = LinkRefusal.MALFORMED if missing else LinkRefusal.UNAVAILABLE
        raise HandshakeError(f"stream protocol {int(target.protocol)} is not served here", refusal)
    if bool(target.address) == bool(target.token):
        raise HandshakeError("a stream needs exactly one of address and token")
    if target.token:
        if not MIN_SECRET <= len(target.token) <= MAX_SECRET:
            raise HandshakeError(f"the token has {len(target.token)} bytes, not {MIN_SECRET} to {MAX_SECRET}")
        if target.port:
            raise HandshakeError("a stream that was asked for has a token, and no port")
        return
    try:
        address = ipaddress.ip_address(target.address)
    except ValueError as error:
        raise HandshakeError("the stream's address is not an IP address") from error
    if address.is_multicast or address.is_unspecified or "%" in target.address:
        raise HandshakeError("the stream's address is not that of one host")
    if not 1 <= target.port <= 65535:
        raise HandshakeError(f"port {target.port} is not 1 to 65535")


def negotiate(wanted: Iterable[LinkFeature], supported: Iterable[LinkFeature]) -> frozenset[LinkFeature]:
    """The features of a link: those wanted and supported, and none without VNET_HDR if that is not among them."""
    both = frozenset(wanted) & frozenset(supported) & _KNOWN
    return both if LinkFeature.VNET_HDR in both else frozenset()


_KNOWN: Final = frozenset({LinkFeature.VNET_HDR, LinkFeature.TSO, LinkFeature.USO})


def ready(version: int, features: Iterable[LinkFeature]) -> bytes:
    """The encoded reply that accepts a link."""
    return _ready(version, tuple(sorted(features)))


@functools.cache
def _ready(version: int, features: tuple[LinkFeature, ...]) -> bytes:
    return encode_message(LinkReply(ready=LinkReady(version=version, features=list(features))))


def refused(reason: LinkRefusal, message: str) -> bytes:
    """The encoded reply that refuses a link."""
    return encode_message(LinkReply(refused=LinkRefused(reason=reason, message=message[:_MAX_REASON])))


def check_reply(reply: LinkReply, wanted: Iterable[LinkFeature]) -> frozenset[LinkFeature]:
    """The features of the link that ``reply`` accepts.

    Raises RefusedError when it refuses, HandshakeError when it grants what was not wanted or does not fit together.
    """
    if reply.refused is not None:
        # Its text comes from the peer: kept short and printable.
        text = "".join(c if c.isprintable() else "?" for c in reply.refused.message[:_MAX_REASON])
        name = reply.refused.reason.name or str(int(reply.refused.reason))
        raise RefusedError(f"link refused ({name}): {text or 'no reason given'}", reply.refused.reason)
    if reply.ready is None:
        raise HandshakeError("the reply is neither ready nor refused")
    if reply.ready.version != LINK_VERSION:
        raise HandshakeError(f"the reply has link version {reply.ready.version}, not {LINK_VERSION}")
    granted = frozenset(reply.ready.features)
    if not granted <= frozenset(wanted):
        raise HandshakeError("the reply grants features that were not asked for")
    if granted != negotiate(granted, granted):
        raise HandshakeError("the reply grants features without VNET_HDR, which they need")
    return granted


async def receive_message(stream: trio.abc.ReceiveStream, message_type: type[M]) -> M:
    """Read exactly one message, and no byte beyond it. Raises HandshakeError, trio.BrokenResourceError."""
    return decode_message(message_type, await receive_encoded(stream))


async def receive_encoded(stream: trio.abc.ReceiveStream) -> bytes:
    """Read exactly one message's bytes, without its length. Raises HandshakeError, trio.BrokenResourceError."""
    length = decode_length(await _receive_exactly(stream, _LENGTH.size))
    return await _receive_exactly(stream, length)


async def _receive_exactly(stream: trio.abc.ReceiveStream, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = await stream.receive_some(size - len(data))
        if not chunk:
            raise HandshakeError(f"the peer closed the stream after {len(data)} of {size} bytes of its message")
        data += chunk
    return bytes(data)

"""One query to one server and its reply, over UDP or TCP, each time from a fresh port with a fresh id (RFC 5452)."""

from __future__ import annotations

import random
import socket as stdlib
from collections.abc import Sequence

import trio

from . import wire

_ids = random.SystemRandom()
_RETRY_DELAYS = (0.05, 0.1, 0.2, 0.3, 0.5)
"""Seconds between the tries of a query to a network's server, which is near: a lost one costs little."""


async def exchange_udp(query: bytes, address: tuple[str, int], *, interface: str = "") -> bytes | None:
    """The server's reply to the query over UDP, with the query's id; None when the server refuses. May wait for ever.

    ``interface``: the query leaves over it, whatever the routes say (SO_BINDTODEVICE).
    """
    sent = wire.with_id(query, _ids.getrandbits(16))
    try:
        with await _connect(address, stdlib.SOCK_DGRAM, interface) as socket:
            await socket.send(sent)
            return wire.with_id(await _matching(socket, sent), int.from_bytes(query[:2], "big"))
    except OSError:
        return None


async def exchange_tcp(query: bytes, address: tuple[str, int], *, interface: str = "") -> bytes | None:
    """The same over TCP."""
    sent = wire.with_id(query, _ids.getrandbits(16))
    try:
        with await _connect(address, stdlib.SOCK_STREAM, interface) as socket:
            stream = trio.SocketStream(socket)
            await stream.send_all(len(sent).to_bytes(2, "big") + sent)
            reply = await receive_framed(stream)
    except (OSError, trio.BrokenResourceError):
        return None
    if reply is None or not wire.answers_to(sent, reply):
        return None
    return wire.with_id(reply, int.from_bytes(query[:2], "big"))


async def ask_network(query: bytes, servers: Sequence[str], interface: str) -> bytes:
    """The first reply of a network's servers, asked again and again until one answers. Waits for ever otherwise.

    Every try is a query of its own (a new socket, so a new route): the link or the server may come back meanwhile.
    """
    attempt = 0
    while True:
        server = servers[attempt % len(servers)]
        delay = _RETRY_DELAYS[min(attempt, len(_RETRY_DELAYS) - 1)]
        again = trio.current_time() + delay
        with trio.move_on_at(again):
            reply = await exchange_udp(query, (server, 53), interface=interface)
            if reply is not None and wire.is_truncated(reply):
                with trio.move_on_after(1.0):
                    reply = await exchange_tcp(query, (server, 53), interface=interface) or reply
            if reply is not None:
                return reply
        attempt += 1
        await trio.sleep_until(again)


async def receive_framed(stream: trio.SocketStream, buffer: bytearray | None = None) -> bytes | None:
    """The next length-prefixed message (RFC 1035, 4.2.2); None at the end. ``buffer`` keeps what was read beyond it."""
    buffer = bytearray() if buffer is None else buffer
    while True:
        if len(buffer) >= 2:
            length = int.from_bytes(buffer[:2], "big")
            if len(buffer) >= 2 + length:
                message = bytes(buffer[2 : 2 + length])
                del buffer[: 2 + length]
                return message
        data = await stream.receive_some(16384)
        if not data:
            return None
        buffer += data


async def _matching(socket: trio.socket.SocketType, sent: bytes) -> bytes:
    """The first datagram that is a reply to what was sent; others are ignored, as a forger's must be."""
    while True:
        reply = await socket.recv(wire.MESSAGE_MAX)
        if wire.answers_to(sent, reply):
            return reply


async def _connect(address: tuple[str, int], kind: stdlib.SocketKind, interface: str) -> trio.socket.SocketType:
    # A connected UDP socket takes datagrams from this server only, and hears of ICMP errors.
    host, _, scope = address[0].partition("%")
    target: tuple[object, ...] = (host, address[1])
    family = stdlib.AF_INET
    if ":" in host:
        family = stdlib.AF_INET6
        name = scope or (interface if host.lower().startswith("fe80") else "")
        target = (host, address[1], 0, _scope_id(name))
    socket = trio.socket.socket(family, kind | stdlib.SOCK_CLOEXEC)
    try:
        if interface:
            socket.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_BINDTODEVICE, interface.encode())
        await socket.connect(target)
    except BaseException:
        socket.close()
        raise
    return socket


def _scope_id(name: str) -> int:
    if not name:
        return 0
    return int(name) if name.isdecimal() else stdlib.if_nametoindex(name)

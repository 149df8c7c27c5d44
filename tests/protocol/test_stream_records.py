"""Streams over a transport that cannot close one direction alone: in records."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from taploom.address import set_buffers
from taploom.link.dataplane import Dataplane, open_dataplane
from taploom.link.splice import Splice

MIB = 1 << 20


def pair() -> tuple[socket.socket, socket.socket]:
    first, second = socket.socketpair()
    for sock in (first, second):
        sock.setblocking(False)
    return first, second


def stream(sock: socket.socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


class Joined:
    """client - splice - carrier - splice - server, the carrier in records."""

    def __init__(self, plane: Dataplane) -> None:
        self.ends: list[str] = []
        client, near = pair()
        first, second = pair()
        far, server = pair()
        self.client, self.server = stream(client), stream(server)
        self.carrier = (first, second)
        plane.attach(lambda loop, end: Splice(loop, near, first, end, records=first), self.ends.append)
        plane.attach(lambda loop, end: Splice(loop, second, far, end, records=second), self.ends.append)


@asynccontextmanager
async def joined() -> AsyncIterator[Joined]:
    with trio.fail_after(20):
        async with open_dataplane() as plane:
            both = Joined(plane)
            yield both
            await both.client.aclose()
            await both.server.aclose()


async def drain(source: trio.SocketStream) -> bytes:
    data = bytearray()
    while more := await source.receive_some(65536):
        data += more
    return bytes(data)


@pytest.mark.parametrize("size", [0, 1, 5, 128 * 1024, 3 * MIB + 7])
async def test_each_direction_ends_by_itself(size: int) -> None:
    request, response = bytes(range(256)) * (size // 256) + bytes(size % 256), b"response" * (size + 1)
    async with joined() as both, trio.open_nursery() as nursery:

        async def serve() -> None:
            assert await drain(both.server) == request
            await both.server.send_all(response)
            await both.server.send_eof()

        nursery.start_soon(serve)
        await both.client.send_all(request)
        await both.client.send_eof()
        assert await drain(both.client) == response
        while len(both.ends) < 2:
            await trio.sleep(0.01)
        assert both.ends == ["", ""]


async def test_the_server_ends_first() -> None:
    async with joined() as both:
        await both.server.send_all(b"hello")
        await both.server.send_eof()
        assert await drain(both.client) == b"hello"
        await both.client.send_all(b"still there")
        await both.client.send_eof()
        assert await drain(both.server) == b"still there"


async def test_a_slow_reader_gets_everything() -> None:
    async with joined() as both, trio.open_nursery() as nursery:
        set_buffers(both.client.socket)

        async def send() -> None:
            await both.client.send_all(bytes(4 * MIB))
            await both.client.send_eof()

        nursery.start_soon(send)
        received = 0
        while more := await both.server.receive_some(3000):
            received += len(more)
        assert received == 4 * MIB


@pytest.mark.parametrize(
    ("sent", "reason"),
    [
        (b"", "the stream broke off"),
        (b"\0\0", "the stream broke off"),
        (b"\0\0\0\x05ab", "the stream broke off"),
        (b"\0\x20\0\0", "a record of 2097152 bytes: 1048576 are allowed"),
        (b"\0\0\0\0x", "something follows the end of a stream"),
    ],
)
async def test_what_is_not_records_breaks_the_connection(sent: bytes, reason: str) -> None:
    with trio.fail_after(20):
        async with open_dataplane() as plane:
            ends: list[str] = []
            client, near = pair()
            carrier, peer = pair()
            plane.attach(lambda loop, end: Splice(loop, near, carrier, end, records=carrier), ends.append)
            peer.send(sent)
            if "follows" not in reason:
                peer.close()
            while not ends:
                await trio.sleep(0.01)
            assert ends == [reason]
            client.close()
            peer.close()


async def test_bytes_before_the_break_arrive() -> None:
    with trio.fail_after(20):
        async with open_dataplane() as plane:
            client, near = pair()
            carrier, peer = pair()
            plane.attach(lambda loop, end: Splice(loop, near, carrier, end, records=carrier), lambda _reason: None)
            for piece in (b"\0", b"\0\0", b"\x03a", b"b", b"c\0\0\0\x02de"):
                peer.send(piece)
                await trio.sleep(0.01)
            async with stream(client) as reader:
                assert (await reader.receive_some(100))[:3] == b"abc"
            peer.close()

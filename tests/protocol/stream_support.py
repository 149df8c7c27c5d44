"""A helper agent's stream server in this process, and local servers for it to dial."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import trio

from agent_helper.streams import Streams
from taploom.address import HybridAddress, UnixAddress, connect, open_listener
from taploom.contracts.taploom.helper.v1 import StreamWanted
from taploom.contracts.taploom.link.v1 import StreamProtocol, StreamTarget
from taploom.link import Dataplane, LinkServer, new_secret, open_dataplane, open_stream

TCP, UDP = StreamProtocol.TCP, StreamProtocol.UDP


async def until(condition: Callable[[], bool], *, within: float = 60.0) -> None:
    """Wait for a condition; TooSlowError when it does not come true."""
    with trio.fail_after(within):
        while not condition():
            await trio.sleep(0.002)


@dataclass
class Helper:
    """The agent's side."""

    address: UnixAddress
    streams: Streams
    server: LinkServer
    plane: Dataplane
    secret: bytes = field(default_factory=new_secret)
    wanted: list[StreamWanted] = field(default_factory=list)

    def target(self, port: int, protocol: StreamProtocol = TCP, address: str = "127.0.0.1") -> StreamTarget:
        return StreamTarget(protocol=protocol, address=address, port=port)

    async def open(self, port: int, protocol: StreamProtocol = TCP, address: str = "127.0.0.1") -> trio.SocketStream:
        return await open_stream(self.address, self.target(port, protocol, address), self.secret)


@asynccontextmanager
async def open_helper(
    directory: Path, *, udp_idle: float = 90.0, max_streams: int = 4096, hello_timeout: float = 10.0
) -> AsyncIterator[Helper]:
    """A stream server on a Unix socket, with its secret given."""
    address = UnixAddress(str(directory / "data.sock"))
    wanted: list[StreamWanted] = []

    def want(event: StreamWanted) -> bool:
        wanted.append(event)
        return True

    async with open_dataplane() as plane, trio.open_nursery() as nursery:
        streams = Streams(plane, want, transparent=False, udp_idle=udp_idle, max_streams=max_streams)
        server = LinkServer(
            plane,
            features=(),
            on_up=lambda *_: None,
            on_down=lambda *_: None,
            on_stream=streams.handle,
            max_handshakes=1024,
            hello_timeout=hello_timeout,
        )
        await nursery.start(server.serve, await open_listener(address))
        await nursery.start(streams.run)
        helper = Helper(address, streams, server, plane, wanted=wanted)
        streams.authorize(helper.secret)
        yield helper
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def tcp_server(
    handler: Callable[[trio.SocketStream], Awaitable[None]], *, host: str = "127.0.0.1"
) -> AsyncIterator[int]:
    """Serve each connection with the handler; yields the port."""
    listeners = await trio.open_tcp_listeners(0, host=host)
    async with trio.open_nursery() as nursery:

        async def serve(stream: trio.SocketStream) -> None:
            async with stream:
                with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await handler(stream)

        await nursery.start(trio.serve_listeners, serve, listeners)
        yield listeners[0].socket.getsockname()[1]
        nursery.cancel_scope.cancel()


async def echo(stream: trio.SocketStream) -> None:
    """Send everything back, and the end of file too."""
    async for data in stream:
        await stream.send_all(data)
    await stream.send_eof()


@asynccontextmanager
async def hybrid_front(directory: Path, behind: UnixAddress) -> AsyncIterator[HybridAddress]:
    """A VMM's Unix socket (Firecracker's hybrid vsock) before a data port: the end of one direction is that of both."""
    path = directory / "vmm.sock"

    async def copy(source: trio.SocketStream, target: trio.SocketStream, end: trio.CancelScope) -> None:
        async for data in source:
            await target.send_all(data)
        end.cancel()

    async def serve(front: trio.SocketStream) -> None:
        line = b""
        while not line.endswith(b"\n"):
            line += await front.receive_some(1)
        assert line == b"CONNECT 6001\n"
        async with front, await connect(behind) as back:
            await front.send_all(b"OK 1\n")
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(copy, front, back, nursery.cancel_scope)
                    nursery.start_soon(copy, back, front, nursery.cancel_scope)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [await open_listener(UnixAddress(str(path)))])
        yield HybridAddress(str(path), 6001)
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def udp_server(
    answer: Callable[[bytes], bytes | None], *, host: str = "127.0.0.1"
) -> AsyncIterator[tuple[int, list[tuple[str, int]]]]:
    """Answer each datagram; yields the port and the list of peers seen."""
    peers: list[tuple[str, int]] = []
    with trio.socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
        await sock.bind((host, 0))

        async def serve() -> None:
            while True:
                data, peer = await sock.recvfrom(65536)
                if peer[:2] not in peers:
                    peers.append(peer[:2])
                reply = answer(data)
                if reply is not None:
                    await sock.sendto(reply, peer)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield sock.getsockname()[1], peers
            nursery.cancel_scope.cancel()


def is_reset(sock: socket.socket) -> bool:
    """Whether the peer reset the connection: reading fails, and does not end."""
    try:
        while sock.recv(65536):
            pass
    except ConnectionResetError:
        return True
    return False

"""Published ports and access to the host over a real helper: OVN's routers, nftables, and guests behind their links."""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from test_helper_egress import UPLINK, join, outgoing
from test_helper_rig import Guest, Rig, eventually, helper, in_netns, sh

from host_bridge.ports import PortBinding, PortPublisher
from taploom.address import Address
from taploom.contracts.taploom.helper.v1 import (
    ApplyUplinkRequest,
    AuthorizeStreamsRequest,
    GetInfoRequest,
    HelperFeature,
    RefuseStreamRequest,
    WatchEventsRequest,
)
from taploom.contracts.taploom.link.v1 import StreamProtocol
from taploom.link import new_secret

pytestmark = pytest.mark.system


class Peer:
    """The publisher's helper: the rig's."""

    def __init__(self, rig: Rig, secret: bytes) -> None:
        self._rig = rig
        self.stream_secret: bytes | None = secret

    @property
    def data_address(self) -> Address:
        return self._rig.data

    @property
    def tcp_protocol(self) -> StreamProtocol:
        return StreamProtocol.TCP

    async def streams_ready(self) -> None:
        while self.stream_secret is None:
            await trio.sleep(0.002)

    async def refuse_stream(self, token: bytes) -> None:
        await self._rig.client.refuse_stream(RefuseStreamRequest(token=token))


@dataclass
class Published:
    """A helper with two networks, and the host's side of its streams."""

    rig: Rig
    publisher: PortPublisher


@contextlib.asynccontextmanager
async def published() -> AsyncIterator[Published]:
    async with helper() as rig, trio.open_nursery() as nursery:
        assert HelperFeature.STREAMS in (await rig.client.get_info(GetInfoRequest())).features
        await rig.client.apply_uplink(ApplyUplinkRequest(uplink=UPLINK), timeout=20)
        secret = new_secret()
        await rig.client.authorize_streams(AuthorizeStreamsRequest(secret=secret))
        gateways = {f"10.77.{n}.1" for n in (1, 2)} | {f"fd00:77:{n}::1" for n in (1, 2)}
        publisher = PortPublisher(Peer(rig, secret), rig.dataplane, is_gateway=gateways.__contains__)
        await nursery.start(publisher.run)

        async def watch(task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
            async with rig.client.watch_events(WatchEventsRequest()) as events:
                async for event in events:
                    if event.started is not None:
                        task_status.started()
                    elif event.stream_wanted is not None:
                        publisher.stream_wanted(event.stream_wanted)

        await nursery.start(watch)
        await rig.apply(outgoing(1), outgoing(2))
        yield Published(rig, publisher)
        nursery.cancel_scope.cancel()


def make_socket(
    netns: str, address: str, port: int, kind: socket.SocketKind = socket.SOCK_STREAM
) -> trio.socket.SocketType:
    """A bound socket in a namespace; TCP ones listen."""

    def make() -> socket.socket:
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, kind)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setblocking(False)
        sock.bind((address, port))
        if kind == socket.SOCK_STREAM:
            sock.listen(512)
        return sock

    return trio.socket.from_stdlib_socket(in_netns(netns, make))


@contextlib.asynccontextmanager
async def server(
    guest: Guest | None, port: int, handler: Callable[[trio.SocketStream], Awaitable[None]], address: str = "0.0.0.0"
) -> AsyncIterator[int]:
    """A TCP server in a guest, or on this machine; yields its port."""
    if guest is None:
        listener = trio.socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
        await listener.bind((address, port))
        listener.listen(64)
    else:
        listener = await trio.to_thread.run_sync(make_socket, guest.netns, address, port)

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await handler(stream)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, serve, [trio.SocketListener(listener)])
        yield listener.getsockname()[1]
        nursery.cancel_scope.cancel()


async def http(stream: trio.SocketStream) -> None:
    """Answers a request with the address that it seems to come from."""
    await stream.receive_some(65536)
    peer = stream.socket.getpeername()[0].encode()
    await stream.send_all(b"HTTP/1.0 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(peer), peer))


async def echo(stream: trio.SocketStream) -> None:
    async for data in stream:
        await stream.send_all(data)


async def curl(url: str, *options: str) -> str:
    done = await trio.run_process(["curl", "-gsS", "-m", "10", *options, url], capture_stdout=True, check=False)
    return bytes(done.stdout).decode() if done.returncode == 0 else f"exit {done.returncode}"


async def test_published_ports_reach_the_guest_from_its_gateway() -> None:
    async with published() as fabric:
        web = await join(fabric.rig, 1, 2)
        async with server(web, 80, http), server(web, 80, http, "fd00:77:1::2"):
            port = fabric.publisher.publish("web", [PortBinding(80)])[0].host_port
            fabric.publisher.set_target("web", ["10.77.1.2/24"])
            assert await curl(f"http://127.0.0.1:{port}/") == "10.77.1.1", fabric.rig.log()
            assert await curl(f"http://[::1]:{port}/") == "10.77.1.1"
            fabric.publisher.set_target("web", ["10.77.1.2/24", "fd00:77:1::2/64"])
            assert await curl(f"http://[::1]:{port}/") == "fd00:77:1::1"
            assert await curl(f"http://127.0.0.1:{port}/") == "10.77.1.1"
            # Moved to another network, and then nowhere.
            other = await join(fabric.rig, 2, 2)
            async with server(other, 80, http):
                fabric.publisher.set_target("web", ["10.77.2.2/24"])
                assert await curl(f"http://127.0.0.1:{port}/") == "10.77.2.1"
            # Nobody listens in there. A reset that comes before curl looks again is 7 ("couldn't connect") to it.
            assert await curl(f"http://127.0.0.1:{port}/") in ("exit 56", "exit 52", "exit 7")
            fabric.publisher.set_target("web", [])
            assert await curl(f"http://127.0.0.1:{port}/") in ("exit 56", "exit 52", "exit 7")
        fabric.publisher.release("web")
        assert await curl(f"http://127.0.0.1:{port}/") == "exit 7"


async def test_udp_both_families() -> None:
    async with published() as fabric:
        guest = await join(fabric.rig, 1, 2)
        seen: list[str] = []

        async def answer(sock: trio.socket.SocketType) -> None:
            while True:
                data, peer = await sock.recvfrom(65536)
                seen.append(peer[0])
                await sock.sendto(data.upper(), peer)

        async with trio.open_nursery() as nursery:
            for address in ("10.77.1.2", "fd00:77:1::2"):
                sock = await trio.to_thread.run_sync(make_socket, guest.netns, address, 53, socket.SOCK_DGRAM)
                nursery.start_soon(answer, sock)
            port = fabric.publisher.publish("dns", [PortBinding(53, "udp")])[0].host_port
            fabric.publisher.set_target("dns", ["10.77.1.2", "fd00:77:1::2"])
            for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
                with trio.socket.socket(family, socket.SOCK_DGRAM) as client:
                    for data in (b"small", b"x" * 9000):
                        assert await answered(client, data, host, port) == data.upper()
            assert set(seen) == {"10.77.1.1", "fd00:77:1::1"}
            nursery.cancel_scope.cancel()


async def answered(client: trio.socket.SocketType, data: bytes, host: str, port: int) -> bytes:
    """The answer to a datagram that is sent until there is one."""
    with trio.fail_after(60):
        while True:
            await client.sendto(data, (host, port))
            with trio.move_on_after(1):
                return (await client.recvfrom(65536))[0]


async def test_many_connections_leak_nothing() -> None:
    async with published() as fabric:
        guest = await join(fabric.rig, 1, 2)
        async with server(guest, 80, echo):
            port = fabric.publisher.publish("web", [PortBinding(80)])[0].host_port
            fabric.publisher.set_target("web", ["10.77.1.2"])
            limiter = trio.Semaphore(32)

            async def one(number: int) -> None:
                async with limiter, await trio.open_tcp_stream("127.0.0.1", port) as stream:
                    await stream.send_all(b"%d" % number)
                    assert await stream.receive_some() == b"%d" % number
                    if number % 2:
                        await stream.send_eof()
                        assert await stream.receive_some() == b""

            async def many(count: int) -> None:
                async with trio.open_nursery() as nursery:
                    for number in range(count):
                        nursery.start_soon(one, number)
                await eventually(lambda: fabric.publisher.connections == 0)

            def descriptors() -> tuple[int, int]:
                assert fabric.rig.process is not None
                processes = (os.getpid(), fabric.rig.process.pid)
                ours, helpers = (sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir()) for pid in processes)
                return ours, helpers

            await many(20)
            await fabric.rig.counted()  # spare TAPs have descriptors too
            before = descriptors()
            await many(1000)
            await eventually(lambda: all(now <= then for now, then in zip(descriptors(), before, strict=True)))


async def test_guest_that_vanishes_hinders_nothing() -> None:
    async with published() as fabric:
        guest = await join(fabric.rig, 1, 2)
        async with server(guest, 80, echo):
            port = fabric.publisher.publish("web", [PortBinding(80)])[0].host_port
            fabric.publisher.set_target("web", ["10.77.1.2"])
            stream = await trio.open_tcp_stream("127.0.0.1", port)
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
            await fabric.rig.dataplane.stop(guest.link_id)
        fabric.publisher.release("web")
        with pytest.raises(trio.BrokenResourceError):
            await stream.receive_some()
        await stream.aclose()
        again = fabric.publisher.publish("other", [PortBinding(80, host_port=port)])
        assert again[0].host_port == port


async def test_guest_reaches_services_of_the_host() -> None:
    async with published() as fabric:
        guest = await join(fabric.rig, 1, 2)
        async with server(None, 0, http, "127.0.0.1") as port:
            url = f"http://10.77.1.1:{port}/"
            assert await trio.to_thread.run_sync(in_guest, guest, url) == "127.0.0.1", fabric.rig.log()
            # Whichever network's gateway: it is the host.
            assert await trio.to_thread.run_sync(in_guest, guest, f"http://10.77.2.1:{port}/") == "127.0.0.1"
        assert await trio.to_thread.run_sync(in_guest, guest, url) in ("exit 56", "exit 7")
        async with server(None, 0, http, "::1") as port:
            assert await trio.to_thread.run_sync(in_guest, guest, f"http://[fd00:77:1::1]:{port}/") == "::1"
        assert guest.ping("10.77.1.1")


async def test_guest_reaches_the_hosts_datagram_services() -> None:
    async with published() as fabric, trio.open_nursery() as nursery:
        guest = await join(fabric.rig, 1, 2)
        with trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as service:
            await service.bind(("127.0.0.1", 0))
            port = service.getsockname()[1]

            async def answer() -> None:
                while True:
                    data, peer = await service.recvfrom(65536)
                    await service.sendto(data.upper(), peer)

            nursery.start_soon(answer)
            client = await trio.to_thread.run_sync(make_socket, guest.netns, "10.77.1.2", 0, socket.SOCK_DGRAM)
            with client:
                for data in (b"one", b"two"):
                    await client.sendto(data, ("10.77.1.1", port))
                    with trio.fail_after(60):
                        reply, peer = await client.recvfrom(65536)
                    assert (reply, peer) == (data.upper(), ("10.77.1.1", port))
            nursery.cancel_scope.cancel()


async def test_published_port_is_reached_from_another_network() -> None:
    """The way that Docker's networks have to one another: over the host."""
    async with published() as fabric:
        web = await join(fabric.rig, 1, 2)
        client = await join(fabric.rig, 2, 2)
        async with server(web, 80, http):
            port = fabric.publisher.publish("web", [PortBinding(80)])[0].host_port
            fabric.publisher.set_target("web", ["10.77.1.2"])
            url = f"http://10.77.2.1:{port}/"
            assert await trio.to_thread.run_sync(in_guest, client, url) == "10.77.1.1", fabric.rig.log()
            fabric.publisher.release("web")
            assert await trio.to_thread.run_sync(in_guest, client, url) in ("exit 56", "exit 7")


def in_guest(guest: Guest, url: str) -> str:
    """As curl, in the guest."""
    command = ["ip", "netns", "exec", guest.netns, "sh", "-c", f"curl -gsS -m 10 '{url}' || echo exit $?"]
    return sh(*command).strip()

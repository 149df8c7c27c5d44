"""Published ports over a helper's stream server: real sockets on both sides, the containers are local servers."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio

from agent_helper.streams import _Carrier
from host_bridge.ports import PortAllocatedError, PortBinding, PortPublisher
from taploom.address import Address, HybridAddress, UnixAddress, open_listener
from taploom.contracts.taploom.helper.v1 import StreamWanted
from taploom.contracts.taploom.link.v1 import StreamProtocol, StreamTarget
from taploom.link import Dataplane, StreamError, open_dataplane, open_stream
from taploom.link.connections import ConnectionServer
from tests.protocol.stream_support import (
    Helper,
    echo,
    hybrid_front,
    is_reset,
    open_helper,
    tcp_server,
    udp_server,
    until,
)

GATEWAY = "172.18.0.1"


class HelperPeer:
    """What the publisher sees of a helper."""

    def __init__(self, helper: Helper) -> None:
        self._helper = helper
        self.front: Address | None = None
        self.stream_secret: bytes | None = helper.secret
        self.refused: list[bytes] = []

    @property
    def data_address(self) -> Address:
        return self.front or self._helper.address

    @property
    def tcp_protocol(self) -> StreamProtocol:
        hybrid = isinstance(self.data_address, HybridAddress)
        return StreamProtocol.TCP_RECORDS if hybrid else StreamProtocol.TCP

    async def streams_ready(self) -> None:
        while self.stream_secret is None:
            await trio.sleep(0.002)

    async def refuse_stream(self, token: bytes) -> None:
        self.refused.append(token)
        self._helper.streams.refuse(token)


@dataclass
class Rig:
    helper: Helper
    peer: HelperPeer
    publisher: PortPublisher
    plane: Dataplane


@asynccontextmanager
async def open_rig(directory: Path, *, udp_idle: float = 90.0, front: Address | None = None) -> AsyncIterator[Rig]:
    async with (
        open_helper(directory) as helper,
        open_dataplane() as plane,
        trio.open_nursery() as nursery,
    ):
        peer = HelperPeer(helper)
        peer.front = front
        publisher = PortPublisher(peer, plane, is_gateway=lambda address: address == GATEWAY, udp_idle=udp_idle)
        await nursery.start(publisher.run)
        yield Rig(helper, peer, publisher, plane)
        nursery.cancel_scope.cancel()


async def ask(host: str, port: int, data: bytes) -> bytes:
    """What comes back until the end, from an echo server."""
    async with await trio.open_tcp_stream(host, port) as stream:
        await stream.send_all(data)
        await stream.send_eof()
        return b"".join([part async for part in stream])


def client(family: int = socket.AF_INET) -> trio.socket.SocketType:
    return trio.socket.socket(family, socket.SOCK_DGRAM)


async def exchange(sock: trio.socket.SocketType, data: bytes, host: str, port: int) -> tuple[bytes, str]:
    """Send a datagram until it is answered; the answer and where it came from."""
    while True:
        await sock.sendto(data, (host, port))
        with trio.move_on_after(0.5):
            reply, peer = await sock.recvfrom(65536)
            return reply, peer[0]


async def connection_fails(port: int, host: str = "127.0.0.1") -> bool:
    try:
        async with await trio.open_tcp_stream(host, port) as stream:
            return await stream.receive_some(1) == b""
    except (OSError, trio.BrokenResourceError):
        return True


async def test_tcp(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig, tcp_server(echo) as target:
        published = rig.publisher.publish("web", [PortBinding(target)])
        assert rig.publisher.published("web") == published
        assert {port.host_ip for port in published} == {"0.0.0.0", "::"}
        (port,) = {port.host_port for port in published}
        rig.publisher.set_target("web", ["127.0.0.1/16"])
        assert await ask("127.0.0.1", port, b"four") == b"four"
        # The container has no IPv6: over what it has, as docker-proxy.
        assert await ask("::1", port, b"six") == b"six"
        data = bytes(range(256)) * 20_000
        async with trio.open_nursery() as nursery:
            for _ in range(4):

                async def bulk() -> None:
                    async with await trio.open_tcp_stream("127.0.0.1", port) as stream, trio.open_nursery() as inner:

                        async def send() -> None:
                            await stream.send_all(data)
                            await stream.send_eof()

                        inner.start_soon(send)
                        assert b"".join([part async for part in stream]) == data

                nursery.start_soon(bulk)
        await until(lambda: rig.publisher.connections == 0)
        await until(lambda: rig.helper.streams.active == 0)
        rig.publisher.release("web")
        assert rig.publisher.published("web") == ()
        assert await connection_fails(port)


async def test_connections_have_a_limit(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig, tcp_server(echo) as target:
        rig.publisher._budget.limit = 2
        port = rig.publisher.publish("web", [PortBinding(target)])[0].host_port
        rig.publisher.set_target("web", ["127.0.0.1"])
        held = []
        for _ in range(2):
            held.append(await trio.open_tcp_stream("127.0.0.1", port))
            await held[-1].send_all(b"x")
            assert await held[-1].receive_some() == b"x"
        assert await connection_fails(port)
        await held.pop().aclose()
        await until(lambda: rig.publisher.connections == 1)
        assert await ask("127.0.0.1", port, b"again") == b"again"
        await held.pop().aclose()


async def test_descriptors_that_run_short_only_make_connections_wait(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig, tcp_server(echo) as target:
        port = rig.publisher.publish("web", [PortBinding(target)])[0].host_port
        rig.publisher.set_target("web", ["127.0.0.1"])
        assert await ask("127.0.0.1", port, b"x") == b"x"
        owner = rig.publisher._owners["web"]
        server = owner.ports[0].server
        assert isinstance(server, ConnectionServer)
        with socket.socket() as client, contextlib.ExitStack() as held:
            client.setblocking(False)
            limits = resource.getrlimit(resource.RLIMIT_NOFILE)
            highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, limits[1]))
            held.callback(resource.setrlimit, resource.RLIMIT_NOFILE, limits)
            with contextlib.suppress(OSError):
                while True:
                    held.callback(os.close, os.dup(client.fileno()))
            assert client.connect_ex(("127.0.0.1", port)) in (0, errno.EINPROGRESS)
            await until(lambda: server._paused)
            held.close()
            rig.publisher._tend(owner, flows_before=0, openings_before=0)  # as it is done every few seconds
            stream = trio.SocketStream(trio.socket.from_stdlib_socket(client))
            await stream.send_all(b"after all")
            assert await stream.receive_some() == b"after all"
            assert not server._paused


async def test_helper_behind_a_vmm(tmp_path: Path) -> None:
    """Whose data port takes a dialogue to be connected to."""
    behind = UnixAddress(str(tmp_path / "data.sock"))
    async with (
        hybrid_front(tmp_path, behind) as front,
        open_rig(tmp_path, front=front) as rig,
        tcp_server(echo) as target,
    ):
        port = rig.publisher.publish("web", [PortBinding(target)])[0].host_port
        rig.publisher.set_target("web", ["127.0.0.1"])
        async with trio.open_nursery() as nursery:
            for number in range(20):

                async def one(data: bytes) -> None:
                    assert await ask("127.0.0.1", port, data) == data

                nursery.start_soon(one, b"%d" % number * 1000)
        await until(lambda: rig.publisher.connections == 0)
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(b"x")
            assert await stream.receive_some() == b"x"
            rig.publisher.release("web")
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
        await until(lambda: rig.publisher.connections == 0)


async def test_helper_that_does_not_answer(tmp_path: Path) -> None:
    deaf = UnixAddress(str(tmp_path / "deaf.sock"))
    async with open_rig(tmp_path, front=deaf) as rig, trio.open_nursery() as nursery:
        held: list[trio.SocketStream] = []

        async def hold(stream: trio.SocketStream) -> None:
            held.append(stream)
            await trio.sleep_forever()

        nursery.start_soon(trio.serve_listeners, hold, [await open_listener(deaf)])
        port = rig.publisher.publish("web", [PortBinding(80)])[0].host_port
        rig.publisher.set_target("web", ["127.0.0.1"])
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await until(lambda: len(held) == 1)
            assert rig.publisher.connections == 1
            for owner in rig.publisher._owners.values():  # as it is done when its time is up
                rig.publisher._tend(owner, flows_before=0, openings_before=time.monotonic())
            with pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
        await until(lambda: rig.publisher.connections == 0)
        nursery.cancel_scope.cancel()


async def test_server_that_speaks_first_and_closes(tmp_path: Path) -> None:
    async def greet(stream: trio.SocketStream) -> None:
        await stream.send_all(b"hello")

    async with open_rig(tmp_path) as rig, tcp_server(greet) as target:
        port = rig.publisher.publish("web", [PortBinding(target)])[0].host_port
        rig.publisher.set_target("web", ["127.0.0.1"])
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            assert b"".join([part async for part in stream]) == b"hello"
        await until(lambda: rig.publisher.connections == 0)


async def test_nobody_listens_in_the_container(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        target = free.getsockname()[1]
    async with open_rig(tmp_path) as rig:
        port = rig.publisher.publish("web", [PortBinding(target)])[0].host_port
        rig.publisher.set_target("web", ["127.0.0.1"])

        def connect() -> bool:
            try:
                with socket.create_connection(("127.0.0.1", port), 10) as sock:
                    return is_reset(sock)
            except ConnectionResetError:  # while it was being opened
                return True

        assert await trio.to_thread.run_sync(connect)
        await until(lambda: rig.publisher.connections == 0)


async def test_connections_wait_for_target_and_helper(tmp_path: Path) -> None:
    """A container that is just starting, a helper or a bridge that was started again: who comes too early is served."""
    async with open_rig(tmp_path) as rig, tcp_server(echo) as target:
        port = rig.publisher.publish("web", [PortBinding(target)])[0].host_port

        @asynccontextmanager
        async def waiting() -> AsyncIterator[None]:
            answers: list[bytes] = []

            async def early() -> None:
                answers.append(await ask("127.0.0.1", port, b"early"))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(early)
                await until(lambda: rig.publisher._slow == 1)
                yield
            assert answers == [b"early"]
            await until(lambda: rig.publisher.connections == 0)

        async with waiting():
            rig.publisher.set_target("web", ["127.0.0.1"])
        rig.peer.stream_secret = None
        async with waiting():
            rig.peer.stream_secret = rig.helper.secret
        rig.peer.stream_secret = b"a secret of another agent"
        async with waiting():
            rig.peer.stream_secret = rig.helper.secret
        rig.peer.front = UnixAddress(str(tmp_path / "nobody.sock"))
        async with waiting():
            rig.peer.front = None


async def test_connections_to_a_helper_that_ends_meanwhile(tmp_path: Path) -> None:
    """It has taken the stream and is killed before it answers."""
    dying = UnixAddress(str(tmp_path / "dying.sock"))
    async with open_rig(tmp_path, front=dying) as rig, tcp_server(echo) as target, trio.open_nursery() as nursery:

        async def die(stream: trio.SocketStream) -> None:
            await stream.receive_some()
            rig.peer.front = None
            await stream.aclose()

        nursery.start_soon(trio.serve_listeners, die, [await open_listener(dying)])
        port = rig.publisher.publish("web", [PortBinding(target)])[0].host_port
        rig.publisher.set_target("web", ["127.0.0.1"])
        assert await ask("127.0.0.1", port, b"all the same") == b"all the same"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("end", ["released", "no target", "time"])
async def test_connections_wait_no_longer_than_makes_sense(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    if end == "time":
        monkeypatch.setattr("host_bridge.ports.publisher.STREAM_TIMEOUT", 1.0)
    async with open_rig(tmp_path) as rig:
        rig.peer.stream_secret = None
        port = rig.publisher.publish("web", [PortBinding(80)])[0].host_port
        rig.publisher.set_target("web", ["127.0.0.1"])
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await until(lambda: rig.publisher.connections == 1 or end == "time")
            if end == "released":
                rig.publisher.release("web")
            elif end == "no target":
                rig.publisher.set_target("web", [])
            with trio.fail_after(60), pytest.raises(trio.BrokenResourceError):
                await stream.receive_some()
        await until(lambda: rig.publisher.connections == 0)
        assert await connection_fails(port)


async def test_target_moves(tmp_path: Path) -> None:
    """Connections stay where they are; new ones go to the new address."""

    async def name(stream: trio.SocketStream) -> None:
        own = stream.socket.getsockname()[0].encode()
        async for data in stream:
            await stream.send_all(own + b" " + data)

    async with open_rig(tmp_path) as rig, tcp_server(name, host="0.0.0.0") as target:
        port = rig.publisher.publish("web", [PortBinding(target)])[0].host_port
        rig.publisher.set_target("web", ["127.0.0.2"])
        async with await trio.open_tcp_stream("127.0.0.1", port) as old:
            await old.send_all(b"a")
            assert await old.receive_some() == b"127.0.0.2 a"
            rig.publisher.set_target("web", ["127.0.0.3"])
            async with await trio.open_tcp_stream("127.0.0.1", port) as new:
                await new.send_all(b"b")
                assert await new.receive_some() == b"127.0.0.3 b"
            await old.send_all(b"c")
            assert await old.receive_some() == b"127.0.0.2 c"
            # Gone altogether: nobody waits for a container that is not there.
            rig.publisher.set_target("web", [])
            with pytest.raises(trio.BrokenResourceError):
                await old.receive_some()


async def test_release_ends_connections_and_frees_the_ports_at_once(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig, tcp_server(echo) as target, udp_server(lambda data: data) as (udp, _):
        bindings = [PortBinding(target), PortBinding(udp, "udp")]
        for _ in range(20):
            published = rig.publisher.publish("web", bindings)
            rig.publisher.set_target("web", ["127.0.0.1"])
            async with await trio.open_tcp_stream("127.0.0.1", published[0].host_port) as stream:
                await stream.send_all(b"x")
                assert await stream.receive_some() == b"x"
                rig.publisher.release("web")
                again = [
                    PortBinding(port.container_port, port.protocol, port.host_ip, port.host_port) for port in published
                ]
                assert rig.publisher.publish("web", again) == published
                rig.publisher.release("web")
                with pytest.raises(trio.BrokenResourceError):
                    await stream.receive_some()
        await until(lambda: rig.helper.streams.active == 0)


async def test_two_owners_do_not_share_a_port(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        port = rig.publisher.publish("a", [PortBinding(80)])[0].host_port
        with pytest.raises(PortAllocatedError):
            rig.publisher.publish("b", [PortBinding(81), PortBinding(80, host_port=port)])
        assert rig.publisher.published("b") == ()
        rig.publisher.release("a")
        rig.publisher.publish("b", [PortBinding(80, host_port=port)])
        rig.publisher.release("nobody")
        rig.publisher.set_target("nobody", ["127.0.0.1"])


async def test_published_before_it_runs(tmp_path: Path) -> None:
    async with open_helper(tmp_path) as helper, open_dataplane() as plane, tcp_server(echo) as target:
        publisher = PortPublisher(HelperPeer(helper), plane, is_gateway=lambda _: False)
        port = publisher.publish("web", [PortBinding(target)])[0].host_port
        publisher.set_target("web", ["127.0.0.1"])
        async with trio.open_nursery() as nursery:
            await nursery.start(publisher.run)
            assert await ask("127.0.0.1", port, b"x") == b"x"
            nursery.cancel_scope.cancel()
        assert await connection_fails(port)


async def test_many_connections_leak_nothing(tmp_path: Path) -> None:
    def descriptors() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    async with open_rig(tmp_path) as rig, tcp_server(echo) as target:
        port = rig.publisher.publish("web", [PortBinding(target)])[0].host_port
        rig.publisher.set_target("web", ["127.0.0.1"])

        async def many(count: int) -> None:
            limiter = trio.Semaphore(100)

            async def one(number: int) -> None:
                async with limiter:
                    if number % 5 == 0:  # gone before anything was said
                        await (await trio.open_tcp_stream("127.0.0.1", port)).aclose()
                    else:
                        assert await ask("127.0.0.1", port, b"%d" % number) == b"%d" % number

            async with trio.open_nursery() as nursery:
                for number in range(count):
                    nursery.start_soon(one, number)
            await until(lambda: rig.publisher.connections == 0 and rig.helper.streams.active == 0)

        await many(50)
        before = descriptors()
        await many(1000)
        await until(lambda: descriptors() <= before)


async def test_udp(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig, udp_server(lambda data: data.upper()) as (target, peers):
        port = rig.publisher.publish("dns", [PortBinding(target, "udp")])[0].host_port
        rig.publisher.set_target("dns", ["127.0.0.1"])
        with client() as a, client() as b, client(socket.AF_INET6) as c:
            assert await exchange(a, b"one", "127.0.0.1", port) == (b"ONE", "127.0.0.1")
            # The answer comes from where the question went to, whichever address that was.
            assert await exchange(b, b"two", "127.0.0.5", port) == (b"TWO", "127.0.0.5")
            assert await exchange(c, b"six", "::1", port) == (b"SIX", "::1")
            assert len(peers) == 3
            assert (await exchange(a, b"x" * 20_000, "127.0.0.1", port))[0] == b"X" * 20_000
            assert len(peers) == 3
        rig.publisher.release("dns")
        await until(lambda: rig.helper.streams.active == 0)


async def test_udp_of_one_address(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig, udp_server(lambda data: data) as (target, _):
        port = rig.publisher.publish("dns", [PortBinding(target, "udp", "127.0.0.1")])[0].host_port
        rig.publisher.set_target("dns", ["127.0.0.1"])
        with client() as sock:
            assert await exchange(sock, b"x", "127.0.0.1", port) == (b"x", "127.0.0.1")


async def test_udp_peer_that_is_silent_is_forgotten(tmp_path: Path) -> None:
    async with open_rig(tmp_path, udp_idle=0.4) as rig, udp_server(lambda data: data) as (target, peers):
        port = rig.publisher.publish("dns", [PortBinding(target, "udp")])[0].host_port
        rig.publisher.set_target("dns", ["127.0.0.1"])
        with client() as sock:
            await exchange(sock, b"x", "127.0.0.1", port)
            await until(lambda: rig.helper.streams.active == 0)
            await exchange(sock, b"y", "127.0.0.1", port)
            await until(lambda: len(peers) >= 2)  # what was answered may have been an x that was sent again


async def test_udp_moves_with_the_target(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig, udp_server(lambda data: data, host="127.0.0.2") as (target, _):
        port = rig.publisher.publish("dns", [PortBinding(target, "udp")])[0].host_port
        with client() as sock:
            rig.publisher.set_target("dns", ["127.0.0.3"])
            await sock.sendto(b"lost", ("127.0.0.1", port))
            await until(lambda: rig.helper.streams.active == 1)
            rig.publisher.set_target("dns", ["127.0.0.2"])
            assert (await exchange(sock, b"found", "127.0.0.1", port))[0] == b"found"


async def test_udp_flood_from_many_peers_stays_bounded(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig, udp_server(lambda data: data) as (target, _):
        port = rig.publisher.publish("dns", [PortBinding(target, "udp")])[0].host_port
        rig.publisher.set_target("dns", ["127.0.0.1"])
        for _ in range(1500):
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                sock.sendto(b"flood", ("127.0.0.1", port))
            await trio.lowlevel.checkpoint()
        with client() as sock, trio.move_on_after(1):
            await exchange(sock, b"x", "127.0.0.1", port)
        assert rig.helper.streams.active <= 1030


# Containers' access to the host


def wanted(rig: Rig, address: str, port: int, protocol: StreamProtocol = StreamProtocol.TCP) -> StreamWanted:
    return StreamWanted(token=b"t" * 16, protocol=protocol, network_id="n", address=address, port=port)


@asynccontextmanager
async def asked(rig: Rig, event: StreamWanted) -> AsyncIterator[trio.SocketStream | None]:
    """As if a container had asked: the stream that the host opens, or None when it refuses."""
    found: list[_Carrier | None] = []

    async def question() -> None:
        found.append(await rig.helper.streams._ask(event.protocol, event.network_id, event.address, event.port))

    async with trio.open_nursery() as nursery:
        before = len(rig.helper.wanted)
        nursery.start_soon(question)
        await until(lambda: len(rig.helper.wanted) > before)
        rig.publisher.stream_wanted(rig.helper.wanted[-1])
    carrier = found[0]
    if carrier is None:
        yield None
    elif not carrier.records:
        async with carrier.stream as stream:
            yield stream
    else:
        near, far = socket.socketpair()
        for end in (near, far):
            end.setblocking(False)
        rig.helper.streams._join_tcp(carrier, near, event.network_id)
        async with trio.SocketStream(trio.socket.from_stdlib_socket(far)) as stream:
            yield stream


async def test_gateway_is_the_host_itself(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig, tcp_server(echo) as service:
        async with asked(rig, wanted(rig, GATEWAY, service)) as stream:
            assert stream is not None
            await stream.send_all(b"hello")
            await stream.send_eof()
            assert b"".join([part async for part in stream]) == b"hello"
        assert rig.peer.refused == []
        await until(lambda: not rig.publisher._host_access._open)


async def test_containers_streams_behind_a_vmm_end_each_way_by_itself(tmp_path: Path) -> None:
    behind = UnixAddress(str(tmp_path / "data.sock"))
    async with (
        hybrid_front(tmp_path, behind) as front,
        open_rig(tmp_path, front=front) as rig,
        tcp_server(echo) as service,
    ):
        async with asked(rig, wanted(rig, GATEWAY, service)) as stream:
            assert stream is not None
            await stream.send_all(b"hello")
            await stream.send_eof()
            assert b"".join([part async for part in stream]) == b"hello"
        await until(lambda: not rig.publisher._host_access._open and not rig.helper.streams.active)


@pytest.mark.parametrize("dialled", [StreamProtocol.TCP, StreamProtocol.TCP_RECORDS])
async def test_a_flow_of_datagrams_is_not_joined_to_a_connection(tmp_path: Path, dialled: StreamProtocol) -> None:
    async with open_helper(tmp_path) as helper, trio.open_nursery() as nursery:
        found: list[_Carrier | None] = []

        async def question() -> None:
            found.append(await helper.streams._ask(StreamProtocol.UDP, "n", GATEWAY, 53))

        nursery.start_soon(question)
        await until(lambda: bool(helper.wanted))
        target = StreamTarget(protocol=dialled, token=helper.wanted[0].token)
        with pytest.raises(StreamError, match="another protocol"):
            await open_stream(helper.address, target, helper.secret)
        await until(lambda: found == [None])


async def test_datagrams_to_the_host(tmp_path: Path) -> None:
    async with (
        open_rig(tmp_path) as rig,
        udp_server(lambda data: data.upper()) as (service, _),
        asked(rig, wanted(rig, GATEWAY, service, StreamProtocol.UDP)) as stream,
    ):
        assert stream is not None
        await stream.send_all(struct.pack(">I", 2) + b"hi")
        assert await stream.receive_some() == struct.pack(">I", 2) + b"HI"


@pytest.mark.parametrize("address", ["127.0.0.1", "::1", "192.0.2.1", "0.0.0.0", "224.0.0.1", "nonsense", ""])
async def test_addresses_that_are_not_for_containers(tmp_path: Path, address: str) -> None:
    async with open_rig(tmp_path) as rig, tcp_server(echo) as service:
        async with asked(rig, wanted(rig, address, service)) as stream:
            assert stream is None
        assert len(rig.peer.refused) == 1


async def test_nothing_listens_on_the_host(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with open_rig(tmp_path) as rig, asked(rig, wanted(rig, GATEWAY, port)) as stream:
        assert stream is None
        assert len(rig.peer.refused) == 1


async def test_port_published_on_the_loopback_is_not_at_the_gateway(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig, tcp_server(echo) as target:
        port = rig.publisher.publish("a", [PortBinding(target, host_ip="127.0.0.1")])[0].host_port
        rig.publisher.set_target("a", ["127.0.0.1"])
        async with asked(rig, wanted(rig, GATEWAY, port)) as stream:
            assert stream is None
        rig.publisher.release("a")
        rig.publisher.publish("a", [PortBinding(target, host_port=port)])
        rig.publisher.set_target("a", ["127.0.0.1"])
        async with asked(rig, wanted(rig, GATEWAY, port)) as stream:
            assert stream is not None
            await stream.send_all(b"through")
            assert await stream.receive_some() == b"through"


async def test_host_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent_helper.streams.WANTED_TIMEOUT", 0.1)
    async with open_helper(tmp_path) as helper:
        assert await helper.streams._ask(StreamProtocol.TCP, "n", GATEWAY, 80) is None
        assert not helper.streams._wanted

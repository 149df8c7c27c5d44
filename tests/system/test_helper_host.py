"""Containers reach the host at its gateways' addresses and its own, whatever network they are in."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace

import pytest
import trio
from test_helper_egress import UPLINK, connected, dial, join, listen, outgoing, peer_seen
from test_helper_rig import Guest, Rig, in_netns, network

from taploom.contracts.taploom.helper.v1 import (
    ApplyUplinkRequest,
    AuthorizeStreamsRequest,
    RefuseStreamRequest,
    StreamWanted,
    WatchEventsRequest,
)
from taploom.contracts.taploom.link.v1 import StreamProtocol, StreamTarget
from taploom.link import new_secret, open_stream

pytestmark = pytest.mark.system

TCP, UDP = StreamProtocol.TCP, StreamProtocol.UDP
HOST, HOST6 = "203.0.113.5", "2001:db8:2::5"
EVERYWHERE = replace(UPLINK, host_addresses=[HOST, HOST6])


@dataclass
class Host:
    """What the host does: a service that echoes at port 80 of whatever is asked for, and nothing else."""

    rig: Rig
    secret: bytes = field(default_factory=new_secret)
    asked: list[tuple[StreamProtocol, str, str, int]] = field(default_factory=list)

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        await self.rig.client.authorize_streams(AuthorizeStreamsRequest(secret=self.secret))
        async with trio.open_nursery() as nursery, self.rig.client.watch_events(WatchEventsRequest()) as events:
            async for event in events:
                if event.started is not None:
                    task_status.started()
                wanted = event.stream_wanted
                if wanted is not None:
                    self.asked.append((wanted.protocol, wanted.network_id, wanted.address, wanted.port))
                    nursery.start_soon(self._answer, wanted)

    async def _answer(self, wanted: StreamWanted) -> None:
        if wanted.port != 80:
            await self.rig.client.refuse_stream(RefuseStreamRequest(token=wanted.token))
            return
        target = StreamTarget(protocol=wanted.protocol, token=wanted.token)
        with contextlib.suppress(trio.BrokenResourceError):
            async with await open_stream(self.rig.data, secret=self.secret, target=target) as stream:
                async for data in stream:
                    await stream.send_all(data)
                await stream.send_eof()


@contextlib.asynccontextmanager
async def hosted() -> AsyncIterator[tuple[Rig, Host]]:
    async with connected() as (rig, _), trio.open_nursery() as nursery:
        await rig.client.apply_uplink(ApplyUplinkRequest(uplink=EVERYWHERE), timeout=20)
        host = Host(rig)
        await nursery.start(host.run)
        yield rig, host
        nursery.cancel_scope.cancel()


def tcp(guest: Guest, address: str, port: int = 80) -> bytes:
    """What comes back over a connection, up to its end."""
    with dial(guest.netns, address, port) as client:
        client.settimeout(5)
        client.sendall(b"hello")
        client.shutdown(socket.SHUT_WR)
        data = b""
        while chunk := client.recv(64):
            data += chunk
        return data


def udp(guest: Guest, address: str, count: int = 3, port: int = 80) -> list[bytes]:
    """The answers to datagrams sent from one socket, which takes them from this address only."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with in_netns(guest.netns, lambda: socket.socket(family, socket.SOCK_DGRAM)) as client:
        client.settimeout(5)
        client.connect((address, port))
        answers = []
        for number in range(count):
            client.send(b"%d" % number)
            answers.append(client.recv(64))
        return answers


async def in_thread(function, *args):  # type: ignore[no-untyped-def]
    """The host answers meanwhile."""
    with trio.fail_after(60):
        return await trio.to_thread.run_sync(function, *args)


async def test_every_gateway_and_host_address_reaches_the_host_from_every_network() -> None:
    async with hosted() as (rig, host):
        await rig.apply(outgoing(1), outgoing(2, masquerade_disabled=True))
        for number in (1, 2):
            guest = await join(rig, number, 2)
            own = f"10.77.{number}.1", f"fd00:77:{number}::1"
            other = f"10.77.{3 - number}.1", f"fd00:77:{3 - number}::1"
            for address in (*own, *other, HOST, HOST6):
                host.asked.clear()
                assert await in_thread(tcp, guest, address) == b"hello", address
                assert host.asked == [(TCP, f"n{number}", address, 80)]
                host.asked.clear()
                assert await in_thread(udp, guest, address) == [b"0", b"1", b"2"], address
                assert host.asked == [(UDP, f"n{number}", address, 80)]
                with pytest.raises(ConnectionRefusedError):
                    await in_thread(tcp, guest, address, 81)
                with pytest.raises(ConnectionRefusedError):
                    await in_thread(udp, guest, address, 1, 81)
                assert guest.ping(address), address
            # Beside all that, connections the other way are told from those of containers.
            with listen(guest.netns, f"10.77.{number}.2", 80) as server:
                assert peer_seen(server, rig.netns, f"10.77.{number}.2") == f"10.77.{number}.1"


async def test_internal_networks_do_not_reach_the_host() -> None:
    async with hosted() as (rig, host):
        await rig.apply(outgoing(1), outgoing(2, internal=True), network(3, ipv6=True))
        for number in (2, 3):
            guest = await join(rig, number, 2)
            for address in (f"10.77.{number}.1", f"fd00:77:{number}::1", "10.77.1.1", "fd00:77:1::1", HOST):
                with pytest.raises(OSError):
                    await in_thread(dial, guest.netns, address, 80, 0.7)
        assert not host.asked


async def test_addresses_of_the_host_come_and_go() -> None:
    async with hosted() as (rig, _):
        await rig.apply(outgoing(1))
        guest = await join(rig, 1, 2)
        assert await in_thread(tcp, guest, HOST) == b"hello"
        await rig.client.apply_uplink(ApplyUplinkRequest(uplink=UPLINK), timeout=20)
        with pytest.raises(OSError):
            await in_thread(dial, guest.netns, HOST, 80, 0.7)
        await rig.client.apply_uplink(ApplyUplinkRequest(uplink=EVERYWHERE), timeout=20)
        assert await in_thread(tcp, guest, HOST) == b"hello"
        # A network that goes takes its gateway along.
        await rig.apply(outgoing(2))
        assert await in_thread(tcp, guest, "10.77.2.1") == b"hello"
        await rig.delete_network("n2")
        with pytest.raises(OSError):
            await in_thread(dial, guest.netns, "10.77.2.1", 80, 0.7)


async def test_a_large_transfer_to_the_host_and_back() -> None:
    async with hosted() as (rig, _):
        await rig.apply(outgoing(1))
        guest = await join(rig, 1, 2)
        data = b"".join(struct.pack(">I", number) for number in range(1_000_000))

        def transfer() -> bytes:
            with dial(guest.netns, "10.77.1.1", 80) as client:
                client.settimeout(10)
                received = bytearray()
                sent = 0
                while sent < len(data):
                    client.sendall(data[sent : sent + 50_000])
                    sent = min(sent + 50_000, len(data))
                    while len(received) < sent:
                        received += client.recv(65536)
                return bytes(received)

        assert await in_thread(transfer) == data


async def test_many_connections_at_once_and_some_refused() -> None:
    async with hosted() as (rig, host):
        await rig.apply(outgoing(1))
        guest = await join(rig, 1, 2)
        outcomes: list[bytes] = []

        async def one(number: int) -> None:
            address = ("10.77.1.1", HOST, "fd00:77:1::1", HOST6)[number % 4]
            try:
                outcomes.append(await trio.to_thread.run_sync(tcp, guest, address, 80 + number % 2))
            except ConnectionRefusedError:
                outcomes.append(b"refused")

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for number in range(80):
                    nursery.start_soon(one, number)
        assert sorted(outcomes) == [b"hello"] * 40 + [b"refused"] * 40
        assert len(host.asked) == 80

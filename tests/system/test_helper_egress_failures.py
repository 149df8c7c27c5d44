"""kill -9 of each daemon and of the agent, and lost databases: the way out comes back. Networks of odd MTUs use it."""

from __future__ import annotations

import os
import signal
import socket
import time

import pytest
import trio
from test_helper_egress import (
    INSIDE,
    INSIDE6,
    UPLINK,
    Internet,
    connected,
    dial,
    join,
    listen,
    outgoing,
    peer_seen,
)
from test_helper_failures import Pinger, interfaces
from test_helper_rig import Guest, Rig, endpoint, eventually, sh

from taploom.contracts.taploom.helper.v1 import DaemonState, SyncRequest

pytestmark = pytest.mark.system


async def ready(rig: Rig) -> None:
    async def is_ready() -> bool:
        return all(daemon.state == DaemonState.RUNNING for daemon in (await rig.daemons()).values())

    with trio.fail_after(60):
        while not await is_ready():
            await trio.sleep(0.02)


async def ended(rig: Rig, name: str) -> None:
    """Kills the daemon; the agent has seen it."""
    before = (await rig.daemons())[name]
    os.kill(before.pid, signal.SIGKILL)
    with trio.fail_after(60):
        while (await rig.daemons())[name].restarts == before.restarts:
            await trio.sleep(0.01)


def ours(netns: str) -> list[str]:
    """What the agent has in the kernel beside interfaces."""
    found = sh("ip", "netns", "exec", netns, "nft", "list", "tables").split("\n")
    for family in ("-4", "-6"):
        found += sh("ip", "-n", netns, family, "rule").split("\n")
        found += sh("ip", "-n", netns, family, "route", "show", "table", "29804", check=False).split("\n")
    return [line for line in found if "taploom" in line or "29804" in line or "dev lo" in line]


def all_ways(rig: Rig, net: Internet, guest: Guest) -> None:
    for address in (INSIDE, INSIDE6):
        with listen(net.netns, address, 80) as server:
            peer_seen(server, guest.netns, address)
    with listen(guest.netns, "10.77.1.2", 80) as server:
        assert peer_seen(server, rig.netns, "10.77.1.2") == "10.77.1.1"


@pytest.mark.parametrize("name", ["ovsdb-server", "ovs-vswitchd", "ovn-northd", "ovn-controller"])
async def test_the_way_out_survives_a_killed_daemon(name: str) -> None:
    async with connected() as (rig, net):
        await rig.apply(outgoing(1), outgoing(2))
        guest = await join(rig, 1, 2)
        other = await join(rig, 2, 2)
        pinger = Pinger(guest, INSIDE, rig.folder / "ping")
        with listen(net.netns, INSIDE, 80) as server, dial(guest.netns, INSIDE, 80) as client:
            connection, _ = server.accept()
            with connection:
                try:
                    await pinger.answered_after(0, count=150)
                    os.kill((await rig.daemons())[name].pid, signal.SIGKILL)
                    killed = time.time()
                    await pinger.answered_after(killed)
                    await ready(rig)
                finally:
                    pinger.stop()
                print(f"kill -9 {name}: longest gap of the way out {pinger.longest_gap() * 1000:.0f} ms")
                # The connection that was open goes on.
                client.settimeout(5)
                connection.settimeout(5)
                for _ in range(3):
                    client.sendall(b"there")
                    assert connection.recv(16) == b"there"
                    connection.sendall(b"back")
                    assert client.recv(16) == b"back"
        all_ways(rig, net, guest)
        assert not guest.ping("10.77.2.2", wait=1)
        assert other.ping(INSIDE6)


def ports_up(rig: Rig) -> int:
    """How many ports' flows ovn-controller has programmed since the southbound database has had their rows."""
    return len(rig.db("sb", "--bare", "--columns=_uuid", "find", "Port_Binding", "up=true").split())


@pytest.mark.parametrize("name", ["conf", "nb", "sb"])
async def test_the_way_out_survives_a_lost_database(name: str) -> None:
    async with connected() as (rig, net):
        await rig.apply(outgoing(1), outgoing(2, endpoints_isolated=True))
        guest, other = await join(rig, 1, 2), await join(rig, 2, 2)
        assert guest.ping(INSIDE)
        rows = {k: v for k, v in (await rig.counted()).items() if k[0].isupper()}
        up = ports_up(rig)
        (rig.state / "run" / f"{name}.db").unlink()
        await ended(rig, "ovsdb-server")
        await ready(rig)
        await eventually(lambda: {k: v for k, v in rig.count().items() if k[0].isupper()} == rows)
        # A port that is bound anew begins with an empty connection tracking zone, and what was open is cut then.
        await eventually(lambda: ports_up(rig) == up)
        await eventually(lambda: guest.ping(INSIDE, wait=1))
        all_ways(rig, net, guest)
        assert not other.ping("10.77.1.2", wait=1)
        third = await join(rig, 2, 3)
        assert not third.ping("10.77.2.2", wait=1)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM])
async def test_an_agent_that_ends_leaves_nothing_and_the_next_has_the_way_out(signum: signal.Signals) -> None:
    async with connected() as (rig, net):
        sh("ip", "netns", "exec", rig.netns, "nft", "add", "table", "inet", "others")
        await rig.apply(outgoing(1))
        guest = await join(rig, 1, 2)
        assert guest.ping(INSIDE)
        assert len(ours(rig.netns)) == 5
        await rig.stop(signum)
        if signum == signal.SIGTERM:
            assert interfaces(rig) == {"lo", "nic0"}
            assert ours(rig.netns) == []
        await rig.start()
        assert ours(rig.netns) == []
        assert "tlup" not in interfaces(rig)
        wanted = SyncRequest(uplink=UPLINK, networks=[outgoing(1)], endpoints=[endpoint(1, 2, ipv6=True)])
        for _ in range(2):  # the second changes nothing
            assert not (await rig.client.sync(wanted)).failures
            await rig.link(guest, "e1-2")
            await eventually(lambda: guest.ping(INSIDE, wait=1))
            all_ways(rig, net, guest)
        # A snapshot without an uplink takes it away.
        assert not (await rig.client.sync(SyncRequest(networks=[outgoing(1)], endpoints=wanted.endpoints))).failures
        assert "tlup" not in interfaces(rig)
        assert ours(rig.netns) == []
        assert not guest.ping(INSIDE, wait=1)
        assert guest.ping("10.77.1.1")
        assert "others" in sh("ip", "netns", "exec", rig.netns, "nft", "list", "tables")


@pytest.mark.parametrize("mtu", [1280, 1500, 9000, 65535])
async def test_a_network_of_any_mtu_gets_through(mtu: int) -> None:
    async with connected() as (rig, net):
        await rig.apply(outgoing(1, mtu=mtu), outgoing(2))
        guest = await join(rig, 1, 2, mtu=min(mtu, 65521))
        data = os.urandom(1_000_000)

        def exchange(server: socket.socket, netns: str, address: str) -> None:
            with dial(netns, address, 80) as client:
                connection, _ = server.accept()
                with connection:
                    for sender, receiver in ((client, connection), (connection, client)):
                        sender.settimeout(10)
                        receiver.settimeout(10)
                        received = bytearray()
                        at = 0
                        end = time.monotonic() + 10  # not at the pace of retransmissions
                        while at < len(data) and time.monotonic() < end:  # one after the other: neither waits for ever
                            sender.sendall(data[at : at + 100_000])
                            at += 100_000
                            while len(received) < at and time.monotonic() < end:
                                received += receiver.recv(1 << 20)
                        assert received == data

        for address in (INSIDE, INSIDE6):
            with listen(net.netns, address, 80) as server:
                await trio.to_thread.run_sync(exchange, server, guest.netns, address)
        for address in ("10.77.1.2", "fd00:77:1::2"):  # as published ports do
            with listen(guest.netns, address, 80) as server:
                await trio.to_thread.run_sync(exchange, server, rig.netns, address)
        # What does not fit is cut when it may be, and said to be too large when not.
        if mtu > 1500:
            guest.run("ping", "-n", "-c1", "-W1", "-M", "do", "-s4000", INSIDE, check=False)
            assert "mtu 1500" in guest.run("ip", "route", "get", INSIDE)
        for size in (min(mtu - 28, 20_000), 3000):
            for address in (INSIDE, INSIDE6):
                guest.run("ping", "-n", "-c1", "-W1", "-M", "dont", f"-s{size}", address, check=False)
                reply = guest.run("ping", "-n", "-c1", "-W2", "-M", "dont", f"-s{size}", address, check=False)
                assert " 0% packet loss" in reply, (size, reply)

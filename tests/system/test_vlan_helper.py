"""Networks that are VLANs, at the helper: tags on the wire, both families and directions, refusals, rows, kills."""

from __future__ import annotations

import contextlib
import signal
import socket
from functools import partial

import pytest
import trio
from test_helper_rig import (
    Guest,
    Rig,
    answered,
    dial,
    endpoint,
    eventually,
    helper,
    listen,
    network,
    rpc_status,
    sh,
)
from test_policy_helper import rows
from vlan_lan import HOST, ROUTER, Frame, Lan, frames, lan

from taploom.contracts.taploom.helper.v1 import GetInfoRequest, HelperFeature, Network, SyncRequest, Vlan

pytestmark = pytest.mark.system


def vlan(number: int, tag: int, uplink: str = "", **fields: object) -> Network:
    """Network `n<number>` of both families on a VLAN."""
    return network(number, ipv6=True, vlan=Vlan(tag=tag, uplink=uplink), **fields)


async def join(rig: Rig, number: int, host: int, *names: str) -> Guest:
    """A guest on a VLAN with default routes to its router."""
    guest = await rig.guest(
        endpoint(number, host, *names, ipv6=True), gateway=f"10.77.{number}.1", dns=f"169.254.64.{number}"
    )
    guest.run("ip", "route", "add", "default", "via", f"fd00:77:{number}::1")
    return guest


def of_guests(seen: list[Frame]) -> dict[int | None, set[str]]:
    """Who has sent with which tag."""
    found: dict[int | None, set[str]] = {}
    for frame in seen:
        found.setdefault(frame.tag, set()).add(frame.source)
    return found


def both(number: int, part: int) -> list[str]:
    return [f"10.77.{number}.{part}", f"fd00:77:{number}::{part:x}"]


def bridges(rig: Rig) -> tuple[str, str]:
    return rig.db("conf", "list-br"), rig.db("conf", "get", "Open_vSwitch", ".", "external_ids")


def vlan_port(rig: Rig) -> str:
    return rig.db(
        "nb", "--bare", "--columns=name,type,tag,options,addresses", "find", "Logical_Switch_Port", "type=localnet"
    )


async def test_tagged_traffic_in_both_directions() -> None:
    async with helper() as rig:
        assert HelperFeature.VLAN in (await rig.client.get_info(GetInfoRequest())).features
        with lan(rig.netns, "nic1", {120: 1, 130: 2}) as wire:
            before, plain, counted = rows(rig), bridges(rig), await rig.counted()
            await rig.apply(vlan(1, 120, "nic1"), vlan(2, 130))
            capture = wire.capture()
            a, other, b = await join(rig, 1, 20, "web"), await join(rig, 1, 21), await join(rig, 2, 20)
            for number, tag, guest in ((1, 120, a), (2, 130, b)):
                for part in (ROUTER, HOST):
                    for address in both(number, part):
                        assert guest.ping(address), (tag, address)
                for address in both(number, 20):
                    assert wire.ping(tag, address), (tag, address)
            seen = of_guests(frames(capture))
            assert seen.keys() == {120, 130}, "nothing without a tag, nothing with another"
            assert "02:00:00:00:01:14" in seen[120] <= {"02:00:00:00:01:14", "02:00:00:00:01:15"}
            assert seen[130] == {"02:00:00:00:02:14"}
            # Among themselves, by name; what they say to each other need not be on the wire.
            assert a.ping("10.77.1.21")
            assert a.ping("fd00:77:1::15")
            assert a.dig("169.254.64.1", "+short", "web.net1") == "10.77.1.20"

            await reach_by_tcp(a, wire)
            await stays_apart(a, b, wire)

            for guest in (a, other, b):
                await rig.drop(guest)
            for number in (1, 2):
                await rig.delete_network(f"n{number}")
            assert (rows(rig), bridges(rig)) == (before, plain)
            await eventually(lambda: rig.count() == counted)
            # The card is there for others.
            assert sh("ip", "-n", rig.netns, "link", "show", "nic1")


async def reach_by_tcp(guest: Guest, wire: Lan) -> None:
    """Enough at once that offloads take part."""
    data = bytes(range(256)) * 4096
    for address in both(1, HOST):
        with listen(wire.vlans[120], address, 80) as server, dial(guest.netns, address, 80) as client:
            there, _ = server.accept()
            await exchange(there, client, data)
    for address in both(1, 20):
        with listen(guest.netns, address, 80) as server, dial(wire.vlans[120], address, 80) as client:
            there, _ = server.accept()
            await exchange(there, client, data)


async def exchange(there: socket.socket, client: socket.socket, data: bytes) -> None:
    def read(sock: socket.socket, found: list[bytes]) -> None:
        left = len(data)
        while left and (more := sock.recv(1 << 20)):
            found.append(more)
            left -= len(more)

    for sock in (there, client):
        sock.settimeout(20)
    with there:
        for sender, receiver in ((client, there), (there, client)):
            found: list[bytes] = []
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, read, receiver, found)
                nursery.start_soon(trio.to_thread.run_sync, sender.sendall, data)
            assert b"".join(found) == data


async def stays_apart(a: Guest, b: Guest, wire: Lan) -> None:
    """Nobody of the one VLAN is on the other, the DNS server is on none, and no gateway is the helper."""
    a.run("ip", "addr", "add", "10.77.2.99/24", "dev", "eth0")  # a guest that takes another VLAN's address
    questions = [
        partial(a.ping, "10.77.2.9", wait=1),
        partial(wire.ping, 130, "10.77.1.20", wait=1),
        partial(wire.ping, 120, "10.77.2.20", wait=1),
    ]
    wire.run(120, "ip", "route", "add", "169.254.64.1/32", "dev", "lan0")
    questions.append(partial(wire.ping, 120, "169.254.64.1", wait=1))
    questions.append(partial(wire.ping, 120, "fe80::53%lan0", wait=1))
    assert await answered(*questions) == [False] * len(questions)
    a.run("ip", "addr", "del", "10.77.2.99/24", "dev", "eth0")
    # The router's address, once the router is not there, is nobody's.
    for address in both(2, ROUTER):
        wire.run(130, "ip", "addr", "del", f"{address}/{64 if ':' in address else 24}", "dev", "lan0")
    b.run("ip", "neigh", "flush", "all")
    assert await answered(*(partial(b.ping, address, wait=1) for address in both(2, ROUTER))) == [False, False]


async def test_what_is_refused_as_a_whole() -> None:
    async with helper() as rig:
        with lan(rig.netns, "nic1", {120: 1}), lan(rig.netns, "nic2", {}):
            sh("ip", "-n", rig.netns, "addr", "add", "192.0.2.2/24", "dev", "nic2")
            before, plain = rows(rig), bridges(rig)
            for tag in (0, 4095, 70000):
                assert await rpc_status(lambda tag=tag: rig.apply(vlan(1, tag, "nic1"))) == "INVALID_ARGUMENT"
            for uplink in ("a b", "nic1:x", "x" * 16):
                assert await rpc_status(lambda uplink=uplink: rig.apply(vlan(1, 120, uplink))) == "INVALID_ARGUMENT"
            # One that is not there, one that the helper needs for itself, and what is no card.
            for uplink in ("nic7", "nic2", "br-int", "lo"):
                assert await rpc_status(lambda uplink=uplink: rig.apply(vlan(1, 120, uplink))) == "FAILED_PRECONDITION"
            assert await rpc_status(lambda: rig.apply(vlan(1, 120, "nic1", mtu=9000))) == "FAILED_PRECONDITION"
            assert (rows(rig), bridges(rig)) == (before, plain)
            await rig.apply(vlan(1, 120))
            there = rows(rig)
            assert await rpc_status(lambda: rig.apply(vlan(2, 120, "nic1"))) == "FAILED_PRECONDITION"
            assert rows(rig) == there
            sh("ip", "-n", rig.netns, "addr", "del", "192.0.2.2/24", "dev", "nic2")
            await rig.apply(vlan(2, 120, "nic2"))


async def test_survives_kills() -> None:
    async with helper() as rig:
        with lan(rig.netns, "nic1", {120: 1}) as wire:
            message, one = vlan(1, 120), endpoint(1, 20, "web", ipv6=True)
            await rig.apply(message)
            guest = await join(rig, 1, 20, "web")
            assert guest.ping("10.77.1.9")
            there, plain = vlan_port(rig), bridges(rig)

            def as_before() -> bool:
                with contextlib.suppress(AssertionError):  # the databases are being opened
                    return (vlan_port(rig), bridges(rig)) == (there, plain)
                return False

            for name in ("ovs-vswitchd", "ovn-controller", "ovn-northd", "ovsdb-server"):
                pid = (await rig.daemons())[name].pid
                sh("kill", "-9", str(pid))
                await eventually(lambda: wire.ping(120, "10.77.1.20", wait=1) and guest.ping("fd00:77:1::9", wait=1))
            # The databases lost with their files: put back as they were.
            await eventually(as_before)
            for file in ("conf", "nb", "sb"):
                (rig.state / "run" / f"{file}.db").unlink()
            sh("kill", "-9", str((await rig.daemons())["ovsdb-server"].pid))
            await eventually(lambda: guest.ping("10.77.1.9", wait=1))
            await eventually(as_before)
            # The agent from an empty disk.
            await rig.stop(signal.SIGKILL)
            sh("rm", "-rf", str(rig.state))
            await rig.start()
            await rig.client.sync(SyncRequest(networks=[message], endpoints=[one]), timeout=60)
            await rig.link(guest, one.endpoint_id)
            await eventually(lambda: guest.ping("10.77.1.9", wait=1) and wire.ping(120, "fd00:77:1::14", wait=1))
            # Without the card, that network alone is not there.
            sh("ip", "-n", rig.netns, "link", "del", "nic1")
            await rig.stop(signal.SIGKILL)
            await rig.start()
            outcome = await rig.client.sync(SyncRequest(networks=[message, network(3)]), timeout=60)
            assert [failure.id for failure in outcome.failures] == ["n1"]
            assert "no network card" in outcome.failures[0].message

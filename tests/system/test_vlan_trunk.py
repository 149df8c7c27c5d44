"""Trunks at the helper: endpoints that are tagged frames over another's interface, with real 802.1Q from inside."""

from __future__ import annotations

import contextlib
import secrets
import signal
from collections.abc import Iterator
from functools import partial

import pytest
from test_helper_rig import (
    Guest,
    answered,
    dial,
    endpoint,
    eventually,
    helper,
    in_netns,
    listen,
    network,
    rpc_status,
    sh,
)
from test_policy_helper import rows
from test_vlan_helper import exchange, vlan
from vlan_lan import Switch, frames, lan, trunk_socket, untagged

from taploom.contracts.taploom.helper.v1 import Endpoint, SyncRequest, TrunkChild

pytestmark = pytest.mark.system


def child(number: int, host: int, tag: int, *names: str, parent: str = "e1-2") -> Endpoint:
    carried = TrunkChild(parent_endpoint_id=parent, tag=tag)
    return endpoint(number, host, *names, ipv6=True, trunk_child=carried)


@contextlib.contextmanager
def tagged(netns: str, *children: Endpoint) -> Iterator[list[Guest]]:
    """What VLAN interfaces in the guest would be: a namespace for each child, whose frames are on eth0 with its tag."""
    found, taps = [], {}
    for message in children:
        assert message.trunk_child is not None
        name = f"tltc{secrets.token_hex(4)}"
        sh("ip", "netns", "add", name)
        tap = taps[message.trunk_child.tag] = untagged(name)
        found.append(Guest(name, "lan0", tap, ""))
        sh("ip", "-n", name, "link", "set", "lan0", "address", message.mac_address, "up")
        for address in message.addresses:
            length, nodad = ("64", ["nodad"]) if ":" in address else ("24", [])
            sh("ip", "-n", name, "addr", "add", f"{address}/{length}", "dev", "lan0", *nodad)
        sh("ip", "-n", name, "route", "add", "169.254.64.0/18", "dev", "lan0", "scope", "link")
    switch = Switch(in_netns(netns, partial(trunk_socket, "eth0")), taps)
    switch.start()
    try:
        yield found
    finally:
        switch.stop()
        for guest in found:
            sh("ip", "netns", "del", guest.netns, check=False)


async def test_children_of_a_trunk() -> None:
    async with helper() as rig:
        with lan(rig.netns, "nic1", {120: 4}) as wire:
            networks = [network(1, ipv6=True), network(2, ipv6=True), network(3, ipv6=True), vlan(4, 120)]
            await rig.apply(*networks)
            before = rows(rig)
            base, plain = endpoint(1, 2, "vm", ipv6=True), endpoint(2, 9, "db", ipv6=True)
            children = [child(2, 2, 20, "inner"), child(3, 2, 30), child(4, 40, 40)]
            trunk, other = await rig.guest(base), await rig.guest(plain, dns="169.254.64.2")
            third = await rig.guest(endpoint(3, 9, ipv6=True))
            await rig.apply(*children)
            with tagged(trunk.netns, *children) as (two, three, four):
                # Each child is on its network: its gateway, its neighbours, names both ways, both families.
                for guest, number in ((two, 2), (three, 3)):
                    for address in (f"10.77.{number}.1", f"10.77.{number}.9", f"fd00:77:{number}::9"):
                        assert guest.ping(address), (number, address)
                assert other.ping("10.77.2.2")
                assert third.ping("fd00:77:3::2")
                assert other.dig("169.254.64.2", "+short", "inner.net2") == "10.77.2.2"
                assert two.dig("169.254.64.2", "+short", "db.net2") == "10.77.2.9"
                assert trunk.ping("10.77.1.1"), "the trunk's own frames have no tag"
                # Through to a VLAN with another tag.
                capture = wire.capture()
                assert four.ping("10.77.4.9")
                assert wire.ping(120, "fd00:77:4::28")
                assert {frame.tag for frame in frames(capture)} == {120}
                # Enough at once that offloads take part.
                with listen(other.netns, "10.77.2.9", 80) as server, dial(two.netns, "10.77.2.9", 80) as client:
                    there, _ = server.accept()
                    await exchange(there, client, bytes(range(256)) * 4096)

                # Nobody is on another's network, or has another's addresses.
                two.run("ip", "addr", "add", "10.77.3.77/24", "dev", "lan0")
                two.run("ip", "addr", "add", "10.77.2.77/24", "dev", "lan0")
                questions = [
                    partial(two.ping, "10.77.3.9", wait=1),
                    partial(third.ping, "10.77.2.2", wait=1),
                    partial(answers_from, two, "10.77.2.77", "10.77.2.9"),
                    partial(answers_from, two, "10.77.2.2", "10.77.2.9"),
                ]
                assert await answered(*questions) == [False, False, False, True]
                two.run("ip", "link", "set", "lan0", "address", "02:00:00:00:99:99")
                assert not two.ping("10.77.2.9", wait=1), "another MAC address"
                two.run("ip", "link", "set", "lan0", "address", children[0].mac_address)
                await eventually(lambda: two.ping("10.77.2.9", wait=1))

                await survives(rig, networks, [base, plain, *children], trunk, other, two)
                await rig.delete_endpoint("e2-2")
                assert not two.ping("10.77.2.9", wait=1)
                assert three.ping("10.77.3.1")
                await rig.delete_endpoint("e1-2")
                assert not three.ping("10.77.3.1", wait=1)
            for name in ("e3-2", "e4-40", "e2-9", "e3-9"):
                await rig.delete_endpoint(name)
            assert [row for row in rows(rig) if "ep-" in row] == [row for row in before if "ep-" in row] == []


def answers_from(guest: Guest, source: str, target: str) -> bool:
    return " 0% packet loss" in guest.run("ping", "-n", "-c1", "-W1", "-I", source, target, check=False)


async def survives(rig, networks, endpoints, trunk: Guest, other: Guest, two: Guest) -> None:  # type: ignore[no-untyped-def]  # a rig and what it has
    for name in ("ovs-vswitchd", "ovn-controller", "ovn-northd", "ovsdb-server"):
        sh("kill", "-9", str((await rig.daemons())[name].pid))
        await eventually(lambda: two.ping("10.77.2.9", wait=1))
    await rig.stop(signal.SIGKILL)
    sh("rm", "-rf", str(rig.state))
    await rig.start()
    # Children may come before what carries them.
    third = endpoint(3, 9, ipv6=True)
    await rig.client.sync(SyncRequest(networks=networks, endpoints=[*reversed(endpoints), third]), timeout=60)
    await rig.link(trunk, "e1-2")
    await rig.link(other, "e2-9")
    await eventually(lambda: two.ping("10.77.2.9", wait=1) and other.ping("fd00:77:2::2", wait=1))


async def test_what_is_refused_as_a_whole() -> None:
    async with helper() as rig:
        await rig.apply(network(1, ipv6=True), network(2, ipv6=True), endpoint(1, 2, ipv6=True), child(2, 2, 20))
        before = rows(rig)
        for message, status in (
            (child(2, 3, 0), "INVALID_ARGUMENT"),
            (child(2, 3, 4095), "INVALID_ARGUMENT"),
            (child(2, 3, 20), "INVALID_ARGUMENT"),
            (child(2, 3, 21, parent=""), "INVALID_ARGUMENT"),
            (child(2, 3, 21, parent="e2-3"), "INVALID_ARGUMENT"),
            (endpoint(2, 2, ipv6=True), "FAILED_PRECONDITION"),
            (child(1, 2, 21, parent="e2-2"), "FAILED_PRECONDITION"),
        ):
            assert await rpc_status(lambda message=message: rig.apply(message)) == status, message
        assert rows(rig) == before
        await rig.delete_endpoint("e2-2")
        await rig.apply(child(2, 3, 20))

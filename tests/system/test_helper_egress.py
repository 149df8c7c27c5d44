"""The way out of the networks: address translation, both families, and who does not have it."""

from __future__ import annotations

import contextlib
import secrets
import socket
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from functools import partial

import pytest
from test_helper_rig import (
    UPLINK,
    Guest,
    Rig,
    answered,
    dial,
    endpoint,
    helper,
    in_netns,
    listen,
    network,
    outgoing,
    rpc_status,
    sh,
)

from taploom.contracts.taploom.helper.v1 import (
    ApplyUplinkRequest,
    GetInfoRequest,
    HelperFeature,
    SyncRequest,
)

pytestmark = pytest.mark.system

INSIDE, INSIDE6 = "198.51.100.1", "2001:db8:1::1"  # a server of the internet's
OUTER, OUTER6 = "192.0.2.2", "2001:db8::2"  # the helper's own address there


@dataclass
class Internet:
    """A namespace beside the helper's, which has its default routes there."""

    netns: str
    helper: str

    def run(self, *args: str, check: bool = True) -> str:
        return sh("ip", "netns", "exec", self.netns, *args, check=check)


@contextlib.contextmanager
def internet(rig: Rig) -> Iterator[Internet]:
    """An internet for the helper: INSIDE and INSIDE6 on the far side of a link on which the helper is OUTER."""
    name = f"tlti{secrets.token_hex(4)}"
    sh("ip", "netns", "add", name)
    try:
        peer = ("peer", "name", "up0", "netns", name)
        sh("ip", "-n", rig.netns, "link", "add", "nic0", "type", "veth", *peer)
        for netns, interface, v4, v6 in (
            (rig.netns, "nic0", OUTER, OUTER6),
            (name, "up0", "192.0.2.1", "2001:db8::1"),
            (name, "lo", INSIDE, INSIDE6),
        ):
            wide = interface != "lo"
            sh("ip", "-n", netns, "addr", "add", f"{v4}/{24 if wide else 32}", "dev", interface)
            sh("ip", "-n", netns, "addr", "add", f"{v6}/{64 if wide else 128}", "dev", interface, "nodad")
            sh("ip", "-n", netns, "link", "set", interface, "up")
        sh("ip", "-n", rig.netns, "route", "add", "default", "via", "192.0.2.1")
        sh("ip", "-n", rig.netns, "route", "add", "default", "via", "2001:db8::1")
        yield Internet(name, rig.netns)
    finally:
        sh("ip", "netns", "del", name, check=False)


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[tuple[Rig, Internet]]:
    async with helper() as rig:
        with internet(rig) as net:
            await rig.client.apply_uplink(ApplyUplinkRequest(uplink=UPLINK), timeout=20)
            yield rig, net


async def join(rig: Rig, number: int, host: int, *names: str, **fields: object) -> Guest:
    """A guest with default routes to its gateways."""
    guest = await rig.guest(
        endpoint(number, host, *names, ipv6=True), gateway=f"10.77.{number}.1", dns=f"169.254.64.{number}", **fields
    )
    guest.run("ip", "route", "add", "default", "via", f"fd00:77:{number}::1")
    return guest


def answers(netns: str, address: str, port: int, within: float = 0.7) -> bool:
    """Whether a TCP connection comes about."""
    try:
        dial(netns, address, port, within).close()
    except OSError:
        return False
    return True


def peer_seen(server: socket.socket, netns: str, address: str) -> str:
    """The address that the server sees when it is connected to at this one of its addresses; bytes go both ways."""
    with dial(netns, address, server.getsockname()[1]) as client:
        connection, peer = server.accept()
        with connection:
            connection.settimeout(10)
            client.sendall(b"there")
            assert connection.recv(16) == b"there"
            connection.sendall(b"back")
            assert client.recv(16) == b"back"
    return str(peer[0])


async def test_a_guest_reaches_the_internet_with_the_helpers_address() -> None:
    async with connected() as (rig, net):
        assert HelperFeature.EGRESS in (await rig.client.get_info(GetInfoRequest())).features
        await rig.apply(outgoing(1))
        guest = await join(rig, 1, 2, "web")
        for address, outer in ((INSIDE, OUTER), (INSIDE6, OUTER6)):
            assert guest.ping(address), rig.log()
            with listen(net.netns, address, 80) as server:
                assert peer_seen(server, guest.netns, address) == outer
        with listen(net.netns, INSIDE, 53, socket.SOCK_DGRAM) as server:
            client = in_netns(guest.netns, lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
            with client:
                client.settimeout(10)
                client.sendto(b"question", (INSIDE, 53))
                question, peer = server.recvfrom(64)
                assert (question, peer[0]) == (b"question", OUTER)
                server.sendto(b"answer", peer)
                assert client.recv(64) == b"answer"
        assert guest.ping("10.77.1.1"), "the gateway answers as before"
        assert guest.ping("fd00:77:1::1")


async def test_networks_without_masquerading_keep_their_own_addresses() -> None:
    async with connected() as (rig, net):
        await rig.apply(outgoing(1, masquerade_disabled=True), outgoing(2))
        guest = await join(rig, 1, 2)
        hidden = await join(rig, 2, 2)
        net.run("ip", "route", "add", "10.77.0.0/16", "via", OUTER)
        net.run("ip", "route", "add", "fd00:77::/32", "via", OUTER6)
        for address, own, outer in ((INSIDE, "10.77.1.2", OUTER), (INSIDE6, "fd00:77:1::2", OUTER6)):
            with listen(net.netns, address, 80) as server:
                assert peer_seen(server, guest.netns, address) == own
                assert peer_seen(server, hidden.netns, address) == outer
        # The way back is for answers only, with masquerading and without.
        with contextlib.ExitStack() as servers:
            attempts = []
            for number, netns in ((1, guest.netns), (2, hidden.netns)):
                for address in (f"10.77.{number}.2", f"fd00:77:{number}::2"):
                    servers.enter_context(listen(netns, address, 80))
                    attempts.append(partial(answers, net.netns, address, 80))
            assert not any(await answered(*attempts))
        # Changed live, to and fro: in force when apply returns.
        with listen(net.netns, INSIDE, 80) as server:
            for disabled, seen in ((False, OUTER), (True, "10.77.1.2")) * 3:
                await rig.apply(outgoing(1, masquerade_disabled=disabled))
                assert peer_seen(server, guest.netns, INSIDE) == seen


async def test_internal_networks_have_no_way_out() -> None:
    async with connected() as (rig, _):
        await rig.apply(outgoing(1, internal=True), outgoing(2), network(3, ipv6=True))
        inside, outside, legless = await join(rig, 1, 2), await join(rig, 2, 2), await join(rig, 3, 2)
        assert outside.ping(INSIDE)
        for guest, number in ((inside, 1), (legless, 3)):
            assert guest.ping(f"10.77.{number}.1")
            others = (INSIDE, INSIDE6, OUTER, "169.254.128.1", "fd00:0:0:ffff::1", "10.77.2.1", "10.77.2.2")
            assert not any(await answered(*(partial(guest.ping, address, wait=1) for address in others)))
        # Changed live, both ways.
        await rig.apply(outgoing(1), outgoing(2, internal=True))
        assert inside.ping(INSIDE)
        assert not outside.ping(INSIDE, wait=1)
        assert outside.ping("10.77.2.1")


async def test_networks_do_not_reach_each_other_whatever_routes_they_have() -> None:
    async with connected() as (rig, _):
        await rig.apply(outgoing(1), outgoing(2), outgoing(3, masquerade_disabled=True))
        guests = {number: await join(rig, number, 2) for number in (1, 2, 3)}
        for mine, guest in guests.items():
            for family, hop in (("-4", f"10.77.{mine}.1"), ("-6", f"fd00:77:{mine}::1")):
                for prefix in ("10.77.0.0/16", "169.254.128.0/18") if family == "-4" else ("fd00::/16",):
                    guest.run("ip", family, "route", "add", prefix, "via", hop)
        for theirs, target in guests.items():
            v4, v6 = f"10.77.{theirs}.2", f"fd00:77:{theirs}::2"
            with listen(target.netns, v4, 80), listen(target.netns, v6, 80):
                assert answers(rig.netns, v4, 80, 10), "the helper itself reaches it"
                assert answers(rig.netns, v6, 80, 10)
                legs = outgoing(theirs).uplink_addresses
                attempts = [
                    (guest, address)
                    for mine, guest in guests.items()
                    if mine != theirs
                    for address in (v4, v6, *(leg.partition("/")[0] for leg in legs))
                ]
                pings = [partial(guest.ping, address, wait=1) for guest, address in attempts]
                connections = [partial(answers, guest.netns, address, 80) for guest, address in attempts]
                assert not any(await answered(*pings, *connections))


async def test_the_helper_is_closed_to_the_networks_and_its_outside() -> None:
    async with connected() as (rig, net):
        sh("ip", "-n", rig.netns, "addr", "add", "192.0.2.77/32", "dev", "lo")
        await rig.apply(outgoing(1))
        guest = await join(rig, 1, 2)
        net.run("ip", "route", "add", "169.254.128.0/18", "via", OUTER)
        with listen(rig.netns, "0.0.0.0", 8080), listen(rig.netns, "::", 8081):
            assert answers(net.netns, OUTER, 8080, 10), "what is not ours is not touched"
            attempts = [(address, 8080) for address in (OUTER, "192.0.2.77", "169.254.128.1", "10.77.1.99")]
            attempts += [(address, 8081) for address in (OUTER6, "fd00:0:0:ffff::1", "fd00:77:1::99")]
            assert not any(await answered(*(partial(answers, guest.netns, *attempt) for attempt in attempts)))
        assert not net.run("ping", "-n", "-c1", "-W1", "169.254.128.2", check=False).count(" 0% packet loss")
        assert guest.ping(INSIDE)


async def test_the_helpers_connections_come_from_the_gateway() -> None:
    async with connected() as (rig, _):
        await rig.apply(outgoing(1), outgoing(2, masquerade_disabled=True, endpoints_isolated=True))
        for number in (1, 2):
            guest = await join(rig, number, 2)
            for address, gateway in (
                (f"10.77.{number}.2", f"10.77.{number}.1"),
                (f"fd00:77:{number}::2", f"fd00:77:{number}::1"),
            ):
                with listen(guest.netns, address, 80) as server:
                    assert peer_seen(server, rig.netns, address) == gateway
                with listen(guest.netns, address, 53, socket.SOCK_DGRAM) as server:
                    family = server.family
                    with in_netns(rig.netns, lambda family=family: socket.socket(family, socket.SOCK_DGRAM)) as client:
                        client.settimeout(10)
                        client.connect((address, 53))
                        client.send(b"question")
                        question, peer = server.recvfrom(64)
                        assert (question, peer[0]) == (b"question", gateway)
                        server.sendto(b"answer", peer)
                        assert client.recv(64) == b"answer"
            refused = in_netns(rig.netns, socket.socket)
            with refused, pytest.raises(ConnectionRefusedError):
                refused.settimeout(10)
                refused.connect((f"10.77.{number}.2", 81))


async def test_isolated_endpoints_reach_all_but_each_other() -> None:
    async with connected() as (rig, _):
        await rig.apply(outgoing(1))
        a, b = await join(rig, 1, 2, "a"), await join(rig, 1, 3, "b")
        detours = (("10.77.1.3/32", "10.77.1.1"), ("fd00:77:1::3/128", "fd00:77:1::1"))

        async def reached(wait: int) -> list[bool]:
            return await answered(*(partial(a.ping, address, wait=wait) for address in ("10.77.1.3", "fd00:77:1::3")))

        def else_reached() -> list[bool]:
            others = ("10.77.1.1", "fd00:77:1::1", INSIDE, INSIDE6)
            return [*(a.ping(address) for address in others), a.dig("169.254.64.1", "+short", "b.net1") == "10.77.1.3"]

        assert await reached(10) == [True, True]
        await rig.apply(outgoing(1, endpoints_isolated=True))
        assert await reached(1) == [False, False]
        assert else_reached() == [True] * 5
        for target, hop in detours:
            a.run("ip", "route", "add", target, "via", hop)
        assert await reached(1) == [False, False], "nor by way of the gateway"
        late = await join(rig, 1, 4, "late")
        assert not late.ping("10.77.1.3", wait=1)
        assert late.ping(INSIDE)
        with listen(b.netns, "10.77.1.3", 80) as server:
            assert peer_seen(server, rig.netns, "10.77.1.3") == "10.77.1.1"
        for target, _ in detours:
            a.run("ip", "route", "del", target)
        await rig.apply(outgoing(1))
        assert await reached(10) == [True, True]


async def test_a_route_of_the_machines_own_stays() -> None:
    async with connected() as (rig, net):
        mine = network(9, subnets=["192.0.2.0/24"], gateways=["192.0.2.1"])
        mine.uplink_addresses, mine.uplink_mac = outgoing(9).uplink_addresses, outgoing(9).uplink_mac
        before = sh("ip", "-n", rig.netns, "route")
        assert await rpc_status(lambda: rig.apply(mine)) == "FAILED_PRECONDITION"
        assert sh("ip", "-n", rig.netns, "route") == before
        outcome = await rig.client.sync(SyncRequest(uplink=UPLINK, networks=[outgoing(1), mine, outgoing(2)]))
        assert [failure.id for failure in outcome.failures] == ["n9"]
        guest = await join(rig, 1, 2)
        with listen(net.netns, INSIDE, 80) as server:
            assert peer_seen(server, guest.netns, INSIDE) == OUTER

"""Hot changes: connect and disconnect, updates in place, names, snapshots, many at once; and what bad requests do."""

from __future__ import annotations

import re
import subprocess
import time
from dataclasses import replace

import pytest
import trio
from test_helper_failures import Pinger, interfaces
from test_helper_rig import Guest, Rig, endpoint, eventually, helper, network, rpc_status, sh

from agent_helper.spares import SpareTaps
from taploom.contracts.taploom.helper.v1 import (
    ApplyEndpointRequest,
    ApplyNetworkRequest,
    AuthorizeLinkRequest,
    DeleteEndpointRequest,
    DeleteNetworkRequest,
    Endpoint,
    ListEndpointsRequest,
    ListNetworksRequest,
    Network,
    SyncRequest,
)

pytestmark = pytest.mark.system


def unknown(guest: Guest, server: str, name: str) -> bool:
    """Whether the server does not know the name (any more: until it has read the list of names again, it says so by
    NXDOMAIN)."""
    return re.search("status: (REFUSED|NXDOMAIN)", guest.dig(server, name)) is not None


async def test_hot_connect_and_disconnect_leave_nothing_and_disturb_nobody() -> None:
    async with helper() as rig:
        await rig.apply(network(1), network(2, ipv6=True))
        a = await rig.guest(endpoint(1, 2, "web"))
        await rig.guest(endpoint(1, 3, "db"))
        fixed = await rig.guest(endpoint(2, 2, "fixed", ipv6=True), dns="169.254.64.2")
        # The first cycle makes what is made once.
        hot = endpoint(2, 9, "hot", "alias", ipv6=True)
        await rig.apply(hot)
        await rig.delete_endpoint("e2-9")
        before = await rig.counted()
        pinger = Pinger(a, "10.77.1.3", rig.folder / "ping")
        try:
            for cycle in range(60):
                if cycle % 20 == 0:  # with a link, and answers
                    guest = await rig.guest(hot)
                    assert guest.ping("10.77.2.2")
                    assert guest.ping("fd00:77:2::2")
                    assert fixed.dig("169.254.64.2", "+short", "alias.net2") == "10.77.2.9"
                    await rig.delete_endpoint("e2-9")
                    await rig.drop(guest)
                else:
                    (status,) = await rig.apply(hot)
                    assert status.port_up
                    await rig.delete_endpoint("e2-9")
                if cycle % 10 == 0:
                    await rig.apply(network(3), endpoint(3, 2, "passing"))
                    await rig.delete_network("n3")
            await pinger.answered_after(time.time())
        finally:
            pinger.stop()
        assert len(pinger.answers()) > 100
        assert pinger.lost() == 0
        after: dict[str, int] = {}

        def same() -> bool:
            after.update(rig.count())
            return after == before

        try:
            await eventually(same)
        except trio.TooSlowError:
            assert after == before
        assert unknown(fixed, "169.254.64.2", "alias.net2")


async def test_names() -> None:
    async with helper() as rig:
        await rig.apply(network(1, ipv6=True))
        a = await rig.guest(endpoint(1, 2, "web", ipv6=True), dns="169.254.64.1")
        await rig.apply(endpoint(1, 3, "db", "Postgres", "shared", ipv6=True), endpoint(1, 4, "four", "shared"))
        server = "169.254.64.1"

        def short(*question: str) -> set[str]:
            return set(a.dig(server, "+short", *question).split())

        for name in ("db", "db.net1", "DB", "dB.NeT1", "postgres", "POSTGRES.net1"):
            assert short(name) == {"10.77.1.3"}, name
            assert short("AAAA", name) == {"fd00:77:1::3"}, name
            assert short("+tcp", name) == {"10.77.1.3"}, name
        assert short("shared") == {"10.77.1.3", "10.77.1.4"}
        assert short("-x", "10.77.1.3") == {"db.net1."}
        assert short("-x", "fd00:77:1::3") == {"db.net1."}
        known = a.dig(server, "AAAA", "four")
        assert "NOERROR" in known
        assert "ANSWER: 0" in known
        assert short("MX", "four") == set()
        await rig.apply(endpoint(1, 6, "six", "api.example.com"))
        # A parent of a name that is known is not.
        for name in ("nobody", "nobody.net1", "net1", "example.com", "com", "www.example.com"):
            for kind in ("A", "AAAA", "TXT"):
                assert "REFUSED" in a.dig(server, kind, name), (kind, name)
        for name in ("api.example.com", "six", "six.net1"):
            assert short(name) == {"10.77.1.6"}
            assert "NOERROR" in a.dig(server, "AAAA", name)
            assert short("AAAA", name) == set()
        assert "REFUSED" in a.dig(server, "-x", "10.77.1.77")
        assert re.search(r"\s600\s+IN\s+A\s", a.dig(server, "db"))
        # Changes show at once, and touch neither port nor dnsmasq.
        before = await rig.daemons()
        await rig.apply(endpoint(1, 3, "database", ipv6=True))
        assert short("database") == {"10.77.1.3"}
        assert unknown(a, server, "db")
        assert short("shared") == {"10.77.1.4"}
        assert short("-x", "10.77.1.3") == {"database.net1."}
        await rig.delete_endpoint("e1-3")
        assert unknown(a, server, "database.net1")
        assert {n: d.pid for n, d in (await rig.daemons()).items()} == {n: d.pid for n, d in before.items()}
        # Names that DNS cannot carry are left out; the others are there.
        await rig.apply(endpoint(1, 5, "x" * 70, "a..b", "fine"))
        assert short("fine") == {"10.77.1.5"}


async def test_changes_in_place() -> None:
    async with helper() as rig:
        await rig.apply(network(1, ipv6=True))
        a = await rig.guest(endpoint(1, 2, "web", ipv6=True), dns="169.254.64.1")
        b = await rig.guest(endpoint(1, 3, "db", ipv6=True))
        (before,) = await rig.apply(endpoint(1, 3, "db", ipv6=True))
        # Another address: same TAP, same link.
        (after,) = await rig.apply(endpoint(1, 3, "db", addresses=["10.77.1.33"]))
        assert (after.tap, after.link_up) == (before.tap, True)
        b.run("ip", "addr", "del", "10.77.1.3/24", "dev", "eth0")
        b.run("ip", "addr", "add", "10.77.1.33/24", "dev", "eth0")
        assert a.ping("10.77.1.33")
        assert not a.ping("fd00:77:1::3", wait=1)
        assert a.dig("169.254.64.1", "+short", "db") == "10.77.1.33"
        # Another MTU, and another gateway.
        await rig.apply(network(1, ipv6=True, mtu=9000, gateways=["10.77.1.254", "fd00:77:1::fe"]))
        assert "mtu 9000" in sh("ip", "-n", rig.netns, "link", "show", after.tap)
        assert a.ping("10.77.1.254")
        assert a.ping("fd00:77:1::fe")
        assert not a.ping("10.77.1.1", wait=1)
        for guest in (a, b):
            guest.run("ip", "link", "set", "eth0", "mtu", "9000")
        assert " 0% packet loss" in a.run("ping", "-n", "-c1", "-Mdo", "-s8900", "10.77.1.33", check=False)
        # Another name and DNS address of the network.
        await rig.apply(renamed())
        a.run("ip", "route", "add", "169.254.64.77/32", "dev", "eth0", "scope", "link")
        assert a.dig("169.254.64.77", "+short", "db.renamed") == "10.77.1.33"
        # Disabled and enabled again.
        (off,) = await rig.apply(endpoint(1, 3, "db", addresses=["10.77.1.33"], disabled=True))
        assert (off.tap, off.port_up) == ("", False)
        await eventually(lambda: after.tap not in interfaces(rig))
        assert not a.ping("10.77.1.33", wait=1)
        assert unknown(a, "169.254.64.77", "db.renamed")
        (on,) = await rig.apply(endpoint(1, 3, "db", addresses=["10.77.1.33"]))
        assert on.port_up
        await rig.link(b, "e1-3")
        assert a.ping("10.77.1.33")


def renamed() -> Network:
    gateways = ["10.77.1.254", "fd00:77:1::fe"]
    return network(1, ipv6=True, mtu=9000, gateways=gateways, name="renamed", dns_servers=["169.254.64.77"])


async def test_an_endpoint_moves_to_another_network() -> None:
    async with helper() as rig:
        await rig.apply(network(1), network(2))
        b = await rig.guest(endpoint(2, 3))
        await rig.apply(endpoint(1, 2, "web"))
        moved = replace(endpoint(2, 2, "web"), endpoint_id="e1-2")
        (status,) = await rig.apply(moved)
        assert status.port_up
        a = await rig.guest(moved)
        assert a.ping("10.77.2.3")
        assert b.ping("10.77.2.2")
        assert "ep-e1-2" not in rig.db("nb", "lsp-list", "net-n1")


async def test_tcp_goes_through_with_and_without_offloads() -> None:
    async with helper() as rig:
        await rig.apply(network(1))
        a = await rig.guest(endpoint(1, 2))
        b = await rig.guest(endpoint(1, 3))
        server = subprocess.Popen(
            ["ip", "netns", "exec", b.netns, "iperf3", "-s"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            await eventually(lambda: ":5201" in b.run("ss", "-ltn"))
            for reverse in ([], ["-R"]):
                for offload in ("on", "off"):
                    a.run("ethtool", "-K", "eth0", "tx", offload, "tso", offload, check=False)
                    text = a.run("iperf3", "-c", "10.77.1.3", "-n", "30M", *reverse)
                    assert "receiver" in text
                    print(reverse, offload, re.findall(r"[\d.]+ .bits/sec", text)[-1])
        finally:
            server.kill()
            server.wait()
        status = (await rig.client.list_endpoints(ListEndpointsRequest())).endpoints[0]
        assert status.counters is not None
        assert status.counters.rx_bytes > 50_000_000


async def test_sync_makes_everything_as_described() -> None:
    async with helper() as rig:
        await rig.apply(network(1), network(2), endpoint(2, 2, "old"))
        a = await rig.guest(endpoint(1, 2, "web"), dns="169.254.64.1")
        b = await rig.guest(endpoint(1, 3, "db"))
        pinger = Pinger(a, "10.77.1.3", rig.folder / "ping")
        try:
            await pinger.answered_after(0)
            many = [endpoint(4, host, f"host{host}") for host in range(2, 152)]
            wanted = [endpoint(1, 2, "web"), endpoint(1, 3, "renamed"), *many]
            wrong = [endpoint(1, 4, addresses=["10.99.0.1"]), endpoint(9, 2), endpoint(1, 3, "twice")]
            wrong_networks = [replace(network(5), mtu=1)]
            response = await rig.client.sync(
                SyncRequest(networks=[network(1), network(4), *wrong_networks], endpoints=[*wanted, *wrong]), timeout=60
            )
            await pinger.answered_after(time.time())
        finally:
            pinger.stop()
        assert sorted(response.removed_ids) == ["e2-2", "n2"]
        failures = {failure.id: failure for failure in response.failures}
        assert set(failures) == {"e1-4", "e9-2", "e1-3", "n5"}
        assert (failures["n5"].code, failures["e1-4"].code, failures["e9-2"].code) == (3, 3, 9)
        assert "twice" in failures["e1-3"].message
        assert {status.endpoint.endpoint_id for status in response.endpoints if status.endpoint is not None} == {
            e.endpoint_id for e in wanted
        }
        assert all(status.port_up for status in response.endpoints)
        assert pinger.lost() == 0
        assert a.dig("169.254.64.1", "+short", "renamed") == "10.77.1.3"
        assert b.ping("10.77.1.2")
        # Addresses may change hands within a snapshot.
        swapped = [
            endpoint(1, 2, "web", addresses=["10.77.1.3"]),
            endpoint(1, 3, "renamed", addresses=["10.77.1.2"]),
        ]
        response = await rig.client.sync(SyncRequest(networks=[network(1)], endpoints=swapped), timeout=60)
        assert not response.failures
        assert len(response.removed_ids) == 151
        networks = (await rig.client.list_networks(ListNetworksRequest())).networks
        assert [n.network_id for n in networks] == ["n1"]
        response = await rig.client.sync(SyncRequest())
        assert sorted(response.removed_ids) == ["e1-2", "e1-3", "n1"]
        await eventually(lambda: len(interfaces(rig) - {"lo", "br-int", "ovs-netdev"}) == SpareTaps.COUNT)


async def test_many_requests_at_once() -> None:
    async with helper() as rig:
        statuses: list[str] = []

        async def change(number: int) -> None:
            for turn in range(3):
                await rig.apply(network(number))
                await rig.apply(endpoint(number, 2, f"name{turn}"), endpoint(number, 3))
                await rig.delete_endpoint(f"e{number}-2")
                if turn % 2:
                    await rig.delete_network(f"n{number}")

        async def hammer(number: int) -> None:
            # Whatever the others do at that moment, each call succeeds or says what was in its way.
            for _ in range(8):
                request = ApplyEndpointRequest(endpoint=endpoint(number, 5, "hammer"))
                statuses.append(await rpc_status(lambda request=request: rig.client.apply_endpoint(request)))
                delete = DeleteEndpointRequest(endpoint_id=f"e{number}-5")
                statuses.append(await rpc_status(lambda delete=delete: rig.client.delete_endpoint(delete)))

        async with trio.open_nursery() as nursery:
            for number in range(1, 7):
                nursery.start_soon(change, number)
                nursery.start_soon(hammer, number)
        assert set(statuses) <= {"OK", "FAILED_PRECONDITION"}
        ids = [status.endpoint.endpoint_id for status in await endpoints(rig) if status.endpoint is not None]
        assert ids == [f"e{number}-3" for number in range(1, 7)]
        await rig.client.sync(SyncRequest())
        await eventually(lambda: len(interfaces(rig) - {"lo", "br-int", "ovs-netdev"}) == SpareTaps.COUNT)
        assert "Traceback" not in rig.log()


async def endpoints(rig: Rig) -> list:  # type: ignore[type-arg]
    return (await rig.client.list_endpoints(ListEndpointsRequest())).endpoints


async def test_a_cancelled_call_leaves_nothing_half_done() -> None:
    async with helper() as rig:
        await rig.apply(network(1))
        for wait in (0.0, 0.001, 0.003, 0.006, 0.01, 0.02):
            with trio.move_on_after(wait):
                await rig.client.apply_endpoint(ApplyEndpointRequest(endpoint=endpoint(1, 2, "web")))
            await rig.apply(endpoint(1, 2, "web"))
            with trio.move_on_after(wait):
                await rig.client.delete_endpoint(DeleteEndpointRequest(endpoint_id="e1-2"))
            await rig.delete_endpoint("e1-2")
        assert not await endpoints(rig)
        # lo, br-int, ovs-netdev and the DNS server's
        await eventually(lambda: len(interfaces(rig)) == 4 + SpareTaps.COUNT)


async def test_endpoints_have_spare_taps_while_there_are_some() -> None:
    async with helper() as rig:
        await rig.counted()
        first = rig.spares()
        await rig.apply(network(1), network(2, mtu=9000))
        a, b = await rig.guest(endpoint(1, 2, "web")), await rig.guest(endpoint(1, 3, "db"))
        taps = {status.tap for status in await endpoints(rig)}
        assert taps <= first
        assert a.ping("10.77.1.3")
        assert b.ping("10.77.1.2")
        (jumbo,) = await rig.apply(endpoint(2, 2, "jumbo"))
        assert jumbo.tap not in first
        await rig.counted()
        second = rig.spares()
        assert not second & taps
        # More at once than there are.
        await rig.apply(*(endpoint(1, 10 + n, f"many{n}") for n in range(2 * SpareTaps.COUNT)))
        found = {status.tap for status in await endpoints(rig)}
        assert len(found) == 3 + 2 * SpareTaps.COUNT
        assert found & second
        await rig.delete_network("n1")
        await rig.counted()
        assert not rig.spares() & (found | first)


BAD_NETWORKS = {
    "no id": network(1, network_id=""),
    "id with a slash": network(1, network_id="a/b"),
    "long id": network(1, network_id="a" * 65),
    "name with a line": network(1, name="a\n10.0.0.1 bank"),
    "name with a space": network(1, name="a b"),
    "no subnets": network(1, subnets=[], gateways=[]),
    "no CIDR": network(1, subnets=["10.77.1.0"]),
    "host bits": network(1, subnets=["10.77.1.1/24"]),
    "two of a family": network(1, subnets=["10.77.1.0/24", "10.78.1.0/24"], gateways=["10.77.1.1", "10.78.1.1"]),
    "gateway outside": network(1, gateways=["10.78.1.1"]),
    "gateway is the network": network(1, gateways=["10.77.1.0"]),
    "no gateway": network(1, gateways=[]),
    "multicast MAC": network(1, gateway_mac="01:00:00:00:00:01"),
    "no MAC": network(1, gateway_mac="zz"),
    "small MTU": network(1, mtu=67),
    "large MTU": network(1, mtu=65536),
    "small MTU for IPv6": network(1, ipv6=True, mtu=1279),
    "DNS inside": network(1, dns_servers=["10.77.1.5"]),
    "DNS MAC missing": network(1, dns_mac=""),
    "multicast subnet": network(1, subnets=["224.0.0.0/24"], gateways=["224.0.0.1"]),
}
BAD_ENDPOINTS = {
    "no id": endpoint(1, 2, endpoint_id=""),
    "id with a quote": endpoint(1, 2, endpoint_id='a"b'),
    "multicast MAC": endpoint(1, 2, mac_address="03:00:00:00:00:01"),
    "gateway's MAC": endpoint(1, 2, mac_address="02:00:00:00:01:01"),
    "no address": endpoint(1, 2, addresses=[]),
    "address with length": endpoint(1, 2, addresses=["10.77.1.2/24"]),
    "address outside": endpoint(1, 2, addresses=["10.77.2.2"]),
    "gateway's address": endpoint(1, 2, addresses=["10.77.1.1"]),
    "broadcast address": endpoint(1, 2, addresses=["10.77.1.255"]),
    "other family": endpoint(1, 2, addresses=["fd00::1"]),
    "two of a family": endpoint(1, 2, addresses=["10.77.1.2", "10.77.1.4"]),
    "taken address": endpoint(1, 9, addresses=["10.77.1.3"]),
    "taken MAC": endpoint(1, 9, mac_address="02:00:00:00:01:03"),
    "name with a line": endpoint(1, 2, "web\n10.0.0.1 bank"),
    "name with a tab": endpoint(1, 2, "web\tbank"),
    "name with a comment": endpoint(1, 2, "web#"),
    "empty name": endpoint(1, 2, ""),
    "many names": endpoint(1, 2, *(f"n{n}" for n in range(300))),
}


async def test_bad_requests_are_refused_and_change_nothing() -> None:
    async with helper() as rig:
        await rig.apply(network(1), endpoint(1, 3, "db"))
        before = await rig.counted()

        async def network_status(message: Network | None) -> str:
            return await rpc_status(lambda: rig.client.apply_network(ApplyNetworkRequest(network=message)))

        async def endpoint_status(message: Endpoint | None, secret: bytes = b"") -> str:
            request = ApplyEndpointRequest(endpoint=message, link_secret=secret)
            return await rpc_status(lambda: rig.client.apply_endpoint(request))

        for what, bad_network in BAD_NETWORKS.items():
            assert await network_status(bad_network) == "INVALID_ARGUMENT", what
        for what, bad_endpoint in BAD_ENDPOINTS.items():
            assert await endpoint_status(bad_endpoint) == "INVALID_ARGUMENT", what
        assert await network_status(None) == "INVALID_ARGUMENT"
        assert await endpoint_status(None) == "INVALID_ARGUMENT"
        assert await endpoint_status(endpoint(1, 2), b"short") == "INVALID_ARGUMENT"
        assert await endpoint_status(endpoint(7, 2)) == "FAILED_PRECONDITION"
        # A network cannot leave its endpoints' addresses behind.
        other = network(1, subnets=["10.99.0.0/24"], gateways=["10.99.0.1"])
        assert await network_status(other) == "FAILED_PRECONDITION"
        for secret, status in ((b"", "INVALID_ARGUMENT"), (b"x" * 65, "INVALID_ARGUMENT"), (b"x" * 32, "NOT_FOUND")):
            request = AuthorizeLinkRequest(endpoint_id="nobody", secret=secret)
            assert await rpc_status(lambda request=request: rig.client.authorize_link(request)) == status
        # Removing what is not there is success; twice the same is once.
        await rig.client.delete_endpoint(DeleteEndpointRequest(endpoint_id="nobody"))
        await rig.client.delete_network(DeleteNetworkRequest(network_id="nothing"))
        await rig.apply(network(1), endpoint(1, 3, "db"))
        assert rig.count() == before
        assert "Traceback" not in rig.log()

"""What Docker's API needs of the fabric: uplink, streams, names of containers, events, many clients at once."""

from __future__ import annotations

import dataclasses
import datetime
import random
import socket
import subprocess
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from bridge_support import FakeGuest, Rig, open_rig, unchanged

from host_bridge.errors import (
    ActiveEndpointsError,
    BridgeError,
    NameInUseError,
    NetworkNotFoundError,
    PredefinedNetworkError,
    UnavailableError,
)
from host_bridge.events import FabricEvent
from host_bridge.host_addresses import HostAddresses, host_networks, read_addresses
from host_bridge.model import (
    OPTION_ICC,
    ContainerRecord,
    EndpointOptions,
    GuestSettings,
    NetworkOptions,
    SubnetOptions,
)
from host_bridge.peer import PeerState
from taploom.contracts.taploom.guest.v1 import GuestFeature
from taploom.contracts.taploom.helper import v1 as helper
from taploom.contracts.taploom.link.v1 import StreamProtocol
from taploom.rpc import RpcError, StatusCode


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path, upstreams=("9.9.9.9",)) as rig:
        yield rig


async def container(rig: Rig, name: str, **settings: object) -> FakeGuest:
    """A guest that is a container, connected when this returns."""
    container_id = uuid.uuid4().hex * 2
    rig.store.insert_container(ContainerRecord(container_id, name, datetime.datetime.now(datetime.UTC)))
    agent = await rig.guest(name, register=False)
    await rig.fabric.register_guest(
        name,
        agent.control,
        guest_id=container_id,
        settings=GuestSettings(hostname=container_id[:12], **settings),  # type: ignore[arg-type]  # the caller's
    )
    await rig.until(lambda: rig.peer(name).state is PeerState.OK)
    return agent


def followed(rig: Rig) -> list[FabricEvent]:
    events: list[FabricEvent] = []
    rig.fabric.events.subscribe(events.append)
    return events


# The helper


async def test_helper_is_told_of_uplink_and_default_bridge(rig: Rig) -> None:
    default = rig.fabric.desired.find_network("bridge")
    assert set(rig.helper.networks) == {default.id}
    told = rig.helper.networks[default.id]
    assert (told.dns_servers, told.dns_mac) == ([], "")
    assert (told.uplink_addresses, told.uplink_mac) == (["169.254.128.2/18"], default.uplink_mac)
    assert rig.helper.uplink is not None
    assert rig.helper.uplink.addresses[0] == "169.254.128.1/18"
    assert rig.helper.uplink.addresses[1].endswith(":ffff::1/64")
    await rig.fabric.create_network("inside", NetworkOptions(internal=True))
    quiet = await rig.fabric.create_network("quiet", NetworkOptions(options={OPTION_ICC: "false"}, enable_ipv6=True))
    inside = next(one for one in rig.helper.networks.values() if one.name == "inside")
    assert (inside.internal, inside.uplink_addresses, inside.uplink_mac) == (True, [], "")
    assert rig.helper.networks[quiet.id].endpoints_isolated
    assert [a.rpartition("/")[2] for a in rig.helper.networks[quiet.id].uplink_addresses] == ["18", "64"]


async def test_configurations_never_go_to_the_helper(rig: Rig) -> None:
    before = list(rig.helper.calls)
    record = await rig.fabric.create_network("conf", NetworkOptions(config_only=True, options={"a": "b"}))
    assert record.active
    await rig.fabric.delete_network("conf")
    assert rig.helper.calls == before


async def test_helper_without_egress_is_told_of_no_uplink(tmp_path: Path) -> None:
    async with open_rig(tmp_path, run_helper=False) as rig:
        rig.helper.features = [helper.HelperFeature.EVENTS]
        await rig.nursery.start(rig.helper.run)
        await rig.fabric.create_network("app")
        assert rig.helper.uplink is None
        assert not {"ApplyUplink", "AuthorizeStreams"} & set(rig.helper.calls)
        assert rig.fabric.helper.stream_secret is None


async def test_streams_have_a_secret_per_connection(rig: Rig) -> None:
    peer = rig.fabric.helper
    await rig.until(lambda: peer.stream_secret is not None)
    first = peer.stream_secret
    assert first == rig.helper.stream_secret and first is not None and len(first) >= 16
    # A Sync on the same connection changes nothing.
    rig.helper.tell(helper.WatchEventsResponse(resync_needed=helper.ResyncNeeded(reason="again")))
    await rig.until(lambda: rig.helper.calls.count("AuthorizeStreams") == 2)
    assert rig.helper.stream_secret == first
    await rig.helper.stop()
    await rig.until(lambda: not peer.connected)
    assert peer.stream_secret is None
    await rig.nursery.start(rig.helper.run)
    await rig.until(lambda: peer.stream_secret is not None)
    assert peer.stream_secret == rig.helper.stream_secret != first


async def test_streams_that_the_helper_refuses_are_tried_again(tmp_path: Path) -> None:
    async with open_rig(tmp_path, run_helper=False) as rig:
        rig.helper.fail["AuthorizeStreams"] = RpcError(StatusCode.UNAVAILABLE, "not yet")
        rig.helper.fail["ApplyUplink"] = RpcError(StatusCode.UNAVAILABLE, "not yet")
        await rig.nursery.start(rig.helper.run)
        await rig.fabric.create_network("app")
        assert rig.fabric.helper.stream_secret is None
        rig.helper.fail.clear()
        await rig.until(lambda: rig.fabric.helper.stream_secret is not None)


async def test_streams_wanted_go_to_whoever_joins_them(rig: Rig) -> None:
    def wanted(token: bytes) -> helper.WatchEventsResponse:
        stream = helper.StreamWanted(
            token=token, protocol=StreamProtocol.TCP, network_id="n", address="172.17.0.1", port=80
        )
        return helper.WatchEventsResponse(stream_wanted=stream)

    # Nobody joins them: the container is told at once.
    rig.helper.tell(wanted(b"1"))
    with trio.fail_after(60):
        await rig.helper.until(lambda: rig.helper.refused_streams == [b"1"])
    seen: list[helper.StreamWanted] = []
    rig.fabric.on_stream_wanted = seen.append
    rig.helper.tell(wanted(b"2"))
    await rig.until(lambda: len(seen) == 1)
    assert (seen[0].token, seen[0].address, seen[0].port) == (b"2", "172.17.0.1", 80)
    await rig.fabric.helper.refuse_stream(b"2")
    assert rig.helper.refused_streams == [b"1", b"2"]


async def test_host_addresses_follow_the_machine() -> None:
    """In a network namespace of its own, where addresses can come and go."""
    script = """
import subprocess, sys, trio
from host_bridge.host_addresses import HostAddresses, host_networks

async def main():
    addresses = HostAddresses()
    changed = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(addresses.run, lambda: changed.set())
        assert addresses.current() == (), addresses.current()
        for command in (
            "link add tlt0 type veth peer name tlt1", "addr add 10.77.0.5/24 dev tlt0", "link set tlt1 up",
            "addr add fd77::5/64 dev tlt0 nodad", "addr add 127.0.0.9/8 dev lo", "link set tlt0 up",
            "link add tlt2 type bridge", "addr add 10.78.0.1/24 dev tlt2", "link set tlt2 up",
        ):
            subprocess.run(["ip", *command.split()], check=True)
        with trio.fail_after(60):
            while addresses.current() != ("10.77.0.5", "10.78.0.1", "fd77::5"):
                await changed.wait()
                changed = trio.Event()
        assert sorted(map(str, host_networks())) == ["10.77.0.0/24", "fd77::/64"], host_networks()
        subprocess.run(["ip", "addr", "del", "10.77.0.5/24", "dev", "tlt0"], check=True)
        with trio.fail_after(60):
            while addresses.current() != ("10.78.0.1", "fd77::5"):
                await changed.wait()
                changed = trio.Event()
        nursery.cancel_scope.cancel()

trio.run(main)
"""
    # sysfs shows the network namespace of whoever mounted it.
    mounted = 'mount -t sysfs none /sys && exec python -c "$1"'
    command = ["unshare", "--user", "--map-root-user", "--mount", "--net", "sh", "-c", mounted, "sh", script]
    await trio.run_process(command, capture_stdout=True)


async def test_host_addresses_go_to_the_helper(tmp_path: Path) -> None:
    addresses = HostAddresses()
    async with open_rig(tmp_path, host_addresses=addresses) as rig:
        await rig.until(lambda: rig.helper.uplink is not None)
        assert rig.helper.uplink is not None
        assert rig.helper.uplink.host_addresses == sorted(addresses.current())
        # As after a change that the kernel told.
        addresses._current = ("198.51.100.7",)
        rig.fabric.helper.touch("uplink")
        await rig.until(lambda: "ApplyUplink" in rig.helper.calls)
        assert rig.helper.uplink.host_addresses == ["198.51.100.7"]


def test_own_addresses_are_the_kernels() -> None:
    output = subprocess.run(["ip", "-brief", "addr"], check=True, capture_output=True, text=True).stdout
    told = {part for line in output.splitlines() for part in line.split()[2:] if "/" in part}
    mine = {str(one.address) for one in read_addresses()}
    assert mine <= told
    assert all(not one.address.is_loopback for one in read_addresses())
    assert all(network.version in (4, 6) for network in host_networks())
    assert socket.if_nameindex()


# Names of containers


async def test_resolver_follows_connect_and_disconnect(rig: Rig) -> None:
    web = await container(rig, "web", extra_hosts=(("x", "1.2.3.4"),))
    own = web.resolver.hostname if web.resolver is not None else ""
    assert web.resolver is not None and web.resolver.direct and web.resolver.manage_hosts
    assert [(e.address, e.names) for e in web.resolver.hosts] == [("1.2.3.4", ["x"])]
    await rig.fabric.create_network("app")
    await rig.fabric.connect("app", "web")
    # On return, not later.
    assert not web.resolver.direct
    assert [(e.address, e.names) for e in web.resolver.hosts] == [("1.2.3.4", ["x"]), ("172.18.0.2", [own])]
    await rig.fabric.disconnect("app", "web")
    assert web.resolver.direct
    assert [e.address for e in web.resolver.hosts] == ["1.2.3.4"]
    # After the agent was started again, it is told all in one.
    await rig.fabric.connect("bridge", "web")
    await web.stop()
    web.interfaces.clear()
    web.resolver = None
    await rig.nursery.start(web.run)
    await rig.until(lambda: web.resolver is not None)
    assert [e.address for e in web.resolver.hosts] == ["1.2.3.4", "172.17.0.2"]


async def test_interface_and_resolver_are_told_at_the_same_time(rig: Rig) -> None:
    web = await container(rig, "web")
    await rig.fabric.create_network("app")
    before = len(web.calls)
    await rig.fabric.connect("app", "web")
    assert sorted(web.calls[before:]) == ["ApplyInterface", "ApplyResolver"]
    # Each waits for nothing of the other.
    await rig.fabric.create_network("back")
    web.hang = {"ApplyResolver"}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.fabric.connect, "back", "web")
        await rig.until(lambda: len(web.interfaces) == 2 and len(web.links) == 2)
        nursery.cancel_scope.cancel()


async def test_plain_guests_resolver_is_told_once(rig: Rig) -> None:
    web = await rig.guest("web")
    await rig.fabric.create_network("app")
    await rig.fabric.connect("app", "web")
    await rig.fabric.disconnect("app", "web")
    assert "ApplyResolver" not in web.calls
    assert web.resolver is not None and web.resolver.upstreams == ["9.9.9.9"]


async def test_refused_resolver_does_not_stop_a_connect(rig: Rig) -> None:
    web = await container(rig, "web")
    await rig.fabric.create_network("app")
    web.fail["ApplyResolver"] = RpcError(StatusCode.INTERNAL, "read-only file system")
    await rig.fabric.connect("app", "web")
    assert rig.peer("web").failures()
    web.fail.clear()
    await rig.until(lambda: web.resolver is not None and not web.resolver.direct)


async def test_old_guest_agent_gets_what_it_knows(rig: Rig) -> None:
    agent = await rig.guest("web", register=False, run=False)
    agent.features = [GuestFeature.EVENTS]
    await rig.nursery.start(agent.run)
    await rig.fabric.register_guest("web", agent.control)
    await rig.fabric.create_network("app")
    await rig.fabric.connect("app", "web")
    await rig.fabric.disconnect("app", "web")
    assert agent.resolver is not None and not agent.resolver.enabled
    assert "ApplyResolver" not in agent.calls


async def test_links_on_the_default_bridge_follow_their_target(rig: Rig) -> None:
    web, db = await container(rig, "web"), await container(rig, "db")
    assert db.resolver is not None
    await rig.fabric.connect("bridge", "web", EndpointOptions(links=[("database", "db")]))
    assert web.resolver is not None
    await rig.fabric.connect("bridge", "db")
    line = ("172.17.0.3", ["database", db.resolver.hostname, "db"])
    await rig.until(lambda: line in [(e.address, e.names) for e in web.resolver.hosts])  # type: ignore[union-attr]  # it is there
    await rig.fabric.remove_guest("db")
    await rig.until(lambda: len(web.resolver.hosts) == 1)  # type: ignore[union-attr]  # it is there


async def test_rename_is_live(rig: Rig) -> None:
    await container(rig, "web")
    await container(rig, "db")
    await rig.until(lambda: rig.fabric.helper.state is PeerState.OK)
    await rig.fabric.create_network("app")
    endpoint = await rig.fabric.connect("app", "web", EndpointOptions(aliases=["www"]))
    guest = rig.fabric.desired.find_guest("web")
    events = followed(rig)
    assert rig.helper.endpoints[endpoint.id].names[0] == "web"
    with unchanged(rig), pytest.raises(NameInUseError):
        await rig.fabric.rename_guest("web", "db")
    renamed = await rig.fabric.rename_guest("web", "front")
    assert (renamed.id, renamed.name) == (guest.id, "front")
    assert rig.helper.endpoints[endpoint.id].names == ["front", guest.id[:12], "www"]
    assert [event.kind for event in events] == ["guest-rename"]
    record = rig.store.container(guest.id)
    assert record is not None and record.name == "front"
    assert rig.link("front", "app").up
    # Its link is dialled again under the new name as under the old one.
    generation = rig.link("front", "app").generation
    rig.guests["web"].break_link(endpoint.id)
    await rig.until(lambda: rig.link("front", "app").up and rig.link("front", "app").generation > generation)


async def test_settings_change_live(rig: Rig) -> None:
    web = await container(rig, "web")
    guest = rig.fabric.desired.find_guest("web")
    await rig.fabric.update_guest_settings(guest.id, dataclasses.replace(guest.settings, dns=("8.8.8.8",)))
    await rig.until(lambda: web.resolver is not None and web.resolver.upstreams == ["8.8.8.8"])


# Events


async def test_events_are_told_whoever_asks(rig: Rig) -> None:
    def angry(event: FabricEvent) -> None:
        raise RuntimeError(event.kind)

    await rig.until(lambda: rig.fabric.helper.state is PeerState.OK)
    rig.fabric.events.subscribe(angry)
    events = followed(rig)
    await rig.guest("web")
    from taploom.contracts.taploom.bridge.v1 import (
        ConnectGuestRequest,
        CreateNetworkRequest,
        DeleteNetworkRequest,
        DisconnectGuestRequest,
        RemoveGuestRequest,
    )

    await rig.networks.create_network(CreateNetworkRequest(name="app", labels={"a": "b"}))
    await rig.networks.connect_guest(ConnectGuestRequest(network="app", guest="web", driver_options={"k": "v"}))
    await rig.networks.disconnect_guest(DisconnectGuestRequest(network="app", guest="web"))
    await rig.networks.connect_guest(ConnectGuestRequest(network="app", guest="web"))
    await rig.guest_api.remove_guest(RemoveGuestRequest(guest="web"))
    await rig.networks.delete_network(DeleteNetworkRequest(network="app"))
    await rig.helper.stop()
    await rig.until(lambda: not rig.fabric.helper.connected)
    await rig.nursery.start(rig.helper.run)
    await rig.until(lambda: events[-1].kind == "helper-up")
    assert [event.kind for event in events] == [
        "guest-register",
        "network-create",
        "endpoint-connect",
        "endpoint-disconnect",
        "endpoint-connect",
        "endpoint-disconnect",
        "guest-remove",
        "network-destroy",
        "helper-up",
    ]
    for event in events[2:6]:
        assert event.network is not None and event.guest is not None and event.endpoint is not None
        assert (event.network.name, event.guest.name, event.endpoint.network_id) == ("app", "web", event.network.id)
    assert events[1].network is not None and events[1].network.labels == {"a": "b"}
    assert [event.time for event in events] == sorted(event.time for event in events)


async def test_what_fails_is_no_event(tmp_path: Path) -> None:
    async with open_rig(tmp_path, run_helper=False) as rig:
        events = followed(rig)
        with pytest.raises(UnavailableError):
            await rig.fabric.create_network("app")
        assert events == []
        unsubscribe = rig.fabric.events.subscribe(events.append)
        unsubscribe()
        unsubscribe()


# Pruning, and many at once


async def test_prune_takes_what_nobody_uses(rig: Rig) -> None:
    await rig.guest("web")
    for name in ("used", "idle", "kept"):
        await rig.fabric.create_network(name, NetworkOptions(labels={"keep": "yes"} if name == "kept" else {}))
    await rig.fabric.create_network("conf", NetworkOptions(config_only=True))
    await rig.fabric.connect("used", "web")
    removed = await rig.fabric.prune_networks(lambda network: "keep" not in network.labels)
    assert [network.name for network in removed] == ["idle"]
    names = [network.name for network in rig.fabric.desired.networks()]
    assert names == ["bridge", "conf", "host", "kept", "none", "used"]


async def test_eight_clients_at_once_get_no_address_twice(rig: Rig) -> None:
    """Networks and endpoints come and go; what is refused is refused for a reason that dockerd has too."""
    clients, rounds = 8, 12
    pick = random.Random(7)
    for number in range(clients):
        await rig.guest(f"g{number}")
    await rig.fabric.create_network("shared", NetworkOptions(subnets=[SubnetOptions(subnet="10.1.0.0/24")]))
    allowed = (ActiveEndpointsError, NetworkNotFoundError)

    async def client(number: int) -> None:
        guest = f"g{number}"
        for turn in range(rounds):
            mine = f"n{number}-{turn}"
            await rig.fabric.create_network(mine)
            await rig.fabric.connect(mine, guest)
            await rig.fabric.connect("shared", guest)
            check()
            other = f"n{pick.randrange(clients)}-{turn}"
            try:
                await rig.fabric.delete_network(other)
            except BridgeError as error:
                assert isinstance(error, allowed), error
            await rig.fabric.disconnect("shared", guest)
            await rig.fabric.disconnect(mine, guest)
            try:
                await rig.fabric.delete_network(mine)
            except BridgeError as error:
                assert isinstance(error, allowed), error

    def check() -> None:
        endpoints = rig.store.endpoints()
        places = [(one.network_id, address) for one in endpoints for address in one.addresses]
        assert len(set(places)) == len(places)
        subnets = [subnet.subnet for network in rig.store.networks() for subnet in network.subnets]
        assert len(set(subnets)) == len(subnets)

    async with trio.open_nursery() as nursery:
        for number in range(clients):
            nursery.start_soon(client, number)
    assert [network.name for network in rig.fabric.desired.networks()] == ["bridge", "host", "none", "shared"]
    assert not rig.store.endpoints() and not rig.fabric.links
    with pytest.raises(PredefinedNetworkError):
        await rig.fabric.delete_network("bridge")
    await rig.until(lambda: not rig.helper.endpoints and len(rig.helper.networks) == 2)


async def test_network_cannot_go_while_a_guest_is_being_connected(rig: Rig) -> None:
    await rig.guest("web")
    network = await rig.fabric.create_network("app")
    rig.helper.hang = {"ApplyEndpoint"}
    async with trio.open_nursery() as nursery:
        nursery.start_soon(rig.fabric.connect, "app", "web")
        await rig.until(lambda: "ApplyEndpoint" in rig.helper.calls)
        with pytest.raises(ActiveEndpointsError, match="in use by guest web") as caught:
            await rig.fabric.delete_network("app")
        assert caught.value.network_id == network.id
        nursery.cancel_scope.cancel()

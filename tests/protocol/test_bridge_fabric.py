"""The bridge between agents: what it tells them, what it does when they are slow, gone, old, new or hostile."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from bridge_support import Rig, open_rig, unchanged

from host_bridge.fabric import Timing
from host_bridge.peer import PeerState
from taploom.contracts.taploom.bridge import v1 as bridge
from taploom.contracts.taploom.guest import v1 as guest
from taploom.contracts.taploom.helper import v1 as helper
from taploom.contracts.taploom.link.v1 import LinkFeature
from taploom.rpc import RpcError, StatusCode


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path) as rig:
        yield rig


@contextlib.contextmanager
def refused(code: StatusCode, text: str):  # type: ignore[no-untyped-def]
    with pytest.raises(RpcError) as caught:
        yield
    assert caught.value.code is code, caught.value
    assert text in caught.value.message
    assert "\n" not in caught.value.message


async def create(rig: Rig, name: str = "app", **options: object) -> bridge.Network:
    response = await rig.networks.create_network(bridge.CreateNetworkRequest(name=name, **options))  # type: ignore[arg-type]
    assert response.network is not None
    return response.network


async def connect(rig: Rig, network: str, guest_name: str, **options: object) -> bridge.Endpoint:
    request = bridge.ConnectGuestRequest(network=network, guest=guest_name, **options)  # type: ignore[arg-type]
    endpoint = (await rig.networks.connect_guest(request)).endpoint
    assert endpoint is not None
    return endpoint


async def disconnect(rig: Rig, network: str, guest_name: str) -> None:
    await rig.networks.disconnect_guest(bridge.DisconnectGuestRequest(network=network, guest=guest_name))


async def status(rig: Rig) -> bridge.Status:
    found = (await rig.status_api.get_status(bridge.GetStatusRequest())).status
    assert found is not None
    return found


async def test_connect_tells_both_agents_and_relays_bytes(rig: Rig) -> None:
    web = await rig.guest("web")
    network = await create(rig, enable_ipv6=True)
    endpoint = await connect(rig, "app", "web", aliases=["www"], gateway_priority=7)

    assert endpoint.link_up
    assert endpoint.interface_name == "eth0"
    assert endpoint.addresses[0] == "172.18.0.2/16"
    told = web.interfaces[endpoint.id]
    assert told.addresses == endpoint.addresses
    assert told.gateways == network.gateways
    assert (told.network_name, told.mtu, told.gateway_priority) == ("app", 1500, 15)
    assert told.mac_address == endpoint.mac_address
    there = rig.helper.endpoints[endpoint.id]
    assert there.names == ["web", endpoint.guest_id[:12], "www"]
    assert there.addresses == [address.partition("/")[0] for address in endpoint.addresses]
    fabric_network = rig.helper.networks[network.id]
    assert told.dns_servers == ["169.254.64.1"]
    assert fabric_network.dns_servers == ["169.254.64.1", "fe80::53"]
    assert fabric_network.gateway_mac != fabric_network.dns_mac
    # The first secrets travel with the descriptions.
    assert "AuthorizeLink" not in web.calls + rig.helper.calls
    assert set(web.hellos[-1].features) == {LinkFeature.VNET_HDR, LinkFeature.TSO, LinkFeature.USO}

    here, far = web.links[endpoint.id], rig.helper.links[endpoint.id]
    await here.send_all(b"x" * 100_000)
    received = b""
    while len(received) < 100_000:
        received += bytes(await far.receive_some(65536))
    await far.send_all(b"back")
    assert await here.receive_some(10) == b"back"

    now = await status(rig)
    assert now.converged
    assert [c.name for c in now.components] == ["bridge", "helper", "helper/ovs-vswitchd", "guest/web"]
    assert now.components[2].restarts == 4
    (link,) = now.links
    assert (link.up, link.tx_bytes, link.rx_bytes, link.drops) == (True, 100, 200, 4)


async def test_internal_networks_have_a_gateway_that_guests_do_not_know(rig: Rig) -> None:
    web = await rig.guest("web")
    network = await create(rig, internal=True)
    endpoint = await connect(rig, "app", "web")
    assert rig.helper.networks[network.id].gateways == ["172.18.0.1"]
    assert rig.helper.networks[network.id].internal
    assert web.interfaces[endpoint.id].gateways == []


async def test_disconnect_returns_when_both_sides_have_let_go(rig: Rig) -> None:
    web = await rig.guest("web")
    await create(rig)
    for _ in range(5):
        endpoint = await connect(rig, "app", "web")
        assert (endpoint.interface_name, endpoint.addresses) == ("eth0", ["172.18.0.2/16"])
        await disconnect(rig, "app", "web")
        assert not web.interfaces
        assert not rig.helper.endpoints
        assert not rig.fabric.links
    await rig.networks.delete_network(bridge.DeleteNetworkRequest(network="app"))
    assert not rig.helper.created
    assert rig.fabric.helper._dirty == set()


async def test_many_connects_at_once(rig: Rig) -> None:
    await create(rig)
    names = [f"guest{number}" for number in range(8)]
    for name in names:
        await rig.guest(name)
    async with trio.open_nursery() as nursery:
        for name in names:
            nursery.start_soon(connect, rig, "app", name)
    addresses = {address for endpoint in rig.helper.endpoints.values() for address in endpoint.addresses}
    assert addresses == {f"172.18.0.{number}" for number in range(2, 10)}
    assert (await status(rig)).converged


async def test_bad_input_changes_nothing(rig: Rig) -> None:
    await rig.guest("web")
    await rig.guest("db")
    await create(rig, subnets=["10.1.0.0/24"])
    await connect(rig, "app", "web", addresses=["10.1.0.9"])
    invalid, taken = StatusCode.INVALID_ARGUMENT, StatusCode.ALREADY_EXISTS
    missing, precondition = StatusCode.NOT_FOUND, StatusCode.FAILED_PRECONDITION
    with unchanged(rig):
        for code, text, request in (
            (taken, "already exists", bridge.CreateNetworkRequest(name="app")),
            (invalid, "at most 63", bridge.CreateNetworkRequest(name="x" * 64)),
            (invalid, "host bits set: use 10.2.0.0/24", bridge.CreateNetworkRequest(name="b", subnets=["10.2.0.1/24"])),
            (precondition, "overlaps", bridge.CreateNetworkRequest(name="b", subnets=["10.1.0.128/25"])),
            (invalid, "MTU", bridge.CreateNetworkRequest(name="b", mtu=20)),
            (invalid, "is not allowed", bridge.CreateNetworkRequest(name="a b")),
            (precondition, "predefined", bridge.CreateNetworkRequest(name="host")),
            (invalid, "no IPv4 subnet", bridge.CreateNetworkRequest(name="b", gateways=["10.2.0.1"])),
            (invalid, "no IPv4 subnet", bridge.CreateNetworkRequest(name="b", ip_ranges=["10.2.0.0/24"])),
            (invalid, "no IPv6 subnet", bridge.CreateNetworkRequest(name="b", auxiliary_addresses={"a": "fd00::1"})),
            (
                invalid,
                "do not disable IPv4",
                bridge.CreateNetworkRequest(name="b", subnets=["10.2.0.0/24"], disable_ipv4=True, enable_ipv6=True),
            ),
            (invalid, "neither", bridge.CreateNetworkRequest(name="b", disable_ipv4=True)),
        ):
            with refused(code, text):
                await rig.networks.create_network(request)
        for code, text, connecting in (
            (taken, "already connected", bridge.ConnectGuestRequest(network="app", guest="web")),
            (
                taken,
                "taken by guest web",
                bridge.ConnectGuestRequest(network="app", guest="db", addresses=["10.1.0.9"]),
            ),
            (invalid, "is not in", bridge.ConnectGuestRequest(network="app", guest="db", addresses=["10.2.0.9"])),
            (invalid, "not a DNS name", bridge.ConnectGuestRequest(network="app", guest="db", aliases=["a b"])),
            (invalid, "must not be empty", bridge.ConnectGuestRequest(network="app", guest="db", links={"": "web"})),
            (missing, "network nope", bridge.ConnectGuestRequest(network="nope", guest="db")),
            (missing, "guest nope", bridge.ConnectGuestRequest(network="app", guest="nope")),
        ):
            with refused(code, text):
                await rig.networks.connect_guest(connecting)
        with refused(precondition, "not connected"):
            await disconnect(rig, "app", "db")
        with refused(precondition, "in use by guest web"):
            await rig.networks.delete_network(bridge.DeleteNetworkRequest(network="app"))
        with refused(missing, "network nope"):
            await rig.networks.get_network(bridge.GetNetworkRequest(network="nope"))
        with refused(missing, "guest nope"):
            await rig.guest_api.remove_guest(bridge.RemoveGuestRequest(guest="nope"))
        with refused(taken, "already exists"):
            await rig.guest_api.register_guest(bridge.RegisterGuestRequest(name="web", address="vsock:9"))
        with refused(invalid, "address"):
            await rig.guest_api.register_guest(bridge.RegisterGuestRequest(name="new", address="tcp:1"))
        with refused(invalid, "interval"):
            async with rig.status_api.watch_status(bridge.WatchStatusRequest(interval_ms=1)) as stream:
                async for _ in stream:
                    pass
    assert (await status(rig)).converged


async def test_create_without_a_helper(tmp_path: Path) -> None:
    async with open_rig(tmp_path, run_helper=False) as rig:
        with unchanged(rig), refused(StatusCode.UNAVAILABLE, "no such file or directory; is its agent running?"):
            await create(rig)
        now = await status(rig)
        assert not now.converged
        assert next(c for c in now.components if c.name == "helper").state == bridge.ComponentState.DOWN
        # It comes, and all is well.
        await rig.nursery.start(rig.helper.run)
        await create(rig)


async def test_helper_that_is_not_ready(tmp_path: Path) -> None:
    async with open_rig(tmp_path, timing=Timing(deadline=0.3, grace=0.1, settle=0.1)) as rig:
        rig.helper.ready = False
        with unchanged(rig), refused(StatusCode.UNAVAILABLE, "ovn-northd"):
            await create(rig)
        now = await status(rig)
        assert (
            next(c for c in now.components if c.name == "helper").problem == "the helper waits: waiting for ovn-northd"
        )
    assert not rig.helper.created


async def test_connect_to_a_guest_that_is_gone(rig: Rig) -> None:
    await rig.guest("web", run=False)
    await create(rig)
    with unchanged(rig), refused(StatusCode.UNAVAILABLE, "guest web does not answer at unix:"):
        await connect(rig, "app", "web")
    await rig.until(lambda: not rig.helper.endpoints)
    assert not rig.fabric.links


@pytest.mark.parametrize("method", ["GetInfo", "Sync", "WatchEvents", "ApplyInterface"])
async def test_guest_that_never_answers_blocks_nobody(tmp_path: Path, method: str) -> None:
    async with open_rig(tmp_path, timing=Timing(deadline=0.5, grace=0.1, settle=0.1)) as rig:
        silent = await rig.guest("silent", register=False)
        silent.hang.add(method)
        await rig.fabric.register_guest("silent", silent.control)
        await rig.guest("web")
        await create(rig)
        with unchanged(rig), refused(StatusCode.UNAVAILABLE, "silent"):
            await connect(rig, "app", "silent")
        assert (await connect(rig, "app", "web")).link_up
        await rig.until(lambda: len(rig.helper.endpoints) == 1)
        with trio.fail_after(60):
            assert len((await status(rig)).links) == 1


@pytest.mark.parametrize(
    ("agent", "method"),
    [
        ("helper", "GetInfo"),
        ("helper", "Sync"),
        ("helper", "ApplyNetwork"),
        ("helper", "ApplyEndpoint"),
        ("web", "GetInfo"),
        ("web", "Sync"),
        ("web", "ApplyInterface"),
    ],
)
async def test_an_agent_that_takes_longer_than_a_call_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, agent: str, method: str
) -> None:
    """It begins anew with each call, as one does that is slow and not just busy: it is given more time."""
    monkeypatch.setattr("host_bridge.peer.CONNECT_TIMEOUT", 0.2)
    async with open_rig(tmp_path, timing=Timing(deadline=30.0, grace=20.0, settle=1.0, call=0.2)) as rig:
        web = await rig.guest("web")
        slow = rig.helper if agent == "helper" else web
        slow.slow[method] = 0.5
        await slow.stop()
        slow.calls.clear()
        await rig.nursery.start(slow.run)
        if method.startswith("Apply"):
            peers = (rig.fabric.helper, *rig.fabric.guests.values())
            await rig.until(lambda: all(peer.state is PeerState.OK for peer in peers) and "Sync" in slow.calls)
        await create(rig)
        assert (await connect(rig, "app", "web")).link_up
        assert slow.calls.count(method) > 1
        await rig.until(lambda: rig.fabric.helper.state is PeerState.OK)


async def test_status_of_a_guest_that_stops_answering(rig: Rig) -> None:
    web = await rig.guest("web")
    await create(rig)
    await connect(rig, "app", "web")
    web.hang.add("ListInterfaces")
    now = await status(rig)
    component = next(c for c in now.components if c.name == "guest/web")
    assert component.state == bridge.ComponentState.STARTING
    assert "does not answer ListInterfaces" in component.problem
    assert now.links[0].up


async def test_guest_that_refuses(rig: Rig) -> None:
    web = await rig.guest("web")
    await create(rig)
    web.fail["ApplyInterface"] = RpcError(StatusCode.INVALID_ARGUMENT, "bad\x1b[2J\nMTU")
    with unchanged(rig), refused(StatusCode.UNAVAILABLE, "guest web refuses it: bad?[2J?MTU"):
        await connect(rig, "app", "web")
    web.fail.clear()
    await connect(rig, "app", "web")


async def test_interface_names_that_the_guest_has_itself(rig: Rig) -> None:
    web = await rig.guest("web")
    web.own_interfaces = {"eth0", "eth1"}
    await create(rig)
    endpoint = await connect(rig, "app", "web")
    assert endpoint.interface_name == "eth2"
    assert web.interfaces[endpoint.id].name == "eth2"


async def test_data_port_that_refuses(tmp_path: Path) -> None:
    async with open_rig(tmp_path, timing=Timing(deadline=0.5, grace=0.1, settle=0.5)) as rig:
        web = await rig.guest("web")
        await create(rig)
        web.refuse_links = "no TAP"
        with unchanged(rig), refused(StatusCode.UNAVAILABLE, "no TAP"):
            await connect(rig, "app", "web")
        assert not web.interfaces
        assert not rig.helper.endpoints


async def test_caller_that_gives_up_leaves_nothing(rig: Rig) -> None:
    web = await rig.guest("web")
    await create(rig)
    web.hang.add("ApplyInterface")
    with unchanged(rig):
        with pytest.raises(RpcError):
            request = bridge.ConnectGuestRequest(network="app", guest="web")
            await rig.networks.connect_guest(request, timeout=0.3)
        await rig.until(lambda: not rig.fabric.links and not rig.helper.endpoints)


async def test_disconnect_while_connecting(rig: Rig) -> None:
    web = await rig.guest("web")
    await create(rig)
    web.hang.add("ApplyInterface")
    outcome: list[RpcError] = []

    async def connecting() -> None:
        try:
            await connect(rig, "app", "web")
        except RpcError as error:
            outcome.append(error)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(connecting)
        await web.until(lambda: "ApplyInterface" in web.calls)
        await disconnect(rig, "app", "web")
    assert outcome[0].code is StatusCode.ABORTED
    assert not rig.store.endpoints()


async def test_broken_link_is_dialled_again(rig: Rig) -> None:
    web = await rig.guest("web")
    await create(rig)
    endpoint = await connect(rig, "app", "web")
    for agent in (web, rig.helper):
        before = rig.link("web", "app").generation
        agent.break_link(endpoint.id)
        await rig.until(lambda before=before: rig.link("web", "app").up and rig.link("web", "app").generation > before)
        assert endpoint.id in web.links
        assert endpoint.id in rig.helper.links
    assert web.calls.count("ApplyInterface") == 1
    assert web.calls.count("AuthorizeLink") >= 1
    await web.links[endpoint.id].send_all(b"again")
    assert await rig.helper.links[endpoint.id].receive_some(10) == b"again"
    assert (await status(rig)).links[0].reconnects == 2


async def test_link_that_only_the_peer_sees_broken(rig: Rig) -> None:
    """A stream may look alive here when a VMM does not tell of its end."""
    web = await rig.guest("web")
    await create(rig)
    endpoint = await connect(rig, "app", "web")
    dead = web.links.pop(endpoint.id)
    web.tell(guest.WatchEventsResponse(link_down=guest.LinkDown(endpoint_id=endpoint.id, reason="reset")))
    await rig.until(lambda: endpoint.id in web.links and rig.link("web", "app").up)
    await trio.aclose_forcefully(dead)
    # News about a link that has been replaced already changes nothing.
    generation = rig.link("web", "app").generation
    calls = web.calls.count("ListInterfaces")
    web.tell(guest.WatchEventsResponse(link_down=guest.LinkDown(endpoint_id=endpoint.id, reason="late")))
    await rig.until(lambda: web.calls.count("ListInterfaces") > calls)
    assert rig.link("web", "app").generation == generation


async def test_restarted_guest_gets_everything_again(rig: Rig) -> None:
    web = await rig.guest("web")
    await create(rig)
    await create(rig, "back")
    first = await connect(rig, "app", "web")
    second = await connect(rig, "back", "web")
    await web.stop()
    await rig.until(lambda: not rig.peer("web").connected)
    web.interfaces.clear()
    now = await status(rig)
    assert {pending.subject for pending in now.pending} == {"endpoint web on app", "endpoint web on back", "guest web"}
    await disconnect(rig, "back", "web")
    await rig.nursery.start(web.run)
    await rig.until(lambda: rig.link("web", "app").up)
    assert set(web.interfaces) == {first.id}
    assert web.interfaces[first.id].addresses == first.addresses
    assert second.id not in rig.helper.endpoints
    now = await status(rig)
    assert now.converged
    assert next(c for c in now.components if c.name == "guest/web").restarts == 1


async def test_restarted_helper_gets_everything_again(rig: Rig) -> None:
    web = await rig.guest("web")
    network = await create(rig)
    endpoint = await connect(rig, "app", "web")
    await rig.helper.stop()
    rig.helper.networks.clear()
    rig.helper.endpoints.clear()
    await rig.until(lambda: not rig.fabric.helper.connected)
    # Disconnects and removals succeed; what is new fails and leaves nothing.
    await create_refused(rig)
    await rig.nursery.start(rig.helper.run)
    await rig.until(lambda: rig.link("web", "app").up)
    assert set(rig.helper.created) == {network.id}
    assert set(rig.helper.endpoints) == {endpoint.id}
    assert web.calls.count("ApplyInterface") == 1


async def create_refused(rig: Rig) -> None:
    with unchanged(rig), refused(StatusCode.UNAVAILABLE, "the helper does not answer"):
        await create(rig, "other")


async def test_helper_asks_for_a_sync(rig: Rig) -> None:
    await rig.guest("web")
    network = await create(rig)
    endpoint = await connect(rig, "app", "web")
    generation = rig.link("web", "app").generation
    rig.helper.networks.clear()
    rig.helper.tell(helper.WatchEventsResponse(resync_needed=helper.ResyncNeeded(reason="database recreated")))
    await rig.until(lambda: network.id in rig.helper.networks)
    assert endpoint.id in rig.helper.endpoints
    assert rig.link("web", "app").generation == generation


async def test_deletes_while_peers_are_away_converge_later(rig: Rig) -> None:
    web = await rig.guest("web")
    await create(rig)
    await connect(rig, "app", "web")
    await rig.helper.stop()
    await web.stop()
    await disconnect(rig, "app", "web")
    await rig.networks.delete_network(bridge.DeleteNetworkRequest(network="app"))
    await rig.nursery.start(rig.helper.run)
    await rig.nursery.start(web.run)
    await rig.until(lambda: not web.interfaces and not rig.helper.created and not rig.helper.endpoints)
    assert [one.name for one in rig.store.networks()] == ["bridge", "host", "none"]


async def test_removed_guest_is_told_to_forget(rig: Rig) -> None:
    web = await rig.guest("web")
    await create(rig)
    await connect(rig, "app", "web")
    assert web.resolver is not None and web.resolver.enabled
    await rig.guest_api.remove_guest(bridge.RemoveGuestRequest(guest="web"))
    assert not web.interfaces
    assert not rig.helper.endpoints
    assert web.resolver is not None and not web.resolver.enabled
    # The same agent under another name.
    await rig.fabric.register_guest("other", web.control)
    assert (await connect(rig, "app", "other")).addresses == ["172.18.0.2/16"]


async def test_restarted_bridge_keeps_state_and_interfaces(tmp_path: Path) -> None:
    async with open_rig(tmp_path, upstreams=("192.0.2.53",)) as rig:
        web = await rig.guest("web")
        await create(rig)
        endpoint = await connect(rig, "app", "web", aliases=["www"])
        assert web.resolver is not None and web.resolver.upstreams == ["192.0.2.53"]
        before = rig.store.dump()
        guest_state, helper_state = dict(web.interfaces), (dict(rig.helper.networks), dict(rig.helper.endpoints))
    async with open_rig(tmp_path, upstreams=("192.0.2.53",)) as rig:
        assert rig.store.dump() == before
        web = await rig.guest("web", register=False, run=False)
        web.interfaces = dict(guest_state)
        await rig.nursery.start(web.run)
        await rig.until(lambda: rig.link("web", "app").up)
        assert web.interfaces == guest_state
        assert (rig.helper.networks, rig.helper.endpoints) == helper_state
        # Nothing is applied twice: Sync, then the link.
        assert not {"ApplyInterface", "DeleteInterface"} & set(web.calls)
        assert rig.fabric.links[endpoint.id].up


async def test_pending_rows_of_a_killed_bridge_are_removed(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        await rig.guest("web")
        await create(rig)
        before = rig.store.dump()
        # What a bridge that is killed in the middle of a connect and a create leaves.
        rig.fabric.desired.connect("app", "web")
        rig.fabric.desired.create_network("half")
    async with open_rig(tmp_path) as rig:
        assert rig.store.dump() == before
        assert not rig.fabric.links


async def test_older_agent(rig: Rig) -> None:
    web = await rig.guest("web", register=False)
    web.features = []
    web.fail["WatchEvents"] = RpcError(StatusCode.UNIMPLEMENTED, "")
    await rig.fabric.register_guest("web", web.control)
    await create(rig)
    endpoint = await connect(rig, "app", "web")
    assert web.hellos[-1].features == []
    assert rig.helper.hellos[-1].features == []
    assert "WatchEvents" not in web.calls
    assert web.resolver is not None and not web.resolver.enabled
    # Without events the bridge asks every second.
    dead = web.links.pop(endpoint.id)
    await rig.until(lambda: endpoint.id in web.links and rig.link("web", "app").up)
    await trio.aclose_forcefully(dead)


async def test_agents_with_different_features_agree_on_what_both_have(rig: Rig) -> None:
    web = await rig.guest("web", register=False)
    web.features = [guest.GuestFeature.LINK_VNET_HDR, guest.GuestFeature.LINK_TSO, guest.GuestFeature.EVENTS]
    await rig.fabric.register_guest("web", web.control)
    await create(rig)
    await connect(rig, "app", "web")
    assert set(web.hellos[-1].features) == {LinkFeature.VNET_HDR, LinkFeature.TSO}
    # One that promises more than its data port grants.
    db = await rig.guest("db")
    db.link_features = frozenset({LinkFeature.VNET_HDR})
    assert (await connect(rig, "app", "db")).link_up
    assert rig.link("db", "app").features == {LinkFeature.VNET_HDR}


async def test_newer_agent_with_unknown_features(rig: Rig) -> None:
    web = await rig.guest("web", register=False)
    web.features = [*web.features, guest.GuestFeature(4711)]
    web.contract_versions = [1, 2]
    # Fields that this contract does not have yet: number 1000 with a varint, 1001 with bytes.
    web.further_fields = b"\xc0\x3e\x05" + b"\xca\x3e\x03new"
    await rig.fabric.register_guest("web", web.control)
    await create(rig)
    assert (await connect(rig, "app", "web")).link_up


async def test_agent_of_another_contract(rig: Rig) -> None:
    for name, versions, text in (
        ("newer", [2], "speaks contract versions 2, this bridge speaks 1: update the bridge"),
        ("older", [], "speaks contract versions none, this bridge speaks 1: update guest older"),
    ):
        agent = await rig.guest(name, register=False)
        agent.contract_versions = versions
        await rig.fabric.register_guest(name, agent.control)
        await rig.until(lambda name=name, text=text: text in rig.peer(name).problem)
        response = await rig.guest_api.get_guest(bridge.GetGuestRequest(guest=name))
        assert response.guest is not None
        assert not response.guest.connected
        assert text in response.guest.problem
        assert "Sync" not in agent.calls


GARBAGE = (
    b"\x00" * 4096,
    b"HTTP/1.1 200 OK\r\n\r\n" * 100,
    b"\x00\x00\x12\x04\x00\x00\x00\x00\x00" + b"\xff" * 1000,
    b"\xff\xff\xff\x00\x00\x00\x00\x00\x01" * 100,
    b"",
)


@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
async def test_guest_that_speaks_garbage_is_isolated(rig: Rig, garbage: bytes) -> None:
    directory = rig.directory / "hostile"
    directory.mkdir(mode=0o700)

    async def hostile(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.send_all(garbage)
            if garbage:
                await stream.receive_some(1)
        await stream.aclose()

    from taploom.address import UnixAddress, open_listener

    listener = await open_listener(UnixAddress(f"{directory}/control.sock"))
    rig.nursery.start_soon(trio.serve_listeners, hostile, [listener])
    await rig.fabric.register_guest("hostile", f"unix:{directory}/control.sock")
    await rig.guest("web")
    await create(rig)
    assert (await connect(rig, "app", "web")).link_up
    await rig.until(lambda: "dialled yet" not in rig.peer("hostile").problem)
    assert rig.peer("hostile").state is PeerState.DOWN
    assert rig.peer("hostile").problem
    assert not (await status(rig)).converged


async def test_guest_with_hostile_answers(rig: Rig) -> None:
    web = await rig.guest("web")
    await create(rig)
    endpoint = await connect(rig, "app", "web")
    evil = await rig.guest("evil", register=False)
    evil.version = "\x1b]0;owned\x07" + "x" * 100_000
    evil.instance_id = "y" * 100_000
    await rig.fabric.register_guest("evil", evil.control)
    await rig.until(lambda: rig.peer("evil").state is PeerState.OK)
    # It lists interfaces of others, links that are down, and a flood of events about them.
    evil.interfaces[endpoint.id] = guest.Interface(endpoint_id=endpoint.id, name="eth0")
    evil.interfaces["z" * 5000] = guest.Interface(endpoint_id="z" * 5000, name="eth1")
    for _ in range(2000):
        evil.tell(guest.WatchEventsResponse(link_down=guest.LinkDown(endpoint_id=endpoint.id, reason="\n" * 50)))
        evil.tell(guest.WatchEventsResponse())
    generation = rig.link("web", "app").generation
    now = await status(rig)
    version = next(c.version for c in now.components if c.name == "guest/evil")
    assert len(version) < 50
    assert "\x1b" not in version
    await rig.guest("db")
    assert (await connect(rig, "app", "db")).link_up
    assert rig.link("web", "app").generation == generation
    assert endpoint.id in web.links


async def test_answers_that_are_too_large(rig: Rig) -> None:
    web = await rig.guest("web", register=False)
    web.version = "x" * (5 << 20)
    await rig.fabric.register_guest("web", web.control)
    await rig.until(lambda: "GetInfo" in rig.peer("web").problem)
    assert rig.peer("web").state is PeerState.DOWN


async def test_one_object_that_fails_does_not_block_others(tmp_path: Path) -> None:
    async with open_rig(tmp_path) as rig:
        web = await rig.guest("web")
        await create(rig)
        await create(rig, "back")
        first = await connect(rig, "app", "web")
        second = await connect(rig, "back", "web")
        before = rig.link("web", "back").generation
        await web.stop()
        web.interfaces.clear()
        web.own_interfaces = {first.interface_name}
        await rig.nursery.start(web.run)
        # Not the link of before, which the bridge may not have missed yet.
        await rig.until(lambda: rig.link("web", "back").up and rig.link("web", "back").generation > before)
        now = await status(rig)
        assert [(p.subject, p.reason) for p in now.pending] == [
            ("endpoint web on app", "guest web refuses it: interface eth0 is not mine")
        ]
        assert set(web.interfaces) == {second.id}
        # It is tried again until it works.
        web.own_interfaces = set()
        await rig.until(lambda: rig.link("web", "app").up)


async def test_watch_status_streams(rig: Rig) -> None:
    await rig.guest("web")
    seen = 0
    async with rig.status_api.watch_status(bridge.WatchStatusRequest(interval_ms=100)) as stream:
        async for message in stream:
            assert message.status is not None
            seen += 1
            if seen == 3:
                break

"""The guest agent's contract, against the agent as a process: every RPC, its errors, and bytes that are no contract."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio
from test_guest_rig import Guest, guest, interface, namespace, run_in, running_guest, until  # noqa: F401 - guest is a fixture

from taploom.address import connect
from taploom.contracts.taploom.guest.v1 import (
    ApplyInterfaceRequest,
    ApplyResolverRequest,
    AuthorizeLinkRequest,
    DeleteInterfaceRequest,
    GetInfoRequest,
    GuestFeature,
    HostEntry,
    Interface,
    InterfaceState,
    ListInterfacesRequest,
    Resolver,
    Route,
    SyncRequest,
    TrunkChild,
    WatchEventsRequest,
    WatchEventsResponse,
)
from taploom.contracts.taploom.link.v1 import LinkFeature, LinkRefusal
from taploom.link import dial_link, new_secret
from taploom.link.handshake import RefusedError
from taploom.rpc import RpcError, StatusCode

# ruff: noqa: F811 - pytest's fixtures


def addresses(guest: Guest, name: str) -> list[str]:
    found = json.loads(guest.ip("-j", "addr", "show", "dev", name))[0]["addr_info"]
    return [f"{entry['local']}/{entry['prefixlen']}" for entry in found if entry["scope"] == "global"]


def routes(guest: Guest, family: str = "-4") -> list[dict[str, object]]:
    return list(json.loads(guest.ip("-j", family, "route")))


def settled(guest: Guest) -> object:
    """Addresses and routes without what changes with the carrier."""
    links = json.loads(guest.ip("-j", "addr"))
    found = [(link["ifindex"], link["ifname"], link["addr_info"]) for link in links]
    both = [*routes(guest), *routes(guest, "-6")]
    return found, [{key: value for key, value in route.items() if key != "flags"} for route in both]


def default_devices(guest: Guest, family: str = "-4") -> list[object]:
    return [route["dev"] for route in routes(guest, family) if route["dst"] == "default"]


async def refused(call: object, code: StatusCode, words: str) -> None:
    with pytest.raises(RpcError, match=words) as caught:
        await call  # type: ignore[misc]
    assert caught.value.code == code


async def test_get_info(guest: Guest) -> None:
    async with guest.client() as client:
        info = await client.get_info(GetInfoRequest())
        assert info.contract_versions == [1]
        assert info.version and info.hostname == os.uname().nodename
        assert {GuestFeature.LINK_VNET_HDR, GuestFeature.RESOLVER, GuestFeature.EVENTS} <= set(info.features)
        assert (await client.get_info(GetInfoRequest())).instance_id == info.instance_id
    await guest.stop(signal.SIGKILL)
    await guest.start()
    async with guest.client() as client:
        assert (await client.get_info(GetInfoRequest())).instance_id != info.instance_id


async def test_an_interface_is_made_as_described_changed_in_place_and_removed(guest: Guest) -> None:
    wanted = interface(
        addresses=["172.18.0.2/16", "fd00::2/64"],
        gateways=["172.18.0.1", "fd00::1"],
        routes=[Route(destination="10.9.0.0/16", gateway="172.18.0.9"), Route(destination="fd09::/64")],
        mtu=1400,
    )
    async with guest.client() as client:
        status = (await client.apply_interface(ApplyInterfaceRequest(interface=wanted))).status
        assert status and status.state == InterfaceState.NO_LINK
        assert status.interface == wanted
        link = json.loads(guest.ip("-j", "-d", "link", "show", "dev", "eth0"))[0]
        assert (link["address"], link["mtu"], link["ifalias"]) == (wanted.mac_address, 1400, "taploom:ep0")
        assert "UP" in link["flags"] and link["linkinfo"]["info_data"]["persist"]
        assert addresses(guest, "eth0") == wanted.addresses
        assert default_devices(guest) == ["eth0"] and default_devices(guest, "-6") == ["eth0"]
        by_destination = {route["dst"]: route for route in routes(guest)}
        assert by_destination["10.9.0.0/16"]["gateway"] == "172.18.0.9"
        assert "169.254.64.1" not in by_destination  # it is in a table of its own, which is looked at first
        assert "169.254.64.1 dev eth0" in guest.ip("route", "show", "table", "84")
        assert "lookup 84" in guest.ip("rule")
        assert any(route["dst"] == "fd09::/64" for route in routes(guest, "-6"))
        conf = f"net.ipv6.conf.{wanted.name}"
        assert run_in(guest.netns, "sysctl", "-n", f"{conf}.accept_ra", f"{conf}.disable_ipv6").split() == ["0", "0"]

        index = link["ifindex"]
        changed = interface(addresses=["172.18.0.7/16", "172.18.1.2/24"], mtu=1450, mac_address="02:00:00:00:00:07")
        await client.apply_interface(ApplyInterfaceRequest(interface=changed))
        link = json.loads(guest.ip("-j", "link", "show", "dev", "eth0"))[0]
        assert (link["ifindex"], link["mtu"], link["address"]) == (index, 1450, "02:00:00:00:00:07")
        assert sorted(addresses(guest, "eth0")) == sorted(changed.addresses)
        assert default_devices(guest) == ["eth0"] and default_devices(guest, "-6") == []
        assert run_in(guest.netns, "sysctl", "-n", f"{conf}.disable_ipv6").strip() == "1"
        assert not any(route["dst"] == "10.9.0.0/16" for route in routes(guest))

        renamed = interface(addresses=changed.addresses, name="net7")
        await client.apply_interface(ApplyInterfaceRequest(interface=renamed))
        assert json.loads(guest.ip("-j", "link", "show", "dev", "net7"))[0]["ifindex"] == index
        assert default_devices(guest) == ["net7"]

        for _ in range(2):
            await client.delete_interface(DeleteInterfaceRequest(endpoint_id="ep0"))
        assert (await client.list_interfaces(ListInterfacesRequest())).interfaces == []
    assert [link["ifname"] for link in json.loads(guest.ip("-j", "link"))] == ["lo"]


async def test_an_agent_that_makes_no_vlan_interfaces(tmp_path: Path) -> None:
    trunk = TrunkChild(parent_endpoint_id="ep0", tag=20)
    child = interface(1, name="eth0.20", trunk_child=trunk)
    async with running_guest(tmp_path / "g", "--without=vlan") as guest, guest.client() as client:
        assert GuestFeature.VLAN not in (await client.get_info(GetInfoRequest())).features
        await client.apply_interface(ApplyInterfaceRequest(interface=interface()))
        words = "trunk_child: this agent makes no VLAN interfaces"
        await refused(
            client.apply_interface(ApplyInterfaceRequest(interface=child)), StatusCode.INVALID_ARGUMENT, words
        )
        synced = await client.sync(SyncRequest(interfaces=[child, interface()]))
        assert [(one.endpoint_id, one.code) for one in synced.failures] == [("ep1", StatusCode.INVALID_ARGUMENT)]
        assert [one.interface.name for one in synced.interfaces if one.interface] == ["eth0"]
        assert sorted(link["ifname"] for link in json.loads(guest.ip("-j", "link"))) == ["eth0", "lo"]


async def test_applying_the_same_again_touches_nothing(guest: Guest) -> None:
    wanted = interface(addresses=["172.18.0.2/16", "fd00::2/64"], gateways=["172.18.0.1", "fd00::1"])
    async with guest.client() as client:
        await client.apply_interface(ApplyInterfaceRequest(interface=wanted))
        # The kernel tells of the missing carrier up to a second later (net/core/link_watch.c).
        await until(lambda: "state DOWN" in guest.ip("link", "show", "dev", "eth0"), "the carrier's state is known")
        monitor = subprocess.Popen(
            ["ip", "netns", "exec", guest.netns, "ip", "monitor", "link", "address", "route"],
            stdout=(guest.directory / "monitor").open("wb"),
        )
        try:
            seen = guest.directory / "monitor"

            def probed() -> bool:
                guest.ip("link", "add", "probe", "type", "veth", "peer", "name", "probe2")
                guest.ip("link", "del", "probe")
                return bool(seen.read_text())

            await until(probed, "the monitor listens")
            await client.apply_interface(ApplyInterfaceRequest(interface=wanted))
            await client.sync(SyncRequest(interfaces=[wanted]))
            guest.ip("link", "add", "last", "type", "veth", "peer", "name", "last2")
            await until(lambda: "last" in seen.read_text(), "the monitor has seen all")
            assert "eth0" not in seen.read_text()
        finally:
            monitor.kill()
            monitor.wait()


async def test_the_default_route_follows_the_priority(guest: Guest) -> None:
    async with guest.client() as client:

        async def apply(number: int, **changes: object) -> None:
            await client.apply_interface(ApplyInterfaceRequest(interface=interface(number, **changes)))

        await apply(0, network_name="b")
        assert default_devices(guest) == ["eth0"]
        await apply(1, network_name="a")
        assert default_devices(guest) == ["eth1"]
        await apply(2, network_name="c", gateway_priority=5)
        assert default_devices(guest) == ["eth2"]
        await apply(3, network_name="d", gateway_priority=9, gateways=[])
        assert default_devices(guest) == ["eth2"]
        await apply(2, network_name="c", gateway_priority=-5)
        assert default_devices(guest) == ["eth1"]
        await client.delete_interface(DeleteInterfaceRequest(endpoint_id="ep1"))
        assert default_devices(guest) == ["eth0"]
        await client.delete_interface(DeleteInterfaceRequest(endpoint_id="ep0"))
        assert default_devices(guest) == ["eth2"]
        await client.delete_interface(DeleteInterfaceRequest(endpoint_id="ep2"))
        assert default_devices(guest) == []


async def test_bad_descriptions_change_nothing(guest: Guest) -> None:
    guest.ip("link", "add", "eth5", "type", "veth", "peer", "name", "eth6")
    async with guest.client() as client:
        await client.apply_interface(ApplyInterfaceRequest(interface=interface()))
        before = settled(guest)

        async def bad(code: StatusCode, words: str, message: Interface | None, secret: bytes = b"") -> None:
            request = ApplyInterfaceRequest(interface=message, link_secret=secret)
            await refused(client.apply_interface(request), code, words)

        invalid = StatusCode.INVALID_ARGUMENT
        await bad(invalid, "missing", None)
        await bad(invalid, "multicast", interface(1, mac_address="01:00:00:00:00:01"))
        await bad(invalid, "not on the link", interface(0, gateways=["10.0.0.1"]))
        await bad(invalid, "mtu", interface(0, mtu=1))
        await bad(invalid, "ep0", interface(1, dns_servers=["169.254.64.1"]))
        await bad(invalid, "ep0", interface(1, addresses=["172.18.0.2/24"], gateways=[]))
        await bad(invalid, "16 to 64", interface(1), b"short")
        await bad(StatusCode.ALREADY_EXISTS, "not taploom's", interface(1, name="eth5"))
        await bad(StatusCode.ALREADY_EXISTS, "ep0", interface(1, name="eth0"))
        await bad(StatusCode.ALREADY_EXISTS, "eth5", interface(0, name="eth5"))
        await refused(client.delete_interface(DeleteInterfaceRequest(endpoint_id="/")), invalid, "endpoint_id")
        await refused(
            client.authorize_link(AuthorizeLinkRequest(endpoint_id="nobody", secret=b"s" * 16)),
            StatusCode.NOT_FOUND,
            "nobody",
        )
        await refused(
            client.authorize_link(AuthorizeLinkRequest(endpoint_id="ep0", secret=b"s" * 65)), invalid, "65 bytes"
        )
        bad_hosts = Resolver(manage_hosts=True, hosts=[HostEntry(address="x", names=["y"])])
        for resolver in (None, Resolver(upstreams=["x"]), Resolver(search=["a b"]), bad_hosts):
            await refused(client.apply_resolver(ApplyResolverRequest(resolver=resolver)), invalid, "resolver")
        assert settled(guest) == before
        assert len((await client.list_interfaces(ListInterfacesRequest())).interfaces) == 1


async def test_sync_makes_the_whole_agent_as_described(guest: Guest) -> None:
    async with guest.client() as client:
        first = await client.sync(SyncRequest(interfaces=[interface(0), interface(1)]))
        assert [status.interface.name for status in first.interfaces if status.interface] == ["eth0", "eth1"]
        assert first.removed_endpoint_ids == [] and first.failures == []
        index = json.loads(guest.ip("-j", "link", "show", "dev", "eth1"))[0]["ifindex"]

        # ep0 goes, ep2 takes its name, ep1 stays, one is bad and one is there twice.
        replacement = interface(2, name="eth0")
        bad = interface(3, addresses=["nonsense"])
        second = await client.sync(SyncRequest(interfaces=[replacement, interface(1), bad, interface(1)]))
        assert second.removed_endpoint_ids == ["ep0"]
        assert [(failure.endpoint_id, failure.code) for failure in second.failures] == [("ep3", 3), ("ep1", 3)]
        assert [status.interface.endpoint_id for status in second.interfaces if status.interface] == ["ep2", "ep1"]
        assert json.loads(guest.ip("-j", "link", "show", "dev", "eth1"))[0]["ifindex"] == index

        # Names swapped, links kept.
        indexes = {
            name: json.loads(guest.ip("-j", "link", "show", "dev", name))[0]["ifindex"] for name in ("eth0", "eth1")
        }
        third = await client.sync(SyncRequest(interfaces=[interface(2, name="eth1"), interface(1, name="eth0")]))
        assert third.failures == []
        swapped = {
            name: json.loads(guest.ip("-j", "link", "show", "dev", name))[0]["ifindex"] for name in ("eth0", "eth1")
        }
        assert swapped == {"eth0": indexes["eth1"], "eth1": indexes["eth0"]}
        assert addresses(guest, "eth0") == ["172.19.0.2/16"]

        # A description that is refused leaves the endpoint as it was.
        kept = await client.sync(SyncRequest(interfaces=[interface(1, name="eth0", mtu=1), interface(2, name="eth1")]))
        assert [failure.endpoint_id for failure in kept.failures] == ["ep1"] and kept.removed_endpoint_ids == []
        assert addresses(guest, "eth0") == ["172.19.0.2/16"]

        last = await client.sync(SyncRequest())
        assert last.removed_endpoint_ids == ["ep1", "ep2"] and last.interfaces == []


async def test_unknown_fields_of_a_newer_host_are_accepted(guest: Guest) -> None:
    async with guest.client() as client:
        message = ApplyInterfaceRequest.parse(bytes(ApplyInterfaceRequest(interface=interface())) + b"\xa2\x06\x03new")
        assert (await client.apply_interface(message)).status is not None
    assert addresses(guest, "eth0") == ["172.18.0.2/16"]


async def test_garbage_on_both_sockets_disturbs_nobody(guest: Guest) -> None:
    async with guest.client() as client:
        await client.apply_interface(ApplyInterfaceRequest(interface=interface()))
        for address in (guest.control, guest.data):
            for payload in (
                b"\0" * 100,
                os.urandom(4000),
                b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(500),
                b"\x05ab",
            ):
                stream = await connect(address)
                try:
                    await stream.send_all(payload)
                    await stream.send_eof()
                    with trio.fail_after(60):
                        while await stream.receive_some():
                            pass
                except trio.BrokenResourceError:
                    pass  # closed on us, which is what garbage gets
                finally:
                    await trio.aclose_forcefully(stream)
        assert len((await client.list_interfaces(ListInterfacesRequest())).interfaces) == 1
        secret = new_secret()
        await client.authorize_link(AuthorizeLinkRequest(endpoint_id="ep0", secret=secret))
        stream, _ = await dial_link(guest.data, endpoint_id="ep0", secret=secret, features=[])
        await stream.aclose()


async def test_links_take_one_secret_once_and_are_told_of(guest: Guest) -> None:
    async with guest.client() as client, client.watch_events(WatchEventsRequest()) as events:

        async def event() -> WatchEventsResponse:
            with trio.fail_after(60):
                found = await anext(stream_of_events)
            assert found.time is not None
            return found

        stream_of_events = events.__aiter__()
        assert (await event()).started is not None
        secret = new_secret()
        await client.apply_interface(ApplyInterfaceRequest(interface=interface(), link_secret=secret))
        with pytest.raises(RefusedError) as caught:
            await dial_link(guest.data, endpoint_id="ep0", secret=new_secret(), features=[])
        assert caught.value.refusal == LinkRefusal.UNAUTHORIZED
        features = [LinkFeature.VNET_HDR, LinkFeature.TSO]
        stream, agreed = await dial_link(guest.data, endpoint_id="ep0", secret=secret, features=features)
        assert agreed == set(features)
        up = (await event()).link_up
        assert up is not None and up.endpoint_id == "ep0" and set(up.features) == agreed
        listed = (await client.list_interfaces(ListInterfacesRequest())).interfaces[0]
        assert listed.state == InterfaceState.UP and set(listed.link_features) == agreed
        with pytest.raises(RefusedError):
            await dial_link(guest.data, endpoint_id="ep0", secret=secret, features=[])
        before = guest.ip("-4", "addr", "show", "dev", "eth0"), [r["dst"] for r in routes(guest)]
        await stream.aclose()
        down = (await event()).link_down
        assert down is not None and down.endpoint_id == "ep0" and down.reason
        listed = (await client.list_interfaces(ListInterfacesRequest())).interfaces[0]
        assert listed.state == InterfaceState.NO_LINK and listed.last_close_reason == down.reason
        assert addresses(guest, "eth0") == ["172.18.0.2/16"]
        assert [r["dst"] for r in routes(guest)] == before[1]


async def test_what_other_programs_break_is_mended(guest: Guest) -> None:
    wanted = interface(addresses=["172.18.0.2/16", "fd00::2/64"], gateways=["172.18.0.1", "fd00::1"])
    async with guest.client() as client, client.watch_events(WatchEventsRequest()) as events:
        stream = events.__aiter__()
        assert (await anext(stream)).started is not None
        await client.apply_interface(ApplyInterfaceRequest(interface=wanted))
        await client.apply_interface(ApplyInterfaceRequest(interface=interface(1)))
        for command, words in (
            (("link", "set", "eth0", "down"), "set up"),
            (("addr", "del", "172.18.0.2/16", "dev", "eth0"), "172.18.0.2/16"),
            (("-6", "route", "del", "default"), "IPv6 default route"),
            (("link", "set", "eth0", "mtu", "900"), "MTU 1500 restored"),  # takes IPv6 away, too
            (("link", "del", "eth0"), "created again"),
        ):
            guest.ip(*command)
            with trio.fail_after(60):
                event = (await anext(stream)).interface_repaired
            assert event is not None and event.endpoint_id == "ep0" and words in event.what
            assert sorted(addresses(guest, "eth0")) == sorted(wanted.addresses)
            assert default_devices(guest) == ["eth0"] and default_devices(guest, "-6") == ["eth0"]
        # One that was taken to another namespace is made anew, and does not stay behind there.
        with namespace() as other:
            guest.ip("link", "set", "eth0", "netns", other)
            with trio.fail_after(60):
                assert (await anext(stream)).interface_repaired is not None
            assert addresses(guest, "eth0") == wanted.addresses
            await until(lambda: "eth0" not in run_in(other, "ip", "link"), "the old one is gone")
        # Its link can be had again at once.
        secret = new_secret()
        await client.authorize_link(AuthorizeLinkRequest(endpoint_id="ep0", secret=secret))
        link, _ = await dial_link(guest.data, endpoint_id="ep0", secret=secret, features=[])
        await link.aclose()
        # What others add is theirs.
        guest.ip("addr", "add", "10.3.3.3/32", "dev", "eth1")
        guest.ip("route", "add", "192.0.2.0/24", "via", "172.19.0.1")
        guest.ip("addr", "del", "172.19.0.2/16", "dev", "eth1")
        while True:
            with trio.fail_after(60):
                event = (await anext(stream)).interface_repaired
            if event is not None:
                break
        assert set(addresses(guest, "eth1")) == {"10.3.3.3/32", "172.19.0.2/16"}


async def test_a_program_that_fights_is_not_fought(guest: Guest) -> None:
    async with guest.client() as client, client.watch_events(WatchEventsRequest()) as events:
        stream = events.__aiter__()
        assert (await anext(stream)).started is not None
        await client.apply_interface(ApplyInterfaceRequest(interface=interface()))
        for _ in range(5):
            guest.ip("link", "set", "eth0", "mtu", "1000")
            with trio.fail_after(60):
                assert (await anext(stream)).interface_repaired is not None
        guest.ip("link", "set", "eth0", "mtu", "1000")
        # The ration is used up: the host can still change what it wants at once, and the mending comes later.
        await client.apply_interface(ApplyInterfaceRequest(interface=interface(mtu=1300)))
        assert json.loads(guest.ip("-j", "link", "show", "dev", "eth0"))[0]["mtu"] == 1300


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_interfaces_outlive_the_agent_and_are_adopted(guest: Guest, number: signal.Signals) -> None:
    wanted = interface(addresses=["172.18.0.2/16", "fd00::2/64"], gateways=["172.18.0.1", "fd00::1"])
    async with guest.client() as client:
        await client.sync(SyncRequest(interfaces=[wanted, interface(1)]))
    guest.ip("route", "add", "192.0.2.0/24", "via", "172.18.0.77")
    before = settled(guest)
    index = json.loads(guest.ip("-j", "addr", "show", "dev", "eth0"))[0]["ifindex"]
    await guest.stop(number)
    await guest.start()
    async with guest.client() as client:
        listed = (await client.list_interfaces(ListInterfacesRequest())).interfaces
        assert [status.interface.endpoint_id for status in listed if status.interface] == ["ep0", "ep1"]
        adopted = listed[0].interface
        assert adopted is not None and adopted.name == "eth0" and adopted.mac_address == wanted.mac_address
        assert set(wanted.addresses) <= set(adopted.addresses) and adopted.gateways == wanted.gateways
        await refused(
            client.authorize_link(AuthorizeLinkRequest(endpoint_id="ep0", secret=b"s" * 16)),
            StatusCode.FAILED_PRECONDITION,
            "Sync",
        )
        assert settled(guest) == before
        done = await client.sync(SyncRequest(interfaces=[wanted]))
        assert done.removed_endpoint_ids == ["ep1"] and done.failures == []
        await client.authorize_link(AuthorizeLinkRequest(endpoint_id="ep0", secret=b"s" * 16))
    assert json.loads(guest.ip("-j", "addr", "show", "dev", "eth0"))[0]["ifindex"] == index
    assert any(route["dst"] == "192.0.2.0/24" for route in routes(guest))
    assert "eth1" not in guest.ip("link")


async def test_features_can_be_hidden(tmp_path: Path) -> None:
    async with (
        running_guest(
            tmp_path / "g",
            *(f"--without={name}" for name in ("tso", "uso", "resolver", "events", "hosts", "direct-dns", "vlan")),
        ) as guest,
        guest.client() as client,
    ):
        assert (await client.get_info(GetInfoRequest())).features == [GuestFeature.LINK_VNET_HDR]
        with pytest.raises(RpcError) as caught:
            async with client.watch_events(WatchEventsRequest()) as events:
                async for _ in events:
                    pass
        assert caught.value.code == StatusCode.UNIMPLEMENTED
        await refused(
            client.apply_resolver(ApplyResolverRequest(resolver=Resolver(enabled=True))),
            StatusCode.UNIMPLEMENTED,
            "no resolver",
        )
        await client.apply_resolver(ApplyResolverRequest(resolver=Resolver(manage_hosts=True)))
        assert not guest.hosts.exists()
        secret = new_secret()
        await client.apply_interface(ApplyInterfaceRequest(interface=interface(), link_secret=secret))
        wanted = [LinkFeature.VNET_HDR, LinkFeature.TSO]
        stream, agreed = await dial_link(guest.data, endpoint_id="ep0", secret=secret, features=wanted)
        assert agreed == {LinkFeature.VNET_HDR}
        await stream.aclose()
        assert (await client.sync(SyncRequest(interfaces=[interface()]))).failures == []


async def test_a_second_agent_leaves_the_firsts_interfaces_alone(guest: Guest, tmp_path: Path) -> None:
    async with guest.client() as client:
        await client.apply_interface(ApplyInterfaceRequest(interface=interface()))
        (tmp_path / "other").mkdir(mode=0o700)
        other = Guest(guest.netns, tmp_path / "other")
        other.resolv_conf.write_text("")
        try:
            await other.start()
            async with other.client() as second:
                assert (await second.list_interfaces(ListInterfacesRequest())).interfaces == []
                await refused(
                    second.apply_interface(ApplyInterfaceRequest(interface=interface())),
                    StatusCode.FAILED_PRECONDITION,
                    "another process",
                )
                assert (await second.sync(SyncRequest())).removed_endpoint_ids == []
        finally:
            other.kill()
        assert addresses(guest, "eth0") == ["172.18.0.2/16"]


def test_bad_addresses_are_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "agent_guest", "--control", "tcp:1", "--data", "unix:/x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    done = subprocess.run(
        [sys.executable, "-m", "agent_guest", "--control", "unix:/proc/x/c", "--data", "unix:/proc/x/d"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "/proc/x" in done.stderr


async def test_a_tap_that_could_not_be_adopted_is_taken_or_removed_later(guest: Guest) -> None:
    await guest.stop()
    guest.ip("tuntap", "add", "eth0", "mode", "tap")
    guest.ip("link", "set", "eth0", "alias", "taploom:ep0")
    guest.ip("tuntap", "add", "eth1", "mode", "tap", "multi_queue")
    guest.ip("link", "set", "eth1", "alias", "taploom:ep1")
    holder = subprocess.Popen(
        ["ip", "netns", "exec", guest.netns, sys.executable, "-c", HOLD_TAP, "eth0"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdin is not None and holder.stdout is not None
    try:
        assert holder.stdout.readline() == b"held\n"
        await guest.start()
        async with guest.client() as client:
            assert (await client.list_interfaces(ListInterfacesRequest())).interfaces == []
            # One whose flags are another agent's is made anew; one that is held is waited for.
            done = await client.sync(SyncRequest(interfaces=[interface(0), interface(1)]))
            assert [(failure.endpoint_id, failure.code) for failure in done.failures] == [
                ("ep0", int(StatusCode.FAILED_PRECONDITION))
            ]
            assert addresses(guest, "eth1") == ["172.19.0.2/16"]
            holder.stdin.close()
            holder.wait()
            assert (await client.sync(SyncRequest(interfaces=[interface(1)]))).removed_endpoint_ids == ["ep0"]
        assert "eth0" not in guest.ip("link")
    finally:
        holder.kill()
        holder.wait()


HOLD_TAP = """
import sys
from taploom.link import Tap
tap = Tap.open(sys.argv[1])
print("held", flush=True)
sys.stdin.read()
"""

"""VLANs over real virtual machines: in the datapath of the helper's kernel, behind a card there, and as interfaces that
the agent in a guest makes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from system.fabric import camel
from vmlab import RECOVERY, Lines, Ping, Talk, VmFabric, compile_tool, until, vm_fabric

from taploom.address import connect, parse_address
from taploom.contracts.taploom.guest.v1 import (
    ApplyInterfaceRequest,
    DeleteInterfaceRequest,
    GetInfoRequest,
    GuestFeature,
    Interface,
    InterfaceState,
    InterfaceStatus,
    ListInterfacesRequest,
    TrunkChild,
)
from taploom.contracts.taploom.guest.v1.rpc import GuestServiceClient
from taploom.rpc import RpcError, StatusCode, open_channel

pytestmark = pytest.mark.system

OFFICE = ("--subnet", "10.120.0.0/24", "--gateway", "10.120.0.1", "--ip-range", "10.120.0.192/26")


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, watch_consoles: Callable[[Path], None]) -> Iterator[VmFabric]:
    """web is on inner, where larger packets may pass than on base; db is on base. Behind card0, a card of the helper's
    (a veth: what is at its other end is the LAN), a host is in VLAN 120.
    """
    with vm_fabric(compile_tool(tmp_path_factory.mktemp("tool") / "vmtool"), "web", "db") as lab:
        watch_consoles(lab.path)
        for command in (
            "link add card0 type veth peer name trunk0",
            "link add link trunk0 name trunk0.120 type vlan id 120",
            "address add 10.120.0.1/24 dev trunk0.120",
            *(f"link set {name} up" for name in ("card0", "trunk0", "trunk0.120")),
        ):
            lab.in_helper("ip", *command.split())
        lab.run("network", "create", "office", "--vlan", "120", "--uplink", "card0", *OFFICE)
        lab.run("network", "create", "base", "--ipv6")
        lab.run("network", "create", "inner", "--ipv6", "--mtu", "9000")
        lab.run("network", "create", "third")
        lab.run("network", "connect", "inner", "web", "--alias", "front")
        lab.run("network", "connect", "base", "db")
        yield lab


def trunk(lab: VmFabric, network: str, tag: int, *options: str) -> str:
    """Connects db by tagged frames over its interface on base; returns the name of the interface that it has then."""
    lab.run("network", "connect", network, "db", "--parent", "base", "--tag", str(tag), *options)
    return str(camel(lab.endpoint("db", network), "interface_name"))


def link(lab: VmFabric, name: str) -> dict[str, Any]:
    """A link of db's as `ip` has it; {}: there is none."""
    shown = lab.guest("db", "ip", "-json", "-details", "link", "show", "dev", name)
    return dict(json.loads(shown.stdout)[0]) if shown.returncode == 0 else {}


def links(lab: VmFabric) -> dict[str, Any]:
    """What `taploom status` says of db's networks."""
    found = lab.json("status")["links"]
    return {
        camel(link["endpoint"], "network_name"): link for link in found if camel(link["endpoint"], "guest_name") == "db"
    }


def test_a_network_behind_a_card_of_the_helpers(lab: VmFabric) -> None:
    lab.run("network", "connect", "office", "web", "--priority", "1")
    assert lab.answers("web", "10.120.0.1")
    assert lab.answers("helper", lab.address("web", "office"))
    assert "master ovs-system" in lab.in_helper("ip", "-o", "link", "show", "card0"), "the kernel's datapath has it"
    lab.run("network", "disconnect", "office", "web")


@contextlib.asynccontextmanager
async def agent(lab: VmFabric) -> AsyncIterator[GuestServiceClient]:
    """db's agent, called beside the bridge, which knows nothing of these endpoints and leaves them alone."""
    stream = await connect(parse_address(lab.json("guest", "inspect", "db")["address"]))
    async with open_channel(stream) as channel:
        yield GuestServiceClient(channel)


def described(endpoint_id: str, name: str, number: int, **changes: object) -> Interface:
    values: dict[str, object] = {"mac_address": f"02:00:00:00:00:{number:02x}", "mtu": 1500, **changes}
    return Interface(endpoint_id=endpoint_id, name=name, addresses=[f"10.99.{number}.2/24"], **values)  # type: ignore[arg-type]


async def test_the_contract(lab: VmFabric) -> None:
    async with agent(lab) as client:

        async def apply(interface: Interface) -> InterfaceStatus:
            done = await client.apply_interface(ApplyInterfaceRequest(interface=interface), timeout=RECOVERY)
            assert done.status is not None
            return done.status

        async def refused(interface: Interface, code: StatusCode, words: str) -> None:
            with pytest.raises(RpcError, match=words) as caught:
                await apply(interface)
            assert caught.value.code == code

        assert GuestFeature.VLAN in (await client.get_info(GetInfoRequest(), timeout=RECOVERY)).features
        base = described("x0", "x0", 1)
        child = described("x1", "x0.7", 2, mtu=9000, trunk_child=TrunkChild(parent_endpoint_id="x0", tag=7))
        await refused(child, StatusCode.FAILED_PRECONDITION, "endpoint x0, which is to carry it, has no interface here")
        await apply(base)
        status = await apply(child)
        assert (status.interface, status.state) == (child, InterfaceState.NO_LINK)
        listed = (await client.list_interfaces(ListInterfacesRequest(), timeout=RECOVERY)).interfaces
        (one,) = [one for one in listed if one.interface == child]
        assert one.counters is not None, "nothing yet, and that is known"
        first = link(lab, "x0.7")
        assert (first["link"], first["address"], first["mtu"]) == ("x0", child.mac_address, 1500)
        assert first["linkinfo"]["info_data"]["id"] == 7
        nested = described("x2", "x2", 3, trunk_child=TrunkChild(parent_endpoint_id="x1", tag=8))
        await refused(nested, StatusCode.INVALID_ARGUMENT, "tags are not nested")
        same = described("x2", "x2", 3, trunk_child=child.trunk_child)
        await refused(same, StatusCode.INVALID_ARGUMENT, "tag 7 is endpoint x1's there")
        # In place: its own changes and those of what carries it. Another tag is another interface.
        await apply(described("x0", "x0", 1, mtu=1400))
        assert (link(lab, "x0.7")["ifindex"], link(lab, "x0.7")["mtu"]) == (first["ifindex"], 1400)
        await apply(base)
        assert link(lab, "x0.7")["mtu"] == 1500
        await apply(dataclasses.replace(child, name="lab7", mtu=1300))
        assert (link(lab, "lab7")["ifindex"], link(lab, "lab7")["mtu"]) == (first["ifindex"], 1300)
        child.trunk_child = TrunkChild(parent_endpoint_id="x0", tag=9)
        await apply(child)
        assert not link(lab, "lab7")
        assert link(lab, "x0.7")["linkinfo"]["info_data"]["id"] == 9
        # It waits for what carries it.
        await client.delete_interface(DeleteInterfaceRequest(endpoint_id="x0"), timeout=RECOVERY)
        listed = (await client.list_interfaces(ListInterfacesRequest(), timeout=RECOVERY)).interfaces
        reasons = {one.interface.endpoint_id: one.last_close_reason for one in listed if one.interface is not None}
        assert reasons["x1"] == "the interface that carries it is gone"
        assert not link(lab, "x0.7")
        await apply(base)
        assert link(lab, "x0.7")["link"] == "x0"
        for endpoint_id in ("x0", "x1"):
            await client.delete_interface(DeleteInterfaceRequest(endpoint_id=endpoint_id), timeout=RECOVERY)
        assert not link(lab, "x0")
        assert not link(lab, "x0.7")


def test_interfaces_that_the_agent_makes(lab: VmFabric) -> None:
    over = str(camel(lab.endpoint("db", "base"), "interface_name"))
    name = trunk(lab, "inner", 20, "--alias", "inside", "--priority", "1")
    office = trunk(lab, "office", 30)
    assert (name, office) == (f"{over}.20", f"{over}.30")
    made, parent = link(lab, name), link(lab, over)
    assert made["linkinfo"]["info_data"]["id"] == 20
    assert made["address"] == parent["address"] == camel(lab.endpoint("db", "inner"), "mac_address")
    assert made["mtu"] == parent["mtu"] == 1500, "not the 9000 of its network"
    assert made["operstate"] == parent["operstate"] == "UP"

    # Both ways, both families, names on either side, and the way out.
    for family in ("-4", "-6"):
        assert lab.answers("db", "front", family)
        assert lab.answers("web", "inside", family)
    assert lab.in_guest("db", "getent", "hosts", "web.inner").split()[1] == "web.inner"
    assert f" dev {name} " in lab.in_guest("db", "ip", "route", "show", "default")
    assert lab.answers("db", "10.120.0.1")
    assert lab.answers("helper", lab.address("db", "office"))
    # As large as the parent's frames are, without the tag; and enough at once that segmentation offload takes part.
    assert lab.answers("db", "front", "-4", "-M", "do", "-s", "1472")
    server = Lines(lab, "db", "iperf3", "-s", "-1", "--forceflush")
    until(lambda: any("listening" in line for line in server.so_far()), "iperf3 listens")
    lab.in_guest("web", "iperf3", "-c", lab.address("db", "inner"), "-n", "8M", timeout=RECOVERY)
    server.stop()
    counted = links(lab)
    assert min(int(camel(counted[network], "rx_bytes")) for network in ("inner", "base")) > 8 << 20
    assert counted["inner"]["up"]
    # What is on one tag is neither on another nor on none.
    for other in (office, over):
        assert not lab.answers("db", lab.address("web", "inner"), "-I", other, "-W", "1")

    # The agent that is killed and started again finds it, and nothing on it has noticed.
    ping, talk = Ping(lab, "db", lab.address("web", "inner")), Talk(lab, "web", "db", lab.address("db", "inner"))
    lab.in_guest("db", "kill", "-9", str(lab.agent_pid("db")))
    lab.until_whole()
    ping.until_goes_on(lab, "after the agent was killed")
    talk.says("after")
    assert link(lab, name)["ifindex"] == made["ifindex"]
    # What another program takes away comes back: it alone, and with what carries it.
    for change in (("del", name), ("del", over), ("set", over, "down")):
        lab.in_guest("db", "ip", "link", *change)
        ping.until_goes_on(lab, f"after {change}")
    talk.says("and after that")
    talk.close()
    ping.stop()
    assert link(lab, name)["ifindex"] != made["ifindex"]

    # What carries it goes, and comes again.
    lab.run("network", "disconnect", "base", "db")
    assert not link(lab, name)
    assert not camel(lab.endpoint("db", "inner"), "link_up")
    assert "inner" not in links(lab)
    assert lab.silent("web", lab.address("db", "inner"))
    lab.run("network", "connect", "base", "db")
    lab.until_whole()
    assert lab.answers("web", "inside")
    assert camel(lab.endpoint("db", "inner"), "link_up")

    # Somebody's own stays somebody's, and is told of.
    lab.in_guest("db", "ip", "link", "add", "link", over, "name", "mine", "type", "vlan", "id", "40")
    taken = lab.fails("network", "connect", "third", "db", "--parent", "base", "--tag", "40")
    assert f"tag 40 over {over} is mine, which belongs to something that is not taploom's" in taken
    lab.in_guest("db", "ip", "link", "del", "mine")

    # Disconnected, it is gone with its names; the other stays.
    lab.run("network", "disconnect", "inner", "db")
    assert not link(lab, name)
    assert link(lab, office)
    assert lab.guest("db", "getent", "hosts", "web").returncode == 2
    assert lab.answers("db", "10.120.0.1")
    # Also where there was no agent to tell, so that the next one finds what is not to be there.
    lab.in_guest("db", "kill", "-9", str(lab.agent_pid("db")))
    lab.run("network", "disconnect", "office", "db")
    until(lambda: not link(lab, office), f"{office} is gone\n{lab.logs()}")
    lab.until_whole()


def test_the_card_is_free_again(lab: VmFabric) -> None:
    lab.run("network", "rm", "office")
    until(lambda: "master" not in lab.in_helper("ip", "-o", "link", "show", "card0"), "card0 is no port any more")

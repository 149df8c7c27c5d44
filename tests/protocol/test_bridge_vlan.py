"""VLANs between the bridge and the agents: what they are told, also when what carries an endpoint comes and goes, and
agents that are too old for them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from bridge_support import Rig, open_rig, unchanged
from test_bridge_fabric import connect, create, disconnect, refused, status

from taploom.contracts.taploom.bridge import v1 as bridge
from taploom.contracts.taploom.guest import v1 as guest
from taploom.contracts.taploom.helper import v1 as helper
from taploom.rpc import StatusCode

TOO_OLD = "the helper (version 0.0.9) is too old for VLANs: update it"


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path) as rig:
        yield rig


async def vlan(rig: Rig, name: str = "office", tag: int = 120, **options: object) -> bridge.Network:
    given = {"taploom.vlan.tag": str(tag), "taploom.vlan.uplink": "eth1"}
    place = {"subnets": [f"10.{tag}.0.0/24"], "gateways": [f"10.{tag}.0.1"]}
    return await create(rig, name, options=given, **place, **options)


def over(network: str, tag: int) -> dict[str, dict[str, str]]:
    return {"driver_options": {"taploom.vlan.parent": network, "taploom.vlan.tag": str(tag)}}


async def test_what_the_helper_is_told(rig: Rig) -> None:
    network = await vlan(rig)
    assert rig.helper.networks[network.id].vlan == helper.Vlan(tag=120, uplink="eth1")
    await create(rig)
    assert {one.vlan for key, one in rig.helper.networks.items() if key != network.id} == {None}
    web = await rig.guest("web")
    base = await connect(rig, "app", "web")
    child = await connect(rig, "office", "web", **over("app", 20))
    assert child.link_up
    assert rig.helper.endpoints[child.id].trunk_child == helper.TrunkChild(parent_endpoint_id=base.id, tag=20)
    assert web.interfaces[child.id].trunk_child == guest.TrunkChild(parent_endpoint_id=base.id, tag=20)
    assert web.interfaces[child.id].name == child.interface_name == "eth0.20"
    assert web.interfaces[base.id].trunk_child is None
    assert not child.left_to_guest
    # The whole snapshot says the same.
    await rig.helper.stop()
    rig.helper.endpoints.clear()
    await rig.nursery.start(rig.helper.run)
    await rig.until(lambda: rig.helper.endpoints.keys() == {base.id, child.id})
    assert rig.helper.endpoints[child.id].trunk_child == helper.TrunkChild(parent_endpoint_id=base.id, tag=20)
    # What carries it goes, and comes back as another.
    await disconnect(rig, "app", "web")
    await rig.until(lambda: not rig.helper.endpoints and not web.interfaces)
    assert not (await inspected(rig, "office"))[0].link_up
    base = await connect(rig, "app", "web")
    await rig.until(lambda: child.id in rig.helper.endpoints)
    assert rig.helper.endpoints[child.id].trunk_child == helper.TrunkChild(parent_endpoint_id=base.id, tag=20)
    await rig.until(lambda: child.id in web.interfaces)
    assert web.interfaces[child.id].trunk_child == guest.TrunkChild(parent_endpoint_id=base.id, tag=20)
    # A guest's agent that knows nothing is told all of it.
    await web.stop()
    web.interfaces.clear()
    await rig.nursery.start(web.run)
    await rig.until(lambda: web.interfaces.keys() == {base.id, child.id} and rig.fabric.links[base.id].up)
    await disconnect(rig, "office", "web")
    assert list(web.interfaces) == [base.id]


async def inspected(rig: Rig, name: str) -> list[bridge.Endpoint]:
    found = (await rig.networks.get_network(bridge.GetNetworkRequest(network=name))).network
    assert found is not None
    return found.endpoints


async def test_a_guest_whose_agent_makes_no_vlan_interfaces(rig: Rig) -> None:
    """It is told nothing of them and all works as if somebody in the guest made them, which is what people read."""
    for name in ("app", "lab"):
        await create(rig, name)
    web = await rig.guest("web", run=False)
    web.features.remove(guest.GuestFeature.VLAN)
    web.version = "0.0.9"
    await rig.nursery.start(web.run)
    await rig.until(lambda: rig.peer("web").connected and "Sync" in web.calls)
    base = await connect(rig, "app", "web")
    child = await connect(rig, "lab", "web", **over("app", 20))
    left = (
        "the agent (version 0.0.9) makes no VLAN interfaces: it is too old, or its VM's kernel has none (8021q); where "
        "it has, type there: ip link add link eth0 name eth0.20 type vlan id 20"
    )
    assert (child.link_up, child.left_to_guest) == (True, left)
    assert not base.left_to_guest
    assert list(web.interfaces) == [base.id]
    assert (await status(rig)).converged
    # Neither does the next snapshot say anything of it, until there is an agent that can.
    for able in (False, True, False):
        await web.stop()
        web.features = [f for f in guest.GuestFeature if f and (able or f != guest.GuestFeature.VLAN)]
        web.interfaces.clear()
        await rig.nursery.start(web.run)
        await rig.until(lambda: base.id in web.interfaces and rig.fabric.links[base.id].up)
        assert (child.id in web.interfaces) is able
        assert bool((await inspected(rig, "lab"))[0].left_to_guest) is not able
        assert (await inspected(rig, "lab"))[0].link_up
    await disconnect(rig, "lab", "web")
    assert list(web.interfaces) == [base.id]


async def test_a_guest_that_has_such_an_interface_of_its_own(rig: Rig) -> None:
    for name in ("app", "lab"):
        await create(rig, name)
    web = await rig.guest("web")
    base = await connect(rig, "app", "web")
    web.own_interfaces.add("eth0.20")
    with (
        unchanged(rig),
        refused(StatusCode.UNAVAILABLE, "guest web refuses it: interface eth0.20 is not mine"),
    ):
        await connect(rig, "lab", "web", **over("app", 20))
    await rig.until(lambda: list(rig.helper.endpoints) == [base.id])
    # One that comes later: it is said, and put right as soon as that can be.
    web.own_interfaces.clear()
    child = await connect(rig, "lab", "web", **over("app", 20))
    await web.stop()
    web.interfaces.clear()
    web.own_interfaces.add("eth0.20")
    await rig.nursery.start(web.run)
    await rig.until(lambda: base.id in web.interfaces and rig.fabric.links[base.id].up)
    assert not (await inspected(rig, "lab"))[0].link_up
    pending = {one.subject: one.reason for one in (await status(rig)).pending}
    assert pending == {"endpoint web on lab": "guest web refuses it: interface eth0.20 is not mine"}
    web.own_interfaces.clear()
    await rig.until(lambda: child.id in web.interfaces)
    assert (await status(rig)).converged


async def test_an_old_helper(tmp_path: Path) -> None:
    async with open_rig(tmp_path, run_helper=False) as rig:
        rig.helper.features.remove(helper.HelperFeature.VLAN)
        rig.helper.version = "0.0.9"
        await rig.nursery.start(rig.helper.run)
        await rig.until(lambda: rig.fabric.helper.connected and "Sync" in rig.helper.calls)
        for name in ("app", "lab"):
            await create(rig, name)
        await rig.guest("web")
        await connect(rig, "app", "web")
        with unchanged(rig):
            with refused(StatusCode.FAILED_PRECONDITION, TOO_OLD):
                await vlan(rig)
            with refused(StatusCode.FAILED_PRECONDITION, TOO_OLD):
                await connect(rig, "lab", "web", **over("app", 20))
        assert {one.name for one in rig.helper.networks.values()} == {"bridge", "app", "lab"}
        assert len(rig.helper.endpoints) == 1


async def test_a_helper_that_is_older_than_before(rig: Rig) -> None:
    network = await vlan(rig)
    await create(rig)
    await rig.guest("web")
    base = await connect(rig, "app", "web")
    await connect(rig, "office", "web", **over("app", 20))
    await rig.helper.stop()
    rig.helper.networks.clear()
    rig.helper.endpoints.clear()
    rig.helper.features.remove(helper.HelperFeature.VLAN)
    rig.helper.version = "0.0.9"
    await rig.nursery.start(rig.helper.run)
    await rig.until(lambda: base.id in rig.helper.endpoints and rig.fabric.links[base.id].up)
    # Everything else is as before; of the VLAN it is said why it is not.
    assert network.id not in rig.helper.networks
    assert list(rig.helper.endpoints) == [base.id]
    pending = {one.subject: one.reason for one in (await status(rig)).pending}
    assert pending == {"network office": TOO_OLD, "endpoint web on office": TOO_OLD}

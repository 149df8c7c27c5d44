"""VLANs between the bridge and the helper: what it is told, also when what carries an endpoint comes and goes, and a
helper that is too old for them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from bridge_support import Rig, open_rig, unchanged
from test_bridge_fabric import connect, create, disconnect, refused, status

from taploom.contracts.taploom.bridge import v1 as bridge
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
    assert list(web.interfaces) == [base.id], "tagged frames have no interface of the agent's"
    # The whole snapshot says the same.
    await rig.helper.stop()
    rig.helper.endpoints.clear()
    await rig.nursery.start(rig.helper.run)
    await rig.until(lambda: rig.helper.endpoints.keys() == {base.id, child.id})
    assert rig.helper.endpoints[child.id].trunk_child == helper.TrunkChild(parent_endpoint_id=base.id, tag=20)
    # What carries it goes, and comes back as another.
    await disconnect(rig, "app", "web")
    await rig.until(lambda: not rig.helper.endpoints)
    base = await connect(rig, "app", "web")
    await rig.until(lambda: child.id in rig.helper.endpoints)
    assert rig.helper.endpoints[child.id].trunk_child == helper.TrunkChild(parent_endpoint_id=base.id, tag=20)


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

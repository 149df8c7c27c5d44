"""Load balancers between the bridge and the helper: one call per change, whole, kept, told plainly when impossible."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from bridge_support import Rig, open_rig, unchanged
from test_bridge_fabric import connect, create, disconnect, refused, status

from host_bridge.balancer.document import read
from host_bridge.balancer.messages import to_message
from taploom.contracts.taploom.bridge import v1 as bridge
from taploom.contracts.taploom.helper import v1 as helper
from taploom.rpc import StatusCode


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path) as rig:
        yield rig


async def apply(rig: Rig, body: str) -> bridge.ApplyBalancersResponse:
    found = [to_message(one) for one in read(f"balancers: {body}")]
    return await rig.balancers.apply_balancers(bridge.ApplyBalancersRequest(source="lb.yaml", balancers=found))


def told(rig: Rig) -> dict[str, set[str]]:
    """The backends' endpoints by load balancer, as the helper has been told."""
    return {one.balancer_id: {b.endpoint_id for b in one.backends} for one in rig.helper.balancers.balancers}


async def test_backends_follow(rig: Rig) -> None:
    await create(rig)
    for name in ("web", "other"):
        await rig.guest(name)
    web = await connect(rig, "app", "web", aliases=["shop", "www"])
    done = await apply(rig, "{shop: {network: app, ports: [80:8080], backends: [{alias: www}]}}")
    assert (done.created, done.pending) == (["shop"], "")
    assert told(rig) == {"shop": {web.id}}
    assert rig.helper.calls.count("ApplyBalancers") == 1
    # Its name is nobody else's.
    await rig.until(lambda: "shop" not in rig.helper.endpoints[web.id].names)
    assert "www" in rig.helper.endpoints[web.id].names
    other = await connect(rig, "app", "other", aliases=["www"])
    assert told(rig) == {"shop": {web.id, other.id}}
    shown = (await rig.balancers.get_balancer(bridge.GetBalancerRequest(name="shop"))).balancer
    assert shown is not None
    assert {(one.guest_name, one.health) for one in shown.backends} == {
        ("web", bridge.BackendHealth.DOWN),
        ("other", bridge.BackendHealth.DOWN),
    }
    await disconnect(rig, "app", "other")
    await rig.until(lambda: told(rig) == {"shop": {web.id}})
    # A helper that starts from nothing is told all of it.
    await rig.helper.stop()
    rig.helper.balancers = helper.Balancers()
    await rig.nursery.start(rig.helper.run)
    await rig.until(lambda: told(rig) == {"shop": {web.id}})
    await rig.balancers.remove_balancers(bridge.RemoveBalancersRequest(names=["shop"]))
    assert told(rig) == {}
    await rig.until(lambda: "shop" in rig.helper.endpoints[web.id].names)


async def test_refusals_and_an_old_helper(rig: Rig) -> None:
    await create(rig)
    await apply(rig, "{shop: {network: app, ports: [80]}}")
    with unchanged(rig), refused(StatusCode.INVALID_ARGUMENT, "lb.yaml:1: balancer b: network 'nosuch' not found"):
        await apply(rig, "{a: {network: app, ports: [80]}, b: {network: nosuch, ports: [80]}}")
    with unchanged(rig), refused(StatusCode.NOT_FOUND, "balancer 'nosuch' not found"):
        await rig.balancers.remove_balancers(bridge.RemoveBalancersRequest(names=["shop", "nosuch"]))
    await rig.helper.stop()
    rig.helper.features.remove(helper.HelperFeature.BALANCERS)
    rig.helper.version = "0.0.9"
    await rig.nursery.start(rig.helper.run)
    await rig.until(lambda: rig.fabric.helper.lacks(helper.HelperFeature.BALANCERS))
    text = "the helper (version 0.0.9) is too old for load balancers: update it"
    await rig.until(lambda: rig.fabric.helper.connected)
    assert [one.reason for one in (await status(rig)).pending if one.subject == "the load balancers"] == [text]
    with unchanged(rig), refused(StatusCode.FAILED_PRECONDITION, text):
        await apply(rig, "{more: {network: app, ports: [80]}}")
    assert (await rig.balancers.list_balancers(bridge.ListBalancersRequest())).pending == text

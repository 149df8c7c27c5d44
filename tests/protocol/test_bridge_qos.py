"""Limits between the bridge and the helper: told with the endpoint, kept, told plainly when impossible."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from bridge_support import Rig, open_rig, unchanged
from test_bridge_fabric import connect, create, disconnect, refused, status

from taploom.contracts.taploom.bridge import v1 as bridge
from taploom.contracts.taploom.helper import v1 as helper
from taploom.rpc import RpcError, StatusCode


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path) as rig:
        yield rig


async def set_qos(rig: Rig, guest: str = "web", network: str = "app", **fields: object) -> bridge.SetQosResponse:
    return await rig.qos.set_qos(bridge.SetQosRequest(network=network, guest=guest, **fields))  # type: ignore[arg-type]


def told(rig: Rig, endpoint_id: str) -> dict[helper.QosDirection, int]:
    qos = rig.helper.endpoints[endpoint_id].qos
    return {} if qos is None else {rule.direction: rule.rate_bits_per_second for rule in qos.rules}


async def test_told_with_the_endpoint(rig: Rig) -> None:
    await create(rig)
    await rig.guest("web")
    await rig.guest("db")
    web, db = await connect(rig, "app", "web"), await connect(rig, "app", "db")
    assert rig.helper.endpoints[web.id].qos is None
    out, into = helper.QosDirection.OUT, helper.QosDirection.IN
    done = await set_qos(rig, network="", rate_bits_per_second=10_000_000)
    assert done.pending == ""
    assert done.entry is not None
    assert [rule.burst_bytes for rule in done.entry.rules] == [250_000, 250_000]
    assert told(rig, web.id) == {out: 10_000_000, into: 10_000_000}
    await set_qos(rig, "", rate_bits_per_second=1_000_000, direction=bridge.QosDirection.IN)
    assert (told(rig, web.id)[into], told(rig, db.id)) == (10_000_000, {into: 1_000_000})
    found = (await rig.networks.get_network(bridge.GetNetworkRequest(network="app"))).network
    assert found is not None
    assert [rule.rate_bits_per_second for rule in found.qos] == [1_000_000]
    assert [len(endpoint.qos) for endpoint in found.endpoints] == [1, 2]
    listed = (await rig.qos.list_qos(bridge.ListQosRequest())).entries
    assert [(entry.guest_name, len(entry.rules)) for entry in listed] == [("", 1), ("web", 2)]
    # Another connection of the guest is another matter; the network's default is there from the first moment.
    await disconnect(rig, "app", "web")
    web = await connect(rig, "app", "web", driver_options={"taploom.qos.out.rate": "2mbit"})
    assert told(rig, web.id) == {out: 2_000_000, into: 1_000_000}
    await rig.qos.remove_qos(bridge.RemoveQosRequest(network="app"))
    assert (told(rig, web.id), told(rig, db.id)) == ({out: 2_000_000}, {})


async def test_refusals(rig: Rig) -> None:
    await create(rig)
    await rig.guest("web")
    await connect(rig, "app", "web")
    with unchanged(rig):
        for fields, code in (
            ({"rate_bits_per_second": 0}, StatusCode.INVALID_ARGUMENT),
            ({"burst_bytes": 100_000}, StatusCode.INVALID_ARGUMENT),
            ({"dscp": 64}, StatusCode.INVALID_ARGUMENT),
            ({"direction": bridge.QosDirection(7), "dscp": 1}, StatusCode.INVALID_ARGUMENT),
            ({"network": "nowhere", "dscp": 1}, StatusCode.NOT_FOUND),
            ({"guest": "nobody", "dscp": 1}, StatusCode.NOT_FOUND),
            ({"network": "bridge", "dscp": 1}, StatusCode.FAILED_PRECONDITION),
        ):
            with refused(code, ""):
                await set_qos(rig, **fields)
        with refused(StatusCode.NOT_FOUND, "nothing is said of web on app"):
            await rig.qos.remove_qos(bridge.RemoveQosRequest(network="app", guest="web"))
        with refused(StatusCode.INVALID_ARGUMENT, "rate 0 would let nothing pass"):
            await create(rig, "odd", options={"taploom.qos.rate": "0"})


async def test_an_old_helper(tmp_path: Path) -> None:
    async with open_rig(tmp_path, run_helper=False) as rig:
        rig.helper.features.remove(helper.HelperFeature.QOS)
        await rig.nursery.start(rig.helper.run)
        await rig.until(lambda: rig.fabric.helper.connected and "Sync" in rig.helper.calls)
        await create(rig)
        await rig.guest("web")
        web = await connect(rig, "app", "web", driver_options={"taploom.qos.rate": "2mbit"})
        with pytest.raises(RpcError, match="is too old to limit rates: update it"):
            await set_qos(rig, rate_bits_per_second=10_000_000)
        assert told(rig, web.id) == {}
        assert [one.subject for one in (await status(rig)).pending] == ["the limits"]
        assert "too old" in (await rig.qos.list_qos(bridge.ListQosRequest())).pending


async def test_recorded_while_the_helper_is_away(rig: Rig) -> None:
    await create(rig)
    await rig.guest("web")
    web = await connect(rig, "app", "web")
    await rig.helper.stop()
    await rig.until(lambda: not rig.fabric.helper.connected)
    assert "helper" in (await set_qos(rig, rate_bits_per_second=10_000_000)).pending
    await rig.nursery.start(rig.helper.run)
    await rig.until(lambda: len(told(rig, web.id)) == 2)

"""Load balancers at the helper: OVN's rows, what Sync makes of them, backends that come and go, and health by event."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from test_helper_rig import Guest, Rig, endpoint, eventually, helper, network, rpc_status
from test_policy_helper import rows

from taploom.contracts.taploom.helper.v1 import (
    ApplyBalancersRequest,
    BackendHealth,
    Balancer,
    BalancerBackend,
    BalancerFrontend,
    BalancerHealthCheck,
    BalancerPort,
    BalancerProtocol,
    Balancers,
    GetInfoRequest,
    HelperFeature,
    ListBackendsRequest,
    SyncRequest,
    WatchEventsRequest,
)

pytestmark = pytest.mark.system

HERE = Path(__file__).parent
V4, V6 = "10.77.1.200", "fd00:77:1::c8"


def balancer(*hosts: int, **fields: Any) -> Balancer:
    """A load balancer on network 1 with these endpoints as backends."""
    values: dict[str, Any] = {
        "balancer_id": "shop",
        "network_id": "n1",
        "frontends": [BalancerFrontend(network_id="n1", addresses=[V4, V6], names=["shop"])],
        "ports": [
            BalancerPort(protocol=protocol, port=80, target_port=8080)
            for protocol in (BalancerProtocol.TCP, BalancerProtocol.UDP)
        ],
        "backends": [BalancerBackend(endpoint_id=f"e1-{host}") for host in hosts],
    }
    return Balancer(**(values | fields))


async def apply(rig: Rig, *balancers: Balancer) -> None:
    request = ApplyBalancersRequest(balancers=Balancers(balancers=list(balancers)))
    await rig.balancers.apply_balancers(request, timeout=60)


async def names(guest: Guest, address: str, protocol: str = "tcp", count: int = 20) -> set[str]:
    """Who answers: names, or errors'."""
    command = (sys.executable, str(HERE / "balancer_client.py"), address, "80", protocol, str(count))
    text = await trio.to_thread.run_sync(guest.run, *command)
    return {answer.split()[0] for answer in json.loads(text)}


@contextlib.asynccontextmanager
async def serving(guest: Guest, name: str) -> AsyncIterator[None]:
    program = str(HERE / "balancer_server.py")
    command = ("ip", "netns", "exec", guest.netns, sys.executable, program, name, "8080", "8081")
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            assert await trio.to_thread.run_sync(server.stdout.readline) == "ready\n"
            yield
        finally:
            server.kill()


async def test_rows_come_and_go() -> None:
    async with helper() as rig:
        info = await rig.client.get_info(GetInfoRequest())
        assert HelperFeature.BALANCERS in info.features
        await rig.apply(network(1, ipv6=True))
        client = await rig.guest(endpoint(1, 2, "client", ipv6=True), dns="169.254.64.1")
        first = await rig.guest(endpoint(1, 3, ipv6=True))
        before = rows(rig)
        # A backend that is not there yet is no error.
        await apply(rig, balancer(3, 4))
        assert client.dig("169.254.64.1", "+short", "shop.net1", "A") == V4
        assert client.dig("169.254.64.1", "+short", "shop", "AAAA") == V6
        async with serving(first, "first"):
            for address in (V4, V6):
                assert await names(client, address) == {"first"}
                assert await names(client, address, "udp") == {"first"}
            second = await rig.guest(endpoint(1, 4, ipv6=True))
            async with serving(second, "second"):
                for address in (V4, V6):
                    assert await names(client, address, count=30) == {"first", "second"}
                found = (await rig.balancers.list_backends(ListBackendsRequest())).backends
                assert {one.endpoint_id for one in found} == {"e1-3", "e1-4"}
                assert {one.health for one in found} == {BackendHealth.UNSPECIFIED}
                await rig.delete_endpoint("e1-4")
                assert await names(client, V4) == {"first"}
            await apply(rig, balancer())
            assert await names(client, V4, count=2) == {"ConnectionRefusedError"}
            assert await names(client, V6, count=2) == {"ConnectionRefusedError"}
        await apply(rig)
        assert rows(rig) == before
        assert client.dig("169.254.64.1", "+short", "shop.net1", "A") == ""
        # With its network it comes and goes, too.
        await apply(rig, balancer(3))
        await rig.delete_network("n1")
        assert not any("Load_Balancer" in row for row in rows(rig))
        await rig.apply(network(1, ipv6=True))
        assert sum('"Load_Balancer table"' in row for row in rows(rig)) == 2
        await apply(rig)
        assert not any("Load_Balancer" in row for row in rows(rig))


async def test_sync_and_refusals() -> None:
    async with helper() as rig:
        described = [endpoint(1, 2), endpoint(1, 3)]
        plain = SyncRequest(networks=[network(1)], endpoints=described)
        await rig.client.sync(plain)
        before = rows(rig)
        shop = balancer(2, 3, frontends=[BalancerFrontend(network_id="n1", addresses=[V4], names=["shop"])])
        request = SyncRequest(networks=[network(1)], endpoints=described, balancers=Balancers(balancers=[shop]))
        assert not (await rig.client.sync(request)).failures
        balanced = rows(rig)
        assert balanced != before
        # The same again changes no row; what is wrong changes none either.
        assert not (await rig.client.sync(request)).failures
        assert rows(rig) == balanced
        wrong = balancer(ports=[BalancerPort(protocol=BalancerProtocol.TCP, port=80)])
        refused = ApplyBalancersRequest(balancers=Balancers(balancers=[shop, wrong]))
        assert await rpc_status(lambda: rig.balancers.apply_balancers(refused)) == "INVALID_ARGUMENT"
        failed = SyncRequest(networks=[network(1)], endpoints=described, balancers=refused.balancers)
        assert [one.id for one in (await rig.client.sync(failed)).failures] == ["balancers"]
        assert rows(rig) == balanced
        await rig.client.sync(plain)
        assert rows(rig) == before


async def test_health_is_told() -> None:
    async with helper() as rig:
        await rig.apply(network(1, ipv6=True))
        guest = await rig.guest(endpoint(1, 3, ipv6=True))
        told: list[tuple[str, BackendHealth]] = []

        async def follow(task_status: trio.TaskStatus[None]) -> None:
            async with rig.client.watch_events(WatchEventsRequest()) as stream:
                async for event in stream:
                    if event.started is not None:
                        task_status.started()
                    if event.backend_changed is not None:
                        told.append((event.backend_changed.address, event.backend_changed.health))

        async with trio.open_nursery() as nursery:
            await nursery.start(follow)
            check = BalancerHealthCheck(
                interval_seconds=1,
                timeout_seconds=1,
                failures=1,
                successes=1,
                source_addresses=["10.77.1.254", "fd00:77:1::fe"],
            )
            # An address that OVN's checks come from is answered for, and nobody's.
            await apply(rig, balancer(3, health_check=check, ports=[balancer().ports[0]]))
            both = {"10.77.1.3", "fd00:77:1::3"}
            await eventually(lambda: {a for a, health in told if health is BackendHealth.DOWN} == both)
            async with serving(guest, "first"):
                await eventually(lambda: {a for a, health in told if health is BackendHealth.UP} == both)
                found = (await rig.balancers.list_backends(ListBackendsRequest(balancer_ids=["shop"]))).backends
                assert {(one.address, one.target_port) for one in found} == {(address, 8080) for address in both}
            nursery.cancel_scope.cancel()

"""Any sequence of requests while agents die, come back, refuse and lose links: in the end all is as asked for."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest
import trio
from bridge_support import FakeAgent, Rig, open_rig

from host_bridge.errors import BridgeError
from host_bridge.fabric import Timing
from host_bridge.model import NetworkOptions
from taploom.rpc import RpcError, StatusCode

GUESTS = ("web", "db", "cache")
NETWORKS = ("red", "blue", "green")
METHODS = ("ApplyInterface", "ApplyEndpoint", "DeleteInterface", "AuthorizeLink", "Sync", "ApplyNetwork")
STEPS = 60


class Chaos:
    """Random requests and failures on a rig; what must be there in the end is in the database."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig = rig
        self.random = random.Random(seed)
        self.down: set[str] = set()

    def agent(self, name: str) -> FakeAgent:
        return self.rig.helper if name == "helper" else self.rig.guests[name]

    async def request(self) -> None:
        fabric, pick = self.rig.fabric, self.random
        network, guest = pick.choice(NETWORKS), pick.choice(GUESTS)
        kind = pick.choices(("create", "delete", "connect", "disconnect", "give up"), (3, 1, 6, 3, 2))[0]
        # A refusal is as good an answer as any: the database says what is wanted.
        with contextlib.suppress(BridgeError):
            match kind:
                case "create":
                    await fabric.create_network(network, NetworkOptions(enable_ipv6=pick.random() < 0.5))
                case "delete":
                    await fabric.delete_network(network)
                case "connect":
                    await fabric.connect(network, guest)
                case "disconnect":
                    await fabric.disconnect(network, guest)
                case "give up":
                    with trio.move_on_after(pick.uniform(0, 0.02)):
                        await fabric.connect(network, guest)

    async def failure(self) -> None:
        name = self.random.choice(("helper", *GUESTS))
        agent = self.agent(name)
        match self.random.choice(("kill", "kill", "break", "fail", "hang")):
            case "kill" if name in self.down:
                await self.rig.nursery.start(agent.run)
                self.down.discard(name)
            case "kill":
                await agent.stop()
                if self.random.random() < 0.5:
                    self.forget(agent)
                self.down.add(name)
            case "break" if agent.links:
                agent.break_link(self.random.choice(sorted(agent.links)))
            case "fail":
                method = self.random.choice(METHODS)
                if agent.fail.pop(method, None) is None:
                    code = self.random.choice((StatusCode.UNAVAILABLE, StatusCode.INTERNAL))
                    agent.fail[method] = RpcError(code, "chaos")

            case "hang":
                agent.hang ^= {self.random.choice(METHODS)}

    def forget(self, agent: FakeAgent) -> None:
        for name in ("interfaces", "networks", "endpoints"):
            if hasattr(agent, name):
                getattr(agent, name).clear()

    async def heal(self) -> None:
        for name in ("helper", *GUESTS):
            self.agent(name).fail.clear()
            self.agent(name).hang.clear()
            if name in self.down:
                await self.rig.nursery.start(self.agent(name).run)
        self.down.clear()

    def converged(self) -> bool:
        rig = self.rig
        endpoints = rig.store.endpoints()
        wanted = {endpoint.id for endpoint in endpoints}
        return (
            all(endpoint.active for endpoint in endpoints)
            and {network.id for network in rig.store.networks() if network.switched} == set(rig.helper.networks)
            and wanted == set(rig.helper.endpoints) == set(rig.fabric.links) == set(rig.helper.links)
            and all(link.up for link in rig.fabric.links.values())
            and all(
                set(agent.interfaces)
                == set(agent.links)
                == {endpoint.id for endpoint in rig.store.endpoints(guest_id=rig.peer(name).record.id)}
                for name, agent in rig.guests.items()
            )
        )


@pytest.mark.parametrize("seed", range(6))
async def test_everything_converges(tmp_path: Path, seed: int) -> None:
    timing = Timing(deadline=0.4, grace=0.1, settle=0.1, call=0.3)
    async with open_rig(tmp_path, timing=timing) as rig:
        for name in GUESTS:
            await rig.guest(name)
        chaos = Chaos(rig, seed)
        async with trio.open_nursery() as requests:
            for _ in range(STEPS):
                requests.start_soon(chaos.request)
                if chaos.random.random() < 0.4:
                    await chaos.failure()
                await trio.sleep(chaos.random.uniform(0, 0.02))
        await chaos.heal()
        try:
            await rig.until(chaos.converged)
        except trio.TooSlowError:
            status = (await rig.status_api.get_status(_request())).status
            assert status is not None
            pytest.fail(f"not converged: {[(p.subject, p.reason) for p in status.pending]}")
        assert not rig.store._all("PRAGMA foreign_key_check")
        interfaces = [one for agent in rig.guests.values() for one in agent.interfaces.values()]
        places = [(one.network_name, address) for one in interfaces for address in one.addresses]
        assert len(set(places)) == len(places)


def _request():  # type: ignore[no-untyped-def]
    from taploom.contracts.taploom.bridge.v1 import GetStatusRequest

    return GetStatusRequest()

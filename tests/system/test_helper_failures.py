"""kill -9 of each daemon and of the agent, and lost databases: everything comes back by itself."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import trio
from test_helper_rig import Guest, Rig, endpoint, eventually, helper, network, rpc_status, sh

from agent_helper.port_flows import PortFlows
from agent_helper.spares import SpareTaps
from taploom.contracts.taploom.helper.v1 import (
    ApplyEndpointRequest,
    DaemonState,
    ListEndpointsRequest,
    SyncRequest,
    WatchEventsRequest,
    WatchEventsResponse,
)

pytestmark = pytest.mark.system

OUTAGES: dict[str, float] = {}


class Pinger:
    """A ping every 10 ms from one guest to another, and the longest time without an answer."""

    def __init__(self, guest: Guest, address: str, log: Path) -> None:
        self._log = log
        with log.open("wb") as output:
            argv = ["ip", "netns", "exec", guest.netns, "ping", "-n", "-D", "-i0.01", address]
            self._process = subprocess.Popen(argv, stdout=output, stderr=output)

    def answers(self) -> list[float]:
        return [float(at) for at in re.findall(r"^\[([\d.]+)\] \d+ bytes from", self._log.read_text(), re.MULTILINE)]

    async def answered_after(self, moment: float, count: int = 20) -> None:
        await eventually(lambda: sum(at > moment for at in self.answers()) >= count)

    def longest_gap(self) -> float:
        answers = self.answers()
        return max(later - earlier for earlier, later in itertools.pairwise(answers))

    def lost(self) -> int:
        """How many of them were not answered, of all before the last that was: later ones may be on their way yet."""
        answered = {int(number) for number in re.findall(r"icmp_seq=(\d+) ttl", self._log.read_text())}
        return max(answered) - len(answered)

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait()


def interfaces(rig: Rig) -> set[str]:
    return {line.split(": ")[1].partition("@")[0] for line in sh("ip", "-n", rig.netns, "-o", "link").splitlines()}


async def two_guests(rig: Rig) -> tuple[Guest, Guest]:
    await rig.apply(network(1, ipv6=True))
    a = await rig.guest(endpoint(1, 2, "web", ipv6=True), dns="169.254.64.1")
    b = await rig.guest(endpoint(1, 3, "db", ipv6=True))
    assert a.ping("10.77.1.3")
    return a, b


async def recovered(rig: Rig, a: Guest) -> None:
    """The agent is ready, and hot connect and names work."""

    async def is_ready() -> bool:
        return all(daemon.state == DaemonState.RUNNING for daemon in (await rig.daemons()).values())

    with trio.fail_after(60):
        while not await is_ready():
            await trio.sleep(0.02)
    (status,) = await rig.apply(endpoint(1, 9, "late"))
    assert status.port_up
    late = await rig.guest(endpoint(1, 9, "late"))
    try:
        await eventually(lambda: late.ping("10.77.1.2", wait=1))
        assert a.dig("169.254.64.1", "+short", "late.net1") == "10.77.1.9"
    finally:
        await rig.delete_endpoint("e1-9")
        await rig.drop(late)


@pytest.mark.parametrize("name", ["ovsdb-server", "ovs-vswitchd", "ovn-northd", "ovn-controller", "dnsmasq/n1"])
async def test_a_killed_daemon_comes_back(name: str) -> None:
    async with helper() as rig:
        a, _ = await two_guests(rig)
        before = await rig.daemons()
        pinger = Pinger(a, "10.77.1.3", rig.folder / "ping")
        try:
            await pinger.answered_after(0, count=150)
            events: list[WatchEventsResponse] = []
            async with trio.open_nursery() as nursery, rig.client.watch_events(WatchEventsRequest()) as stream:

                async def watch() -> None:
                    async for event in stream:
                        events.append(event)

                nursery.start_soon(watch)
                await eventually(lambda: events)
                os.kill(before[name].pid, signal.SIGKILL)
                killed = time.time()

                def states() -> list[DaemonState]:
                    changes = [event.daemon_changed for event in events if event.daemon_changed is not None]
                    return [c.state for c in changes if c.name == name.partition("/")[0]]

                wanted = [DaemonState.DOWN, DaemonState.STARTING, DaemonState.RUNNING]
                await eventually(lambda: states() == wanted)
                nursery.cancel_scope.cancel()
            await pinger.answered_after(killed)
            await recovered(rig, a)
        finally:
            pinger.stop()
        OUTAGES[name] = pinger.longest_gap()
        print(f"kill -9 {name}: longest gap {OUTAGES[name] * 1000:.0f} ms")
        after = await rig.daemons()
        assert after[name].pid != before[name].pid
        assert after[name].restarts == before[name].restarts + 1
        assert "SIGKILL" in after[name].last_exit
        untouched = set(before) - {name, "ovn-controller"}
        assert all(after[other].pid == before[other].pid for other in untouched)
        # The links have not noticed.
        statuses = (await rig.client.list_endpoints(ListEndpointsRequest())).endpoints
        assert all(status.link_up and status.port_up and not status.last_close_reason for status in statuses)


@pytest.mark.parametrize("damage", ["lost", "garbage"])
@pytest.mark.parametrize("name", ["conf", "nb", "sb"])
async def test_a_lost_database_is_made_anew_and_filled(name: str, damage: str) -> None:
    async with helper() as rig:
        a, _ = await two_guests(rig)
        ports = await rig.counted()
        file = rig.state / "run" / f"{name}.db"
        if damage == "lost":
            file.unlink()
        else:
            file.write_text("this is no database\n")
        pinger = Pinger(a, "10.77.1.3", rig.folder / "ping")
        try:
            await pinger.answered_after(0)
            os.kill((await rig.daemons())["ovsdb-server"].pid, signal.SIGKILL)
            killed = time.time()
            await pinger.answered_after(killed, count=100)
            await recovered(rig, a)
        finally:
            pinger.stop()
        print(f"{name}.db {damage}: longest gap {pinger.longest_gap() * 1000:.0f} ms")
        # Several kinds of rows come back one after the other.
        counts: dict[str, int] = {}

        def same() -> bool:
            counts.update(rig.count())
            keys = [key for key in ports if key[0].isupper()]
            return {key: counts[key] for key in keys} == {key: ports[key] for key in keys}

        await eventually(same)


async def test_what_a_silent_database_does_too_late_is_undone() -> None:
    async with helper() as rig:
        a, _ = await two_guests(rig)
        before = await rig.counted()
        pid = (await rig.daemons())["ovsdb-server"].pid
        os.kill(pid, signal.SIGSTOP)
        try:
            request = ApplyEndpointRequest(endpoint=endpoint(1, 5, "five"))
            assert await rpc_status(lambda: rig.client.apply_endpoint(request, timeout=60)) == "UNAVAILABLE"
        finally:
            os.kill(pid, signal.SIGCONT)
        await recovered(rig, a)
        after: dict[str, int] = {}

        def same() -> bool:
            after.update(rig.count())
            return after == before

        try:
            await eventually(same)
        except trio.TooSlowError:
            assert after == before


async def test_networks_may_have_the_same_subnet() -> None:
    async with helper() as rig:
        twin = replace(network(1), network_id="n2", name="net2")
        await rig.apply(network(1), twin, replace(network(3), mtu=65535), replace(network(4), mtu=68))
        a = await rig.guest(endpoint(1, 2, "web"), dns="169.254.64.1")
        b = await rig.guest(endpoint(1, 3, "db"))
        c = await rig.guest(replace(endpoint(1, 2, "other"), network_id="n2", endpoint_id="c"), dns="169.254.64.1")
        assert a.ping("10.77.1.3")
        assert b.ping("10.77.1.2")
        assert not c.ping("10.77.1.3", wait=1)
        assert c.ping("10.77.1.1")
        assert a.dig("169.254.64.1", "+short", "web") == "10.77.1.2"
        assert "REFUSED" in a.dig("169.254.64.1", "other")
        assert c.dig("169.254.64.1", "+short", "other") == "10.77.1.2"
        statuses = await rig.apply(endpoint(3, 2), endpoint(4, 2))
        assert all(status.port_up for status in statuses)


async def test_killing_the_agent_leaves_nothing_and_sync_fills_the_next() -> None:
    async with helper() as rig:
        a, b = await two_guests(rig)
        daemons = await rig.daemons()
        first = rig.process
        assert first is not None
        await rig.stop(signal.SIGKILL)

        def gone(pid: int) -> bool:
            try:
                return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
            except (FileNotFoundError, ProcessLookupError):
                return True

        await eventually(lambda: all(gone(daemon.pid) for daemon in daemons.values()))
        # vswitchd's own interfaces are made to stay; the next run clears them away.
        await eventually(lambda: len(interfaces(rig) - {"lo", "br-int", "ovs-netdev"}) <= SpareTaps.COUNT)
        await rig.start()
        assert not (await rig.client.list_endpoints(ListEndpointsRequest())).endpoints
        wanted = [endpoint(1, 2, "web", ipv6=True), endpoint(1, 3, "db", ipv6=True)]
        response = await rig.client.sync(SyncRequest(networks=[network(1, ipv6=True)], endpoints=wanted))
        assert not response.failures
        assert [status.port_up for status in response.endpoints] == [True, True]
        await rig.link(a, "e1-2")
        await rig.link(b, "e1-3")
        assert a.ping("10.77.1.3")
        assert a.dig("169.254.64.1", "+short", "db") == "10.77.1.3"


async def test_the_agent_ends_cleanly_and_starts_in_the_same_place() -> None:
    async with helper() as rig:
        await two_guests(rig)
        process = rig.process
        assert process is not None
        await rig.stop()
        assert process.returncode == 0, rig.log()
        assert interfaces(rig) == {"lo"}
        assert "Traceback" not in rig.log()
        await rig.start()


async def test_flows_of_ports_are_told() -> None:
    async with helper() as rig, trio.open_nursery() as nursery:
        mgmt = rig.state / "run" / "br-int.mgmt"
        flows = PortFlows(mgmt)
        nursery.start_soon(flows.run)
        await rig.apply(network(1))
        (status,) = await rig.apply(endpoint(1, 2, "web"))
        assert status.port_up
        port = int(rig.db("conf", "get", "Interface", status.tap, "ofport"))
        # Nobody is told that a port is there before vswitchd has all of its flows.
        rows = sh("ovs-ofctl", "dump-flows", f"unix:{mgmt}", f"table=0,in_port={port}")
        assert f"in_port={port}" in rows
        with trio.fail_after(60):
            await flows.wait(port)
            before = (await rig.daemons())["ovs-vswitchd"].pid
            os.kill(before, signal.SIGKILL)
            await eventually(lambda: not flows.has(port))
            await flows.wait(port)
            await rig.delete_endpoint("e1-2")
            await eventually(lambda: not flows.has(port))
        nursery.cancel_scope.cancel()

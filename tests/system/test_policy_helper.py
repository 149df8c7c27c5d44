"""Rules at the helper: what passes on the wire, what ends when rules change, counters, log lines, and OVN's rows."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from typing import Any

import pytest
import trio
from test_helper_rig import Guest, Rig, endpoint, eventually, helper, in_netns, network, rpc_status, sh

from taploom.contracts.taploom.helper.v1 import (
    ApplyPolicyRequest,
    Endpoint,
    EndpointPolicy,
    GetInfoRequest,
    HelperFeature,
    ListPolicyCountersRequest,
    Policy,
    PolicyAction,
    PolicyDirection,
    PolicyGroup,
    PolicyLogged,
    PolicyPeer,
    PolicyProtocol,
    PolicyRule,
    PortRange,
    SyncRequest,
    WatchEventsRequest,
)

pytestmark = pytest.mark.system

TCP_SERVER = """
import socket, sys
family = socket.AF_INET6 if ':' in sys.argv[1] else socket.AF_INET
server = socket.create_server((sys.argv[1], int(sys.argv[2])), family=family)
print('listening', flush=True)
while True:
    connection, _ = server.accept()
    if sys.argv[3] == 'echo':
        while data := connection.recv(65536):
            connection.sendall(data)
"""


def rule(rule_id: str, *, incoming: bool = True, **fields: Any) -> PolicyRule:
    values: dict[str, Any] = {
        "rule_id": rule_id,
        "name": f"rule {rule_id}",
        "direction": PolicyDirection.IN if incoming else PolicyDirection.OUT,
        "action": PolicyAction.ALLOW,
        "priority": 100,
    }
    return PolicyRule(**(values | fields))


def tcp(*ports: int) -> dict[str, Any]:
    return {"protocol": PolicyProtocol.TCP, "ports": [PortRange(first=port, last=port) for port in ports]}


def of_group(group_id: str) -> dict[str, Any]:
    return {"peers": [PolicyPeer(group_id=group_id)]}


def groups(**rules: list[PolicyRule]) -> Policy:
    return Policy(groups=[PolicyGroup(group_id=name, rules=found) for name, found in rules.items()])


def member(*group_ids: str, deny_in: bool = False, deny_out: bool = False) -> EndpointPolicy:
    return EndpointPolicy(group_ids=list(group_ids), deny_in=deny_in, deny_out=deny_out)


async def apply(rig: Rig, policy: Policy, **members: EndpointPolicy) -> None:
    endpoints = {name.replace("_", "-"): value for name, value in members.items()}
    await rig.client.apply_policy(ApplyPolicyRequest(policy=policy, endpoints=endpoints), timeout=20)


def rows(rig: Rig) -> list[str]:
    """The northbound database without what differs from transaction to transaction."""
    dump = sh("ovsdb-client", "dump", "--format=json", f"unix:{rig.state}/run/db.sock", "OVN_Northbound")
    found = []
    for table in map(json.loads, filter(None, dump.splitlines())):
        hidden = {"nb_cfg", "sb_cfg", "hv_cfg", "nb_cfg_timestamp", "sb_cfg_timestamp", "hv_cfg_timestamp"}
        shown = [n for n, heading in enumerate(table["headings"]) if heading not in hidden]
        found += sorted(json.dumps([table["caption"], *(row[n] for n in shown)]) for row in table["data"])
    return found


class Stream:
    """A TCP connection between two guests that a test pushes bytes through."""

    def __init__(self, server: Guest, address: str, client: Guest, port: int) -> None:
        command = ("ip", "netns", "exec", server.netns, sys.executable, "-c", TCP_SERVER, address, str(port), "echo")
        self._server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "listening\n"
        self._client, self._target = client, (address, port)
        self.sock: Any = None

    async def connect(self, within: float = 3.0) -> bool:
        family = socket.AF_INET6 if ":" in self._target[0] else socket.AF_INET
        self.sock = await trio.to_thread.run_sync(
            in_netns, self._client.netns, lambda: socket.socket(family, socket.SOCK_STREAM)
        )
        self.sock = trio.socket.from_stdlib_socket(self.sock)
        with trio.move_on_after(within):
            try:
                await self.sock.connect(self._target)
            except OSError:
                return False
            return True
        return False

    async def echoes(self, within: float = 3.0) -> bool:
        with trio.move_on_after(within):
            await self.sock.send(b"x" * 100)
            return bool(await self.sock.recv(65536))
        return False

    async def is_cut(self) -> bool:
        """True when it is dead: what was under way may still arrive."""
        for _ in range(20):
            if not await self.echoes(1.0):
                return True
            await trio.sleep(0.05)
        return False

    def close(self) -> None:
        if self.sock is not None:
            self.sock.close()
        self._server.kill()
        self._server.wait()


async def test_rules_on_the_wire() -> None:
    async with helper() as rig:
        info = await rig.client.get_info(GetInfoRequest())
        assert HelperFeature.POLICY in info.features
        await rig.apply(network(1, ipv6=True))
        web = await rig.guest(endpoint(1, 2, "web", ipv6=True), dns="169.254.64.1")
        db = await rig.guest(endpoint(1, 3, "db", ipv6=True), dns="169.254.64.1")
        other = await rig.guest(endpoint(1, 4, "other", ipv6=True))
        before = rows(rig)
        assert web.ping("10.77.1.3")
        assert web.ping("fd00:77:1::3")

        policy = groups(web=[], db=[rule("r1", **tcp(5432), **of_group("web"))])
        await apply(rig, policy, e1_2=member("web"), e1_3=member("db", deny_in=True))
        streams = [Stream(db, "10.77.1.3", web, 5432), Stream(db, "fd00:77:1::3", web, 5432)]
        refused = [Stream(db, "10.77.1.3", web, 5433), Stream(db, "10.77.1.3", other, 5434)]
        try:
            for one in streams:
                assert await one.connect()
                assert await one.echoes()
            for one in refused:
                assert not await one.connect(0.5)
            assert not web.ping("10.77.1.3", wait=1)
            assert not web.ping("fd00:77:1::3", wait=1)
            # Out of the database all goes, its names and its gateway's answers too.
            assert db.ping("10.77.1.2")
            assert db.ping("10.77.1.1")
            assert db.dig("169.254.64.1", "+short", "web.net1", "A") == "10.77.1.2"
            # A rule that stays keeps its connections, whatever else changes.
            await apply(rig, groups(web=[], db=[*policy.groups[1].rules, rule("r2", **tcp(5433))]))
            for one in streams:
                assert await one.echoes()
            assert await refused[0].connect()
            assert await refused[0].echoes()
            # And one that goes takes them away.
            await apply(rig, policy)
            assert await refused[0].is_cut()
            for one in streams:
                assert await one.echoes()
            await apply(rig, groups(web=[], db=[]))
            for one in streams:
                assert await one.is_cut()
        finally:
            for one in streams + refused:
                one.close()

        await apply(rig, Policy(), e1_2=member(), e1_3=member())
        assert rows(rig) == before
        assert web.ping("10.77.1.3")


async def test_out_and_its_connections() -> None:
    async with helper() as rig:
        await rig.apply(network(1, ipv6=True))
        web = await rig.guest(endpoint(1, 2, "web", ipv6=True), dns="169.254.64.1")
        db = await rig.guest(endpoint(1, 3, "db", ipv6=True))
        await apply(rig, Policy(), e1_2=member(deny_out=True))
        assert not web.ping("10.77.1.3", wait=1)
        assert web.ping("10.77.1.1")
        assert web.ping("fd00:77:1::1")
        assert web.dig("169.254.64.1", "+short", "db.net1", "A") == "10.77.1.3"
        assert web.dig("169.254.64.1", "+short", "+tcp", "db.net1", "A") == "10.77.1.3"
        assert db.ping("10.77.1.2"), "its answers go out"
        to_db = rule("r1", incoming=False, peers=[PolicyPeer(cidr="10.77.1.3/32")], **tcp(80))
        stream = Stream(db, "10.77.1.3", web, 80)
        try:
            assert not await stream.connect(0.5)
            await apply(rig, groups(web=[to_db]), e1_2=member("web", deny_out=True))
            assert await stream.connect()
            assert await stream.echoes()
            await apply(rig, groups(web=[]), e1_2=member("web", deny_out=True))
            assert await stream.is_cut()
        finally:
            stream.close()


async def test_counters_and_log() -> None:
    async with helper() as rig:
        await rig.apply(network(1))
        web = await rig.guest(endpoint(1, 2, "web"))
        db = await rig.guest(endpoint(1, 3, "db"))
        logged: list[PolicyLogged] = []

        following = trio.CancelScope()

        async def follow(task_status: trio.TaskStatus[None]) -> None:
            with following:
                await followed(task_status)

        async def followed(task_status: trio.TaskStatus[None]) -> None:
            async with rig.client.watch_events(WatchEventsRequest()) as stream:
                async for event in stream:
                    if event.started is not None:
                        task_status.started()
                    if event.policy_logged is not None:
                        logged.append(event.policy_logged)

        await rig.nursery.start(follow)
        icmp = rule("icmp", protocol=PolicyProtocol.ICMP, log=True)
        rest = rule("rest", action=PolicyAction.REJECT, priority=0, log=True)
        await apply(rig, groups(db=[icmp, rest]), e1_3=member("db", deny_in=True))
        assert web.ping("10.77.1.3", count=4)
        stream = Stream(db, "10.77.1.3", web, 81)
        try:
            began = trio.current_time()
            assert not await stream.connect()
            assert trio.current_time() - began < 1, "it was reset"
        finally:
            stream.close()
        counted: dict[str, tuple[int, int]] = {}

        async def enough() -> None:
            with trio.fail_after(10):
                while counted.get("icmp", (0, 0))[0] < 4 or not counted["rest"][0]:
                    response = await rig.client.list_policy_counters(ListPolicyCountersRequest())
                    counted.update({c.rule_id: (c.packets, c.bytes) for c in response.counters})
                    await trio.sleep(0.1)

        await enough()
        assert counted["icmp"][0] == 4
        assert counted["icmp"][1] >= 4 * 84
        await eventually(lambda: {one.rule_name for one in logged} == {"rule icmp", "rule rest"})
        following.cancel()
        line = next(one for one in logged if one.rule_name == "rule rest")
        assert (line.action, line.direction, line.protocol) == (PolicyAction.REJECT, PolicyDirection.IN, "tcp")
        assert (line.source, line.destination, line.destination_port) == ("10.77.1.2", "10.77.1.3", 81)


async def test_sync_and_refusals() -> None:
    async with helper() as rig:
        await rig.apply(network(1))
        a = await rig.guest(endpoint(1, 2))
        await rig.guest(endpoint(1, 3))
        before = rows(rig)
        policy = groups(x=[rule("r1", **of_group("x"), log=True)])

        def described(host: int, policy: EndpointPolicy | None) -> Endpoint:
            return endpoint(1, host, policy=policy)

        both = [described(2, member("x")), described(3, member("x", deny_in=True, deny_out=True))]
        request = SyncRequest(networks=[network(1)], endpoints=both, policy=policy)
        response = await rig.client.sync(request)
        assert not response.failures
        assert a.ping("10.77.1.3")
        enforced = rows(rig)
        assert any("tl_deny_in" in row for row in enforced)
        # The same again changes no row.
        assert not (await rig.client.sync(request)).failures
        assert rows(rig) == enforced
        both[0] = described(2, None)
        await rig.client.sync(SyncRequest(networks=[network(1)], endpoints=both, policy=policy))
        assert not a.ping("10.77.1.3", wait=1)
        # A new endpoint has its groups from its first moment.
        await rig.client.sync(SyncRequest(networks=[network(1)], endpoints=both[1:], policy=policy))
        await rig.apply(described(2, member("x")))
        assert not await _ids(rig, "tl_deny_out", 2)
        await rig.delete_endpoint("e1-3")
        assert not any("tl_deny" in row for row in rows(rig))
        plain = [described(2, None), described(3, None)]
        await rig.client.sync(SyncRequest(networks=[network(1)], endpoints=plain))
        assert [row for row in rows(rig) if "Logical" not in row] == [row for row in before if "Logical" not in row]

        async def refused(policy: Policy) -> str:
            return await rpc_status(lambda: rig.client.apply_policy(ApplyPolicyRequest(policy=policy)))  # type: ignore[return-value]

        wrong = [
            groups(x=[rule("r1", **of_group("nobody"))]),
            groups(x=[rule("r1"), rule("r1")]),
            groups(x=[rule("r1", priority=1001)]),
            groups(x=[rule("r1", name='"')]),
            groups(x=[rule("r1", ports=[PortRange(first=1, last=1)])]),
            groups(x=[rule("r1", protocol=PolicyProtocol.TCP, ports=[PortRange(first=2, last=1)])]),
            groups(x=[rule("r1", peers=[PolicyPeer(cidr="10.0.0.1/8")])]),
            groups(x=[rule("r1", peers=[PolicyPeer()])]),
            groups(**{"a-b": []}),
        ]
        for one in wrong:
            assert await refused(one) == "INVALID_ARGUMENT"


async def _ids(rig: Rig, group: str, host: int) -> bool:
    ports = rig.db("nb", "--bare", "--columns=ports", "find", "Port_Group", f"name={group}").split()
    names = [rig.db("nb", "get", "Logical_Switch_Port", port, "name").strip() for port in ports]
    return f"ep-e1-{host}" in " ".join(names)

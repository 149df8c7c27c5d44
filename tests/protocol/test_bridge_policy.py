"""Policies between the bridge and the helper: one call per change, whole, kept, told plainly when impossible."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
from bridge_support import Rig, open_rig, unchanged
from test_bridge_fabric import connect, create, disconnect, refused, status

from host_bridge.policy.document import read
from host_bridge.policy.messages import default_message, to_message
from taploom.contracts.taploom.bridge import v1 as bridge
from taploom.contracts.taploom.helper import v1 as helper
from taploom.rpc import RpcError, StatusCode

POLICY = """
networks: {app: deny-out}
groups:
  web:
    members: [{guest: web}]
  db:
    members: [{alias: postgres}]
    in:
      - {name: from-web, from: {group: web}, protocol: tcp, ports: 5432, log: true}
      - {name: from-some, from: [{label: a=b}, host, {cidr: 10.0.0.0/8}], priority: 3, action: reject}
"""


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    async with open_rig(tmp_path) as rig:
        yield rig


async def apply(rig: Rig, text: str = POLICY, *, prune: bool = False) -> bridge.ApplyPolicyResponse:
    found = read(text)
    request = bridge.ApplyPolicyRequest(
        source="p.yaml",
        groups=[to_message(group) for group in found.groups],
        networks=[default_message(one) for one in found.networks],
        prune=prune,
    )
    return await rig.policies.apply_policy(request)


def rules(rig: Rig) -> dict[str, helper.PolicyRule]:
    return {rule.name: rule for group in rig.helper.policy.groups for rule in group.rules}


async def test_a_change_is_one_call(rig: Rig) -> None:
    await create(rig)
    for name in ("web", "db", "other"):
        await rig.guest(name)
    web = await connect(rig, "app", "web")
    db = await connect(rig, "app", "db", aliases=["postgres"])
    other = await connect(rig, "app", "other")
    assert all(one.policy is None for one in rig.helper.endpoints.values())
    rig.helper.calls.clear()
    done = await apply(rig)
    assert (done.created, done.pending) == (["db", "web"], "")
    assert rig.helper.calls == ["ApplyPolicy"]
    policies = {one.id: rig.helper.endpoints[one.id].policy for one in (web, db, other)}
    found = [(p.deny_in, p.deny_out, len(p.group_ids)) for p in policies.values() if p is not None]
    assert found == [(False, True, 1), (True, True, 1), (False, True, 0)]
    from_web, some = rules(rig)["db/in/from-web"], rules(rig)["db/in/from-some"]
    assert [peer.group_id for peer in from_web.peers] == policies[web.id].group_ids  # type: ignore[union-attr]
    assert (from_web.log, from_web.priority, from_web.action) == (True, 100, helper.PolicyAction.ALLOW)
    assert [(peer.host, peer.cidr) for peer in some.peers] == [(None, None), (True, None), (None, "10.0.0.0/8")]
    # The same again is nothing new; who comes later brings along what it means to him.
    done = await apply(rig)
    assert done.unchanged == ["db", "web"]
    assert "ApplyEndpoint" not in rig.helper.calls
    await disconnect(rig, "app", "other")
    again = await connect(rig, "app", "other", aliases=["postgres"])
    member = rig.helper.endpoints[again.id].policy
    assert member is not None
    assert (member.deny_in, member.deny_out) == (True, True)
    await rig.until(lambda: rig.fabric.helper.has("policy"))
    listed = await rig.policies.list_policy(bridge.ListPolicyRequest())
    assert [(g.name, g.incoming_rules, g.outgoing_rules, g.members) for g in listed.groups] == [
        ("db", 2, None, ["db@app", "other@app"]),
        ("web", None, None, ["web@app"]),
    ]
    assert [(n.network, n.default) for n in listed.networks] == [("app", bridge.PolicyDefault.DENY_OUT)]


async def test_refusals_are_whole(rig: Rig) -> None:
    await create(rig)
    await apply(rig)
    rig.helper.calls.clear()
    with unchanged(rig):
        with refused(StatusCode.INVALID_ARGUMENT, "p.yaml:4: group new names group 'nosuch'"):
            await apply(rig, "groups:\n  new:\n    members:\n      - group: nosuch\n")
        with refused(StatusCode.INVALID_ARGUMENT, "p.yaml:2: network 'nosuch' not found"):
            await apply(rig, "networks:\n  nosuch: deny\ngroups: {new: {}}\n")
        with refused(StatusCode.FAILED_PRECONDITION, "group db names group web"):
            await rig.policies.remove_policy_groups(bridge.RemovePolicyGroupsRequest(names=["web"]))
        with refused(StatusCode.NOT_FOUND, "'nosuch' not found"):
            await rig.policies.remove_policy_groups(bridge.RemovePolicyGroupsRequest(names=["db", "nosuch"]))
        with refused(StatusCode.NOT_FOUND, "'nosuch' not found"):
            await rig.policies.get_policy_group(bridge.GetPolicyGroupRequest(name="nosuch"))
        with refused(StatusCode.INVALID_ARGUMENT, "action 77 is not known"):
            strange = bridge.PolicyGroup(name="a", incoming=bridge.RuleList(rules=[bridge.Rule(action=77)]))  # type: ignore[arg-type]
            await rig.policies.apply_policy(bridge.ApplyPolicyRequest(groups=[strange]))
    assert rig.helper.calls == []


async def test_it_is_in_every_snapshot(rig: Rig) -> None:
    await create(rig)
    await rig.guest("web")
    endpoint = await connect(rig, "app", "web")
    await apply(rig)
    before = bytes(rig.helper.policy)
    await rig.helper.stop()
    rig.helper.policy, rig.helper.endpoints, rig.helper.networks = helper.Policy(), {}, {}
    done = await apply(rig, "groups: {more: {in: []}}")
    assert "helper" in done.pending
    await rig.nursery.start(rig.helper.run)
    await rig.until(lambda: rig.fabric.helper.has("policy"))
    assert len(bytes(rig.helper.policy)) > len(before)
    member = rig.helper.endpoints[endpoint.id].policy
    assert member is not None
    assert member.deny_out
    assert not (await rig.policies.list_policy(bridge.ListPolicyRequest())).pending
    removed = await rig.policies.remove_policy_groups(bridge.RemovePolicyGroupsRequest(names=["more", "db", "web"]))
    assert removed.pending == ""
    assert rig.helper.policy.groups == []


async def test_an_older_helper_is_told_apart(rig: Rig) -> None:
    await create(rig)
    await create(rig, "free")
    await rig.guest("web")
    endpoint = await connect(rig, "app", "web")
    await connect(rig, "free", "web")
    await apply(rig)
    await rig.helper.stop()
    features = list(rig.helper.features)
    rig.helper.features.remove(helper.HelperFeature.POLICY)
    rig.helper.version = "0.0.9"
    await rig.nursery.start(rig.helper.run)
    await rig.until(lambda: rig.fabric.helper.lacks(helper.HelperFeature.POLICY) and rig.link("web", "free").up)
    # Open it would be wrong, so it has no link.
    await rig.until(lambda: endpoint.id not in rig.helper.endpoints and not rig.link("web", "app").up)
    text = "the helper (version 0.0.9) is too old to enforce policies: update it"
    pending = (await status(rig)).pending
    assert {one.subject for one in pending if one.reason == text} == {"the policy", "endpoint web on app"}
    with unchanged(rig), refused(StatusCode.FAILED_PRECONDITION, text):
        await apply(rig, "groups: {more: {}}")
    assert (await rig.policies.list_policy(bridge.ListPolicyRequest())).pending == text
    await rig.helper.stop()
    rig.helper.features = features
    await rig.nursery.start(rig.helper.run)
    await rig.until(lambda: rig.link("web", "app").up)


async def test_counters_and_log(rig: Rig) -> None:
    await create(rig)
    await rig.guest("web")
    endpoint = await connect(rig, "app", "web")
    await apply(rig)
    rule = rules(rig)["db/in/from-web"]
    rig.helper.counters = {rule.rule_id: (3, 180)}
    shown = await rig.policies.get_policy_group(bridge.GetPolicyGroupRequest(name="db"))
    assert shown.counted
    assert [(one.packets, one.bytes) for one in shown.incoming] == [(3, 180), (0, 0)]
    rig.helper.fail["ListPolicyCounters"] = RpcError(StatusCode.UNAVAILABLE, "no")
    shown = await rig.policies.get_policy_group(bridge.GetPolicyGroupRequest(name="db"))
    assert not shown.counted
    assert shown.group is not None

    address = endpoint.addresses[0].partition("/")[0]
    logged = helper.PolicyLogged(
        rule_name="db/in/from-web",
        action=helper.PolicyAction.ALLOW,
        direction=helper.PolicyDirection.IN,
        protocol="tcp",
        source=address,
        destination="10.1.2.3",
        source_port=40000,
        destination_port=5432,
    )
    rig.helper.tell(helper.WatchEventsResponse(policy_logged=logged))
    hostile = helper.PolicyLogged(rule_name="gone\n\x1b[31m", protocol="tcp", source="x", destination="y")
    rig.helper.tell(helper.WatchEventsResponse(policy_logged=hostile))
    async with rig.policies.watch_policy_log(bridge.WatchPolicyLogRequest(follow=True)) as stream:
        lines = [await stream.__anext__(), await stream.__anext__()]
        assert (lines[0].group, lines[0].direction, lines[0].rule) == ("db", "in", "from-web")
        assert (lines[0].source_guest, lines[0].destination_guest) == ("web", "")
        assert lines[1].rule == "gone??[31m"
        with trio.move_on_after(0.05) as nothing:
            await stream.__anext__()
        assert nothing.cancelled_caught
    remembered = [line async for line in _all(rig)]
    assert [line.rule for line in remembered] == ["from-web", "gone??[31m"]


async def _all(rig: Rig) -> AsyncIterator[bridge.WatchPolicyLogResponse]:
    async with rig.policies.watch_policy_log(bridge.WatchPolicyLogRequest()) as stream:
        async for line in stream:
            yield line


async def test_a_call_that_is_under_way_is_not_the_last_word(rig: Rig) -> None:
    """An endpoint that is being applied while its policy changes gets the new one."""
    await create(rig)
    await rig.guest("web")
    rig.helper.hang.add("ApplyEndpoint")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connect, rig, "app", "web")
        await rig.until(lambda: "ApplyEndpoint" in rig.helper.calls)
        await apply(rig)
        # The first call is lost; the next says what is wanted now.
        rig.helper.hang.clear()
        await rig.helper.stop()
        await rig.nursery.start(rig.helper.run)
    (endpoint,) = rig.helper.endpoints.values()
    assert endpoint.policy is not None
    assert endpoint.policy.deny_out

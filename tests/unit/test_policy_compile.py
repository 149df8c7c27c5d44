"""What the helper is told means what the reference says: random policies, every pair, without packets."""

from __future__ import annotations

import ipaddress
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "system"))

from policy_model import PORTS, Place, allowed, random_policy

from agent_helper.policy import MemberSpec, PolicySpec, RuleSpec, parse_member, parse_policy
from agent_helper.policy_log import parse_line
from agent_helper.policy_rows import denial, denial_groups, match_of
from agent_helper.spec import parse_network
from host_bridge.desired import DesiredState
from host_bridge.errors import InvalidError, NotFoundError, PreconditionError
from host_bridge.model import ContainerRecord, EndpointOptions, EndpointRecord, NetworkOptions
from host_bridge.policy.document import read
from host_bridge.policy.model import Group, NetworkDefault, Rule
from host_bridge.selectors import Selector
from host_bridge.store import Store
from taploom.contracts.taploom.helper import v1 as helper

GUESTS = {"ann": ("red",), "bob": ("red", "blue"), "cat": ("red", "blue"), "dan": ("red",), "eve": ("blue",)}
ALIASES = {"bob": ("www", "shared"), "cat": ("db", "shared"), "dan": ("db",)}


@pytest.fixture
def desired(tmp_path: Path) -> Iterator[DesiredState]:
    with Store(tmp_path) as store:
        yield DesiredState(store)


def populate(desired: DesiredState) -> dict[Place, EndpointRecord]:
    found = {}
    for network in ("red", "blue"):
        record = desired.create_network(network, NetworkOptions(enable_ipv6=True))
        desired.activate_network(record.id)
    for guest, networks in GUESTS.items():
        desired.register_guest(guest, f"unix:/run/{guest}.control/control.sock")
        for network in networks:
            aliases = ALIASES.get(guest, ())
            endpoint = desired.connect(network, guest, EndpointOptions(aliases=aliases))
            found[Place(guest, network, aliases, endpoint.addresses)] = endpoint
    return found


def told(desired: DesiredState, endpoint: EndpointRecord) -> helper.EndpointPolicy | None:
    guest, network = desired.store.guest(endpoint.guest_id), desired.store.network(endpoint.network_id)
    assert guest is not None
    assert network is not None
    return desired.policies.endpoint_policy(endpoint, guest, network)


def passes(
    policy: PolicySpec,
    members: dict[Place, MemberSpec],
    own: Place,
    other: Place,
    incoming: bool,
    protocol: str,
    family: int,
    port: int,
) -> bool:
    """What the contract says of a rule (taploom.helper.v1), to the letter."""
    decisions = []
    for rule in policy.rules:
        if rule.group_id not in members[own].groups or rule.incoming is not incoming:
            continue
        kind = {"tcp": 1, "udp": 2, "icmp": 3 if family == 4 else 4}[protocol]
        if rule.protocol not in (0, kind) or (rule.ports and not any(a <= port <= b for a, b in rule.ports)):
            continue
        address = next(ipaddress.ip_address(a) for a in other.addresses if (":" in a) == (family == 6))
        anybody = not (rule.cidrs or rule.groups or rule.host)
        if anybody or any(address in c for c in rule.cidrs) or set(rule.groups) & set(members[other].groups):
            decisions.append((rule.priority, rule.action != helper.PolicyAction.ALLOW))
    if decisions:
        return not max(decisions)[1]
    return not (members[own].deny_in if incoming else members[own].deny_out)


def test_against_the_reference(desired: DesiredState) -> None:
    endpoints = populate(desired)
    places = list(endpoints)
    checked = positive = 0
    for seed in range(25):
        document = random_policy(random.Random(seed), places)
        file = read(json.dumps(document))
        desired.policies.apply("random", file.groups, file.networks, prune=True)
        policy = parse_policy(helper.Policy.parse(bytes(desired.policies.message)))
        members = {place: parse_member(told(desired, endpoint)) for place, endpoint in endpoints.items()}
        for source in places:
            for target in places:
                if source.guest == target.guest or source.network != target.network:
                    continue
                for family in (4, 6):
                    for protocol, port in [("icmp", 0), *((p, n) for p in ("tcp", "udp") for n in PORTS)]:
                        what = (protocol, family, port)
                        answer = passes(policy, members, source, target, False, *what) and passes(
                            policy, members, target, source, True, *what
                        )
                        assert answer is allowed(document, places, source, target, *what), (seed, source, target, what)
                        checked += 1
                        positive += answer
    assert checked > 6_000
    assert 0.1 < positive / checked < 0.9


def test_labels_and_what_follows_them(desired: DesiredState) -> None:
    populate(desired)
    labels = {"taploom.groups": "web, front ,nosuch", "tier": "one", "empty": ""}
    guest = next(guest for guest in desired.guests() if guest.name == "eve")
    config: dict[str, Any] = {"Config": {"Labels": labels}}
    desired.store.insert_container(ContainerRecord(guest.id, "eve", guest.created_at, config, {}))
    desired.policies.apply(
        "",
        [
            Group("web", incoming=()),
            Group("front", (Selector(group="web"),)),
            Group("everybody", (Selector(group="front"),), outgoing=()),
            Group("exact", (Selector(label="tier=one", network="blue"),)),
            Group("key", (Selector(label="empty"),)),
            Group("other", (Selector(label="tier=two"), Selector(label="tier=one", network="red"))),
        ],
        [],
    )
    found = {
        name: [desired.guest_name(e.guest_id) for e in members] for name, members in desired.policies.members().items()
    }
    eve = ["eve"]
    assert found == {
        "web": eve, "front": eve, "everybody": eve, "exact": eve, "key": eve, "other": [], "nosuch": eve
    }  # fmt: skip
    policy = told(desired, next(e for e in desired.store.endpoints() if e.guest_id == guest.id))
    assert policy is not None
    assert (policy.deny_in, policy.deny_out, len(policy.group_ids)) == (True, True, 5)


def test_changes_are_whole(desired: DesiredState) -> None:
    populate(desired)
    policies = desired.policies
    first = policies.apply("", [Group("a"), Group("b", (Selector(group="a"),))], [NetworkDefault("red", "deny")])
    assert (first.created, first.updated, first.unchanged, first.removed) == (("a", "b"), (), (), ())
    dump = desired.store.dump()
    for groups, defaults in (
        ([Group("c"), Group("d", (Selector(group="nosuch"),))], []),
        ([Group("c")], [NetworkDefault("nosuch", "deny")]),
        ([Group("a", (Selector(group="b"),))], []),
    ):
        with pytest.raises(InvalidError):
            policies.apply("", groups, defaults)
    with pytest.raises(PreconditionError, match="group b names group a"):
        policies.remove(["a"])
    with pytest.raises(NotFoundError, match="'taploom policy ls'"):
        policies.remove(["b", "nosuch"])
    assert desired.store.dump() == dump
    again = policies.apply("", [Group("a"), Group("b")], [])
    assert (again.created, again.updated, again.unchanged) == ((), ("b",), ("a",))
    red = desired.find_network("red")
    assert policies.default_of(red) == "deny"
    last = policies.apply("", [Group("b")], [], prune=True)
    assert last.removed == ("a",)
    assert policies.default_of(red) == "allow"
    policies.remove(["b"])
    assert not policies.groups


def test_what_is_the_same_keeps_its_ids(desired: DesiredState) -> None:
    policies = desired.policies
    policies.apply("", [Group("a", incoming=(Rule("x"), Rule("y")))], [])
    before = {rule.name: bytes(rule) for group in policies.message.groups for rule in group.rules}
    policies.apply("", [Group("a", incoming=(Rule("y"), Rule("z"))), Group("b", incoming=(Rule("x"),))], [])
    after = {rule.name: bytes(rule) for group in policies.message.groups for rule in group.rules}
    assert after["a/in/y"] == before["a/in/y"]
    assert after.keys() == {"a/in/y", "a/in/z", "b/in/x"}


def test_network_option(desired: DesiredState) -> None:
    record = desired.create_network("locked", NetworkOptions(options={"taploom.policy": "deny-out"}))
    desired.activate_network(record.id)
    network = desired.find_network("locked")
    assert desired.policies.default_of(network) == "deny-out"
    desired.policies.apply("", [], [NetworkDefault("locked", "allow")])
    assert desired.policies.default_of(network) == "allow"
    with pytest.raises(InvalidError, match="use allow, deny, deny-in or deny-out"):
        desired.create_network("odd", NetworkOptions(options={"taploom.policy": "yes"}))
    desired.delete_network("locked")
    assert not desired.store.policy_networks()


def test_policies_survive_a_restart(tmp_path: Path) -> None:
    with Store(tmp_path) as store:
        desired = DesiredState(store)
        desired.policies.apply("", [Group("a", (Selector(guest="web"),), incoming=(Rule("x", protocol="tcp"),))], [])
        message = bytes(desired.policies.message)
    with Store(tmp_path) as store:
        assert bytes(DesiredState(store).policies.message) == message


def spec(**fields: Any) -> RuleSpec:
    values: dict[str, Any] = {
        "rule_id": "r",
        "name": "r",
        "group_id": "g",
        "incoming": True,
        "action": helper.PolicyAction.ALLOW,
        "priority": 1,
        "protocol": helper.PolicyProtocol.UNSPECIFIED,
        "ports": (),
        "cidrs": (),
        "groups": (),
        "host": False,
        "log": False,
    }
    return RuleSpec(**(values | fields))


def test_matches() -> None:
    both = (ipaddress.ip_network("10.0.0.0/8"), ipaddress.ip_network("fd00::/8"))
    tcp = helper.PolicyProtocol.TCP
    assert match_of(spec()) == "outport == @tlg_g && ip"
    assert match_of(spec(incoming=False, protocol=helper.PolicyProtocol.ICMP)) == "inport == @tlg_g && icmp4"
    assert match_of(spec(protocol=tcp, ports=((80, 80), (90, 90)))) == "outport == @tlg_g && tcp && tcp.dst == {80, 90}"
    assert match_of(spec(protocol=tcp, ports=((80, 80), (90, 99)), cidrs=both[:1])) == (
        "outport == @tlg_g && tcp && (tcp.dst == {80} || (tcp.dst >= 90 && tcp.dst <= 99)) && ip4.src == {10.0.0.0/8}"
    )
    assert match_of(spec(cidrs=both, groups=("x",), host=True)) == (
        "outport == @tlg_g && ip && (ip4.src == {10.0.0.0/8, $tlg_x_ip4, $tl_gateways_4} || "
        "ip6.src == {fd00::/8, $tlg_x_ip6, $tl_gateways_6})"
    )
    assert match_of(spec(incoming=False, host=True)) == (
        "inport == @tlg_g && ip && (ip4.dst == {$tl_hosts_4} || ip6.dst == {$tl_hosts_6})"
    )


def test_denial() -> None:
    """What denies on a network speaks of that network only, in groups whose names are no other network's."""
    incoming, outgoing = denial_groups("a-1")
    names = {name for network_id in ("a-1", "a_1", "a.1", "a_.1", "a__1", "a--1") for name in denial_groups(network_id)}
    assert len(names) == 12
    network = helper.Network(
        network_id="a-1",
        name="a",
        subnets=["10.0.1.0/24", "fd00:1::/64"],
        gateways=["10.0.1.1", "fd00:1::1"],
        gateway_mac="02:00:00:00:00:01",
        dns_servers=["169.254.64.7"],
        dns_mac="02:00:00:00:00:02",
        mtu=1500,
    )
    spec = parse_network(network)
    coming = {str(acl["match"]): (acl["action"], acl["priority"]) for acl in denial(incoming, spec)}
    assert coming == {
        f"outport == @{incoming} && ip": ("drop", 2000),
        f"outport == @{incoming} && (ip4.src == {{10.0.1.1}} || ip6.src == {{fd00:1::1}})": ("allow-related", 3000),
    }
    going = [str(acl["match"]) for acl in denial(outgoing, spec) if acl["action"] == "allow-related"]
    assert f"inport == @{outgoing} && (udp.dst == 53 || tcp.dst == 53) && ip4.dst == {{169.254.64.7}}" in going
    assert all(match.startswith(f"inport == @{outgoing} && ") for match in going)
    bare = parse_network(
        replace(network, dns_servers=[], dns_mac="", gateway_mode_ipv4=helper.GatewayMode.ISOLATED, internal=True)
    )
    assert not any("53" in str(acl["match"]) or "10.0.1" in str(acl["match"]) for acl in denial(outgoing, bare))


def test_log_lines() -> None:
    line = (
        '<30>ovn-controller: ovs|00042|acl_log(ovn_pinctrl0)|INFO|name="db/in/rest", verdict=drop, severity=info, '
        "direction=to-lport: tcp,vlan_tci=0x0000,dl_src=02:42:ac:12:00:02,dl_dst=02:42:ac:12:00:04,nw_src=172.18.0.2,"
        "nw_dst=172.18.0.4,nw_tos=0,nw_ecn=0,nw_ttl=64,tp_src=40000,tp_dst=5432,tcp_flags=syn"
    )
    found = parse_line(line)
    assert found is not None
    assert (found.rule_name, found.protocol, found.source, found.destination_port) == (
        "db/in/rest", "tcp", "172.18.0.2", 5432
    )  # fmt: skip
    assert (found.action, found.direction) == (helper.PolicyAction.DROP, helper.PolicyDirection.IN)
    six = parse_line(
        'acl_log(x)|INFO|name="a/out/b", verdict=allow, severity=info, direction=from-lport: icmp6,vlan_tci=0x0000,'
        "ipv6_src=fd00::2,ipv6_dst=fd00::3,ipv6_label=0x0,nw_tos=0,icmp_type=128,icmp_code=0"
    )
    assert six is not None
    assert (six.protocol, six.source, six.source_port, six.direction) == (
        "icmp6", "fd00::2", 128, helper.PolicyDirection.OUT
    )  # fmt: skip
    assert parse_line("ovs|00001|reconnect|INFO|connected") is None

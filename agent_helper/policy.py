"""Descriptions of policies, checked: which rules there are, and what they mean to endpoints."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass

from agent_helper.errors import InvalidSpecError
from agent_helper.ids import check_id
from taploom.contracts.taploom.helper.v1 import (
    EndpointPolicy,
    Policy,
    PolicyAction,
    PolicyDirection,
    PolicyProtocol,
    PolicyRule,
)

IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

MAX_PRIORITY = 1000
# Port groups' names have this part of them (ovn-nb(5), Port_Group), so it has no hyphen.
_GROUP_ID = re.compile(r"[a-zA-Z0-9_.]{1,64}", re.ASCII)
# It stands in quotes in ovn-controller's log (ovn-nb(5), ACL's name).
_RULE_NAME = re.compile(r"[a-zA-Z0-9_.:/ -]{1,63}", re.ASCII)
_WITH_PORTS = (PolicyProtocol.TCP, PolicyProtocol.UDP)


@dataclass(frozen=True)
class MemberSpec:
    """What policies mean to one endpoint; without any, everything passes."""

    groups: tuple[str, ...] = ()
    deny_in: bool = False
    deny_out: bool = False


@dataclass(frozen=True)
class RuleSpec:
    """A rule of a group. Without `cidrs`, `groups` and `host` it is for every peer; `ports` are (first, last)."""

    rule_id: str
    name: str
    group_id: str
    incoming: bool
    action: PolicyAction
    priority: int
    protocol: PolicyProtocol
    ports: tuple[tuple[int, int], ...]
    cidrs: tuple[IPNetwork, ...]
    groups: tuple[str, ...]
    host: bool
    log: bool


@dataclass(frozen=True)
class PolicySpec:
    """All rules, and all groups that they are of or speak of."""

    groups: frozenset[str] = frozenset()
    rules: tuple[RuleSpec, ...] = ()


def parse_member(message: EndpointPolicy | None) -> MemberSpec:
    """Checks what policies are to mean to an endpoint.

    Raises:
        InvalidSpecError: a group's id is malformed.
    """
    if message is None:
        return MemberSpec()
    groups = tuple(sorted({_group("policy", group_id) for group_id in message.group_ids}))
    return MemberSpec(groups, message.deny_in, message.deny_out)


def parse_policy(message: Policy | None) -> PolicySpec:
    """Checks rules.

    Raises:
        InvalidSpecError: says which rule is wrong and what it must be.
    """
    if message is None:
        return PolicySpec()
    groups: set[str] = set()
    rules: dict[str, RuleSpec] = {}
    for group in message.groups:
        group_id = _group("group_id", group.group_id)
        if group_id in groups:
            raise InvalidSpecError(f"group {group_id} is described twice")
        groups.add(group_id)
        for rule in group.rules:
            spec = _rule(group_id, rule)
            if spec.rule_id in rules:
                raise InvalidSpecError(f"rule {spec.rule_id} is described twice")
            rules[spec.rule_id] = spec
    for spec in rules.values():
        for group_id in spec.groups:
            if group_id not in groups:
                raise InvalidSpecError(f"rule {spec.rule_id}: group {group_id} is not described; describe it too")
    return PolicySpec(frozenset(groups), tuple(rules.values()))


def _group(what: str, group_id: str) -> str:
    if not _GROUP_ID.fullmatch(group_id):
        raise InvalidSpecError(f"{what}: group {group_id[:80]!r} must be 1 to 64 characters of [a-zA-Z0-9_.]")
    return group_id


def _rule(group_id: str, rule: PolicyRule) -> RuleSpec:
    check_id("rule_id", rule.rule_id)

    def wrong(reason: str) -> InvalidSpecError:
        return InvalidSpecError(f"rule {rule.rule_id}: {reason}")

    if not _RULE_NAME.fullmatch(rule.name):
        raise wrong(f"name {rule.name[:80]!r} must be 1 to 63 characters of [a-zA-Z0-9_.:/ -]")
    if rule.direction not in (PolicyDirection.IN, PolicyDirection.OUT):
        raise wrong("direction must be IN or OUT")
    if rule.action not in (PolicyAction.ALLOW, PolicyAction.DROP, PolicyAction.REJECT):
        raise wrong("action must be ALLOW, DROP or REJECT")
    if rule.protocol not in tuple(PolicyProtocol):
        raise wrong("its protocol is not known; update the helper")
    if rule.priority > MAX_PRIORITY:
        raise wrong(f"priority {rule.priority} must be 0 to {MAX_PRIORITY}")
    if rule.ports and rule.protocol not in _WITH_PORTS:
        raise wrong("only TCP and UDP have ports")
    for ports in rule.ports:
        if not 1 <= ports.first <= ports.last <= 65535:
            raise wrong(f"ports {ports.first} to {ports.last} must be within 1 to 65535, the first not after the last")
    cidrs: list[IPNetwork] = []
    groups: list[str] = []
    host = False
    for peer in rule.peers:
        if peer.group_id is not None:
            groups.append(_group(f"rule {rule.rule_id}", peer.group_id))
        elif peer.cidr is not None:
            try:
                cidrs.append(ipaddress.ip_network(peer.cidr))
            except ValueError:
                raise wrong(f"peer {peer.cidr[:80]!r} is not a subnet in CIDR form without host bits") from None
        elif peer.host:
            host = True
        else:
            raise wrong("a peer must be a subnet, a group or the host")
    return RuleSpec(
        rule.rule_id,
        rule.name,
        group_id,
        rule.direction == PolicyDirection.IN,
        PolicyAction(rule.action),
        rule.priority,
        PolicyProtocol(rule.protocol),
        tuple(sorted((ports.first, ports.last) for ports in rule.ports)),
        tuple(cidrs),
        tuple(sorted(set(groups))),
        host,
        rule.log,
    )


def is_in_force(members: Iterable[MemberSpec]) -> bool:
    """Whether anything is denied to one of these."""
    return any(member.deny_in or member.deny_out for member in members)

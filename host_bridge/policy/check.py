"""What a policy must be: every check that does not depend on how its text was written.

The first thing that is wrong is an InvalidError whose message begins with the source and the line and says what to do.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Iterable, Mapping, Sequence

from host_bridge.names import shown
from host_bridge.policy.model import (
    ACTIONS,
    DEFAULTS,
    ICMP,
    ICMPV6,
    MAX_PRIORITY,
    PROTOCOLS,
    TCP,
    UDP,
    Group,
    NetworkDefault,
    Peer,
    Ports,
    Rule,
)
from host_bridge.selectors import check_selector
from host_bridge.sources import Source, check_name

MAX_GROUPS = 1000
MAX_RULES = 5000
# Of one rule, or members of one group.
MAX_ITEMS = 256
_FAMILY = {ICMP: 4, ICMPV6: 6}


def checked_groups(source: Source, groups: Iterable[Group]) -> dict[str, Group]:
    """The groups by name, with what is implied filled in: names of rules, CIDR form of addresses.

    Raises:
        InvalidError
    """
    found: dict[str, Group] = {}
    for group in groups:
        check_name(source, group.line, "group", group.name)
        if group.name in found:
            first = found[group.name].line
            where = f" (first at line {first})" if first else ""
            raise source.wrong(group.line, f"group {group.name} is given twice{where}: put both into one")
        _limit(source, group.line, f"group {group.name} has", "members", group.members)
        for member in group.members:
            check_selector(source, member)
        found[group.name] = dataclasses.replace(
            group,
            incoming=_checked_rules(source, group.incoming),
            outgoing=_checked_rules(source, group.outgoing),
        )
    if len(found) > MAX_GROUPS:
        raise source.wrong(0, f"{len(found)} groups are too many: use at most {MAX_GROUPS}")
    return found


def check_together(source: Source, groups: Mapping[str, Group]) -> None:
    """Checks what groups say of one another.

    Args:
        groups: all that there are to be.

    Raises:
        InvalidError: a group is named that is not there, groups are members of one another, or there is too much.
    """
    for group in groups.values():
        named = [member for member in group.members if member.group]
        for _, rule in group.all_rules():
            named += [peer.selector for peer in rule.peers if peer.selector is not None and peer.selector.group]
        for selector in named:
            if selector.group not in groups:
                known = ", ".join(sorted(groups)[:10]) or "none"
                raise source.wrong(
                    selector.line,
                    f"group {group.name} names group {shown(selector.group)}, which there is not: define it, or "
                    f"name one of those there are ({known})",
                )
    if len(groups) > MAX_GROUPS:
        raise source.wrong(0, f"{len(groups)} groups are too many: use at most {MAX_GROUPS}")
    rules = sum(1 for group in groups.values() for _ in group.all_rules())
    if rules > MAX_RULES:
        raise source.wrong(0, f"{rules} rules are too many: use at most {MAX_RULES}")
    _check_circles(source, groups)


def _check_circles(source: Source, groups: Mapping[str, Group]) -> None:
    done: set[str] = set()
    for start in groups:
        path: list[str] = []
        # An explicit stack: a chain may be as long as there are groups.
        todo: list[tuple[str, int, bool]] = [(start, 0, False)]
        while todo:
            name, line, leaving = todo.pop()
            if leaving:
                done.add(path.pop())
                continue
            if name in path:
                circle = " > ".join([*path[path.index(name) :], name])
                raise source.wrong(line, f"groups are members of one another ({circle}): take one of them out")
            if name in done:
                continue
            path.append(name)
            todo.append((name, 0, True))
            todo += [(member.group, member.line, False) for member in groups[name].members if member.group]


def check_defaults(source: Source, defaults: Iterable[NetworkDefault], networks: Iterable[str]) -> None:
    """Checks what networks are to do by default.

    Args:
        networks: the names of those that can.

    Raises:
        InvalidError
    """
    known = set(networks)
    seen: set[str] = set()
    for one in defaults:
        if one.network not in known:
            raise source.wrong(
                one.line,
                f"network {shown(one.network)} not found: create it first with 'taploom network create', or see "
                "'taploom network ls'",
            )
        if one.network in seen:
            raise source.wrong(one.line, f"network {one.network} is given twice: give it once")
        seen.add(one.network)
        if one.default not in DEFAULTS:
            raise source.wrong(one.line, f"{shown(one.default)} is no default: use {_choice(DEFAULTS)}")


def _checked_rules(source: Source, rules: tuple[Rule, ...] | None) -> tuple[Rule, ...] | None:
    if rules is None:
        return None
    named: dict[str, Rule] = {}
    for number, given in enumerate(rules, 1):
        rule = given if given.name else dataclasses.replace(given, name=f"rule-{number}")
        check_name(source, rule.line, "rule", rule.name)
        if rule.name in named:
            raise source.wrong(rule.line, f"rule {rule.name} is given twice in this list: choose another name")
        named[rule.name] = _checked_rule(source, rule)
    return tuple(named.values())


def _checked_rule(source: Source, rule: Rule) -> Rule:
    if rule.action not in ACTIONS:
        raise source.wrong(rule.line, f"rule {rule.name}: {shown(rule.action)} is no action: use {_choice(ACTIONS)}")
    if rule.protocol not in PROTOCOLS:
        raise source.wrong(
            rule.line, f"rule {rule.name}: {shown(rule.protocol)} is no protocol: use {_choice(PROTOCOLS)}"
        )
    if not 0 <= rule.priority <= MAX_PRIORITY:
        raise source.wrong(
            rule.line, f"rule {rule.name}: priority {rule.priority} is out of range: use 0 to {MAX_PRIORITY}"
        )
    for what, items in (("ports", rule.ports), ("peers", rule.peers)):
        _limit(source, rule.line, f"rule {rule.name} has", what, items)
    _check_ports(source, rule)
    return dataclasses.replace(rule, peers=_checked_peers(source, rule))


def _check_ports(source: Source, rule: Rule) -> None:
    if rule.ports and rule.protocol not in (TCP, UDP):
        raise source.wrong(
            rule.ports[0].line or rule.line,
            f"rule {rule.name} has ports but no protocol that has ports: add 'protocol: tcp' or 'protocol: udp'",
        )
    seen: list[Ports] = []
    for ports in rule.ports:
        line = ports.line or rule.line
        if not (1 <= ports.first <= 65535 and 1 <= ports.last <= 65535):
            raise source.wrong(line, f"ports {_span(ports)} are out of range: use 1 to 65535")
        if ports.first > ports.last:
            raise source.wrong(line, f"port range {_span(ports)} is empty: write {ports.last}-{ports.first}")
        for other in seen:
            if ports.first <= other.last and other.first <= ports.last:
                raise source.wrong(line, f"ports {_span(other)} and {_span(ports)} overlap: write each port once")
        seen.append(ports)


def _checked_peers(source: Source, rule: Rule) -> tuple[Peer, ...]:
    checked: list[Peer] = []
    families: dict[int, str] = {}
    for peer in rule.peers:
        line = peer.line or rule.line
        if (peer.selector is not None) + bool(peer.cidr) + peer.host != 1:
            raise source.wrong(line, f"rule {rule.name}: a peer must be one of a subnet, guests or the host")
        if peer.selector is not None:
            check_selector(source, peer.selector)
        if not peer.cidr:
            checked.append(peer)
            continue
        subnet = _subnet(source, line, peer.cidr)
        families.setdefault(subnet.version, str(subnet))
        if len(families) > 1:
            raise source.wrong(
                line,
                f"rule {rule.name} mixes families ({families[4]} and {families[6]}): write one rule for each family",
            )
        wanted = _FAMILY.get(rule.protocol)
        if wanted is not None and subnet.version != wanted:
            other = ICMPV6 if rule.protocol == ICMP else ICMP
            raise source.wrong(
                line, f"rule {rule.name} mixes families: {rule.protocol} does not go with {subnet}; use {other}"
            )
        checked.append(dataclasses.replace(peer, cidr=str(subnet)))
    return tuple(checked)


def _subnet(source: Source, line: int, text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    try:
        interface = ipaddress.ip_interface(text)
    except ValueError:
        raise source.wrong(line, f"{shown(text)} is not a subnet: write it as 10.0.0.0/8 or fd00::/8") from None
    if isinstance(interface, ipaddress.IPv6Interface) and interface.scope_id is not None:
        raise source.wrong(line, f"{shown(text)} has a zone, which subnets do not have: leave it out")
    if interface.ip != interface.network.network_address:
        raise source.wrong(line, f"{shown(text)} has bits behind its prefix: write {interface.network}")
    return interface.network


def _limit(source: Source, line: int, whose: str, what: str, items: Sequence[object]) -> None:
    if len(items) > MAX_ITEMS:
        raise source.wrong(line, f"{whose} {len(items)} {what}: use at most {MAX_ITEMS}")


def _span(ports: Ports) -> str:
    return str(ports.first) if ports.first == ports.last else f"{ports.first}-{ports.last}"


def _choice(values: Sequence[str]) -> str:
    return f"{', '.join(values[:-1])} or {values[-1]}"

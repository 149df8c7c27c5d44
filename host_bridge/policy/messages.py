"""Policies as contract messages (`taploom.bridge.v1`), both ways."""

from __future__ import annotations

from collections.abc import Iterable

from host_bridge.errors import InvalidError
from host_bridge.policy.model import (
    ALLOW,
    ANY,
    DEFAULT_PRIORITY,
    DENY,
    DENY_IN,
    DENY_OUT,
    DROP,
    REJECT,
    Group,
    NetworkDefault,
    Peer,
    Ports,
    Rule,
)
from host_bridge.selectors import Selector
from taploom.contracts.taploom.bridge import v1 as bridge

_ACTIONS = {
    ALLOW: bridge.RuleAction.ALLOW,
    DROP: bridge.RuleAction.DROP,
    REJECT: bridge.RuleAction.REJECT,
}
_DEFAULTS = {
    ALLOW: bridge.PolicyDefault.ALLOW,
    DENY: bridge.PolicyDefault.DENY,
    DENY_IN: bridge.PolicyDefault.DENY_IN,
    DENY_OUT: bridge.PolicyDefault.DENY_OUT,
}
_ACTION_OF = {bridge.RuleAction.UNSPECIFIED: ALLOW} | {value: name for name, value in _ACTIONS.items()}
_DEFAULT_OF = {value: name for name, value in _DEFAULTS.items()}


def to_message(group: Group) -> bridge.PolicyGroup:
    """A group."""

    def rules(found: Iterable[Rule] | None) -> bridge.RuleList | None:
        return None if found is None else bridge.RuleList(rules=[_rule_message(rule) for rule in found])

    return bridge.PolicyGroup(
        name=group.name,
        members=[_selector_message(member) for member in group.members],
        incoming=rules(group.incoming),
        outgoing=rules(group.outgoing),
        line=group.line,
    )


def default_message(one: NetworkDefault) -> bridge.NetworkPolicy:
    """What a network does by default."""
    return bridge.NetworkPolicy(network=one.network, default=_DEFAULTS[one.default], line=one.line)


def action_message(action: str) -> bridge.RuleAction:
    """What becomes of what a rule matches."""
    return _ACTIONS[action]


def _rule_message(rule: Rule) -> bridge.Rule:
    return bridge.Rule(
        name=rule.name,
        action=_ACTIONS[rule.action],
        protocol=rule.protocol,
        ports=[bridge.RulePorts(first=one.first, last=one.last, line=one.line) for one in rule.ports],
        peers=[_peer_message(peer) for peer in rule.peers],
        priority=rule.priority,
        log=rule.log,
        line=rule.line,
    )


def _peer_message(peer: Peer) -> bridge.RulePeer:
    if peer.selector is not None:
        return bridge.RulePeer(selector=_selector_message(peer.selector), line=peer.line)
    return bridge.RulePeer(host=True, line=peer.line) if peer.host else bridge.RulePeer(cidr=peer.cidr, line=peer.line)


def _selector_message(selector: Selector) -> bridge.PolicySelector:
    return bridge.PolicySelector(**selector.given(), line=selector.line)


def from_message(message: bridge.PolicyGroup) -> Group:
    """A group as a caller describes it; `check` looks at what it says.

    Raises:
        InvalidError: it has values that this bridge does not know.
    """

    def rules(found: bridge.RuleList | None) -> tuple[Rule, ...] | None:
        return None if found is None else tuple(_rule(rule) for rule in found.rules)

    members = tuple(_selector(member) for member in message.members)
    return Group(message.name, members, rules(message.incoming), rules(message.outgoing), message.line)


def from_default(message: bridge.NetworkPolicy) -> NetworkDefault:
    """What a network is to do by default.

    Raises:
        InvalidError: it is a value that this bridge does not know.
    """
    default = _DEFAULT_OF.get(message.default)
    if default is None:
        raise InvalidError(f"network {message.network}: default {int(message.default)} is not known: update the bridge")
    return NetworkDefault(message.network, default, message.line)


def _rule(message: bridge.Rule) -> Rule:
    action = _ACTION_OF.get(message.action)
    if action is None:
        raise InvalidError(f"rule {message.name}: action {int(message.action)} is not known: update the bridge")
    return Rule(
        message.name,
        action,
        message.protocol or ANY,
        tuple(Ports(one.first, one.last, one.line) for one in message.ports),
        tuple(_peer(peer) for peer in message.peers),
        DEFAULT_PRIORITY if message.priority is None else message.priority,
        message.log,
        message.line,
    )


def _peer(message: bridge.RulePeer) -> Peer:
    selector = None if message.selector is None else _selector(message.selector)
    return Peer(selector, message.cidr or "", bool(message.host), message.line)


def _selector(message: bridge.PolicySelector) -> Selector:
    return Selector(message.guest, message.alias, message.label, message.network, message.group, message.line)


def shown_line(line: bridge.WatchPolicyLogResponse) -> str:
    """A line for people: `drop web 10.0.0.2:40000 > db 10.0.0.3:5432 tcp by db in rest`."""
    with_ports = line.protocol in ("tcp", "udp", "sctp")

    def end(guest: str, address: str, port: int) -> str:
        place = (
            f"[{address}]:{port}" if with_ports and ":" in address else f"{address}:{port}" if with_ports else address
        )
        return f"{guest} {place}".strip()

    action = (line.action.name or "").lower()
    source = end(line.source_guest, line.source, line.source_port)
    destination = end(line.destination_guest, line.destination, line.destination_port)
    return f"{action} {source} > {destination} {line.protocol} by {line.group} {line.direction} {line.rule}"

"""Policies as values: what a file says, checked, and what the database holds."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from host_bridge.selectors import Selector
from host_bridge.values import line_field

IN, OUT = "in", "out"
DIRECTIONS = (IN, OUT)
ALLOW, DROP, REJECT = "allow", "drop", "reject"
ACTIONS = (ALLOW, DROP, REJECT)
ANY, TCP, UDP, ICMP, ICMPV6 = "any", "tcp", "udp", "icmp", "icmpv6"
PROTOCOLS = (ANY, TCP, UDP, ICMP, ICMPV6)
DENY, DENY_IN, DENY_OUT = "deny", "deny-in", "deny-out"
DEFAULTS = (ALLOW, DENY, DENY_IN, DENY_OUT)
DEFAULT_PRIORITY = 100
MAX_PRIORITY = 1000

# The option of a network that says what becomes of connections that no rule speaks of.
OPTION_POLICY = "taploom.policy"
# The label of a container that names groups that it is in, separated by commas.
LABEL_GROUPS = "taploom.groups"


@dataclass(frozen=True, slots=True)
class Peer:
    """Who is at the other end: a selector, a subnet (normalised CIDR), or the host. Exactly one is given."""

    selector: Selector | None = None
    cidr: str = ""
    host: bool = False
    line: int = line_field()


@dataclass(frozen=True, slots=True)
class Ports:
    """Ports from `first` to `last`, both included."""

    first: int
    last: int
    line: int = line_field()


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule. Without peers it is for anybody, without ports for all."""

    name: str
    action: str = ALLOW
    protocol: str = ANY
    ports: tuple[Ports, ...] = ()
    peers: tuple[Peer, ...] = ()
    priority: int = DEFAULT_PRIORITY
    log: bool = False
    line: int = line_field()


@dataclass(frozen=True, slots=True)
class Group:
    """A group. A list that is None says nothing about its direction; an empty one lets nothing pass."""

    name: str
    members: tuple[Selector, ...] = ()
    incoming: tuple[Rule, ...] | None = None
    outgoing: tuple[Rule, ...] | None = None
    line: int = line_field()

    def rules(self, direction: str) -> tuple[Rule, ...] | None:
        """The list of a direction."""
        return self.incoming if direction == IN else self.outgoing

    def all_rules(self) -> Iterator[tuple[str, Rule]]:
        """Every rule with its direction."""
        for direction in DIRECTIONS:
            for rule in self.rules(direction) or ():
                yield direction, rule


@dataclass(frozen=True, slots=True)
class NetworkDefault:
    """What becomes, on a network, of connections that no rule speaks of: one of `DEFAULTS`."""

    network: str
    default: str
    line: int = line_field()


def from_json(name: str, text: str) -> Group:
    """A group that `values.to_json` wrote."""
    value = json.loads(text)

    def rules(key: str) -> tuple[Rule, ...] | None:
        return tuple(_rule(one) for one in value[key]) if key in value else None

    members = tuple(Selector(**one) for one in value.get("members", ()))
    return Group(name, members, rules("incoming"), rules("outgoing"))


def _rule(value: Mapping[str, Any]) -> Rule:
    ports = tuple(Ports(**one) for one in value.get("ports", ()))
    peers = tuple(
        Peer(**{**one, "selector": Selector(**one["selector"])} if "selector" in one else one)
        for one in value.get("peers", ())
    )
    return Rule(**{**value, "ports": ports, "peers": peers})

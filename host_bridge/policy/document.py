"""Policies as people write them: YAML, read strictly (see `host_bridge.documents`)."""

from __future__ import annotations

import re
from dataclasses import dataclass

import yaml

from host_bridge.documents import (
    DocumentError,
    Fields,
    boolean_of,
    composed,
    line_of,
    list_of,
    number_of,
    one_of,
    scalar_of,
    text_of,
)
from host_bridge.policy.model import (
    ACTIONS,
    ALLOW,
    ANY,
    DEFAULT_PRIORITY,
    DEFAULTS,
    DROP,
    IN,
    PROTOCOLS,
    Group,
    NetworkDefault,
    Peer,
    Ports,
    Rule,
)
from host_bridge.selectors import Selector

_NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)
_RANGE = re.compile(r"([0-9]{1,9})\s*-\s*([0-9]{1,9})", re.ASCII)
_MEANT = {"deny": DROP, "block": DROP}
_SELECTORS = ("guest", "alias", "label", "network", "group")


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """What a text says."""

    groups: tuple[Group, ...]
    networks: tuple[NetworkDefault, ...]


def read(text: str) -> PolicyFile:
    """Reads a policy.

    Raises:
        DocumentError: the first thing that is wrong.
    """
    root = composed(text, "'groups:' or 'networks:'")
    top = Fields(root, "a policy", ("groups", "networks"))
    groups = tuple(_group(key, node) for key, node in top.items("groups", "names of groups"))
    networks = tuple(_network(key, node) for key, node in top.items("networks", "names of networks"))
    return PolicyFile(groups, networks)


def _network(key: tuple[str, int], node: yaml.Node) -> NetworkDefault:
    name, line = key
    return NetworkDefault(name, one_of(node, f"the default of network {name}", DEFAULTS), line)


def _group(key: tuple[str, int], node: yaml.Node) -> Group:
    name, line = key
    fields = Fields(node, f"group {name}", ("members", "in", "out"))
    return Group(
        name,
        tuple(fields.get("members", lambda n, k: [_selector(one) for one in list_of(n, k)], [])),
        fields.get("in", _rules, None),
        fields.get("out", _rules, None),
        line,
    )


def _rules(node: yaml.Node, direction: str) -> tuple[Rule, ...]:
    return tuple(_rule(one, direction) for one in list_of(node, f"'{direction}'"))


def _rule(node: yaml.Node, direction: str) -> Rule:
    side, other = ("from", "to") if direction == IN else ("to", "from")
    known = ("name", "action", "protocol", "ports", side, "priority", "log")
    if isinstance(node, yaml.MappingNode):
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == other:
                raise DocumentError(line_of(key), f"a rule of '{direction}' has {side!r}, not {other!r}")
    fields = Fields(node, f"a rule of '{direction}'", known)
    rule = Rule(
        fields.get("name", text_of, ""),
        fields.get("action", lambda n, k: one_of(n, k, ACTIONS, _MEANT), ALLOW),
        fields.get("protocol", lambda n, k: one_of(n, k, PROTOCOLS), ANY),
        fields.get("ports", _ports, ()),
        fields.get(side, _peers, ()),
        fields.get("priority", number_of, DEFAULT_PRIORITY),
        fields.get("log", boolean_of, False),
        fields.line,
    )
    if not any(True for _ in fields):
        raise DocumentError(fields.line, "an empty rule would let everything pass: write 'protocol: any' if it is to")
    if "name" in fields and not rule.name:
        raise DocumentError(fields.lines["name"], "the rule's name is empty: leave it out, or write one")
    return rule


def _ports(node: yaml.Node, key: str) -> tuple[Ports, ...]:
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not nodes:
        raise DocumentError(line_of(node), "'ports' has none, so nothing would fit: leave it out for all ports")
    return tuple(_span(one, key) for one in nodes)


def _span(node: yaml.Node, key: str) -> Ports:
    text, line = scalar_of(node, key), line_of(node)
    if _NUMBER.fullmatch(text):
        return Ports(int(text), int(text), line)
    found = _RANGE.fullmatch(text)
    if found is None:
        raise DocumentError(line, f"{text!r} is no port: write 80, or 8000-8010 for a range")
    return Ports(int(found[1]), int(found[2]), line)


def _peers(node: yaml.Node, key: str) -> tuple[Peer, ...]:
    if isinstance(node, yaml.ScalarNode):
        text = text_of(node, key)
        if text == "any":
            return ()
        if text == "host":
            return (Peer(host=True, line=line_of(node)),)
        raise DocumentError(
            line_of(node), f"{text!r} is nobody: write any, host, {{group: NAME}}, {{alias: NAME}} or {{cidr: SUBNET}}"
        )
    if isinstance(node, yaml.MappingNode):
        return _peer(node, key)
    nodes = list_of(node, key)
    if not nodes:
        raise DocumentError(line_of(node), f"{key!r} has nobody, so nothing would fit: write any, or leave it out")
    found: list[Peer] = []
    for one in nodes:
        if isinstance(one, yaml.ScalarNode) and one.value == "any":
            raise DocumentError(line_of(one), "any stands by itself: write 'any' instead of the list")
        found += _peers(one, key) if isinstance(one, yaml.ScalarNode) else _peer(one, key)
    return tuple(found)


def _peer(node: yaml.Node, key: str) -> tuple[Peer, ...]:
    if isinstance(node, yaml.MappingNode) and any(
        isinstance(name, yaml.ScalarNode) and name.value == "cidr" for name, _ in node.value
    ):
        fields = Fields(node, "a peer that is a subnet", ("cidr",))
        cidr = fields.node("cidr")
        nodes = cidr.value if isinstance(cidr, yaml.SequenceNode) else [cidr]
        if not nodes:
            raise DocumentError(line_of(cidr), "'cidr' has no subnet: write one")
        return tuple(Peer(cidr=scalar_of(one, "cidr"), line=line_of(one)) for one in nodes)
    selector = _selector(node, (*_SELECTORS, "cidr"))
    return (Peer(selector=selector, line=selector.line),)


def _selector(node: yaml.Node, known: tuple[str, ...] = _SELECTORS) -> Selector:
    fields = Fields(node, "who is meant" if len(known) > len(_SELECTORS) else "a member", known)
    values = {name: fields.get(name, text_of, "") for name in _SELECTORS}
    for name in fields:
        if not values[name]:
            raise DocumentError(fields.lines[name], f"{name!r} is empty: write a name, or leave it out")
    return Selector(**values, line=fields.line)

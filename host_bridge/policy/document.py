"""Policies as people write them: YAML, read strictly.

Everything that is not known is refused, with its line: unknown and repeated keys, wrong types, and what YAML could mean
in two ways. Only PyYAML's composer is used, which gives nodes with their places and makes no objects; scalars are taken
as they are written, so a port `22:22` is not YAML 1.1's sexagesimal 1342 and a group called `no` is not false.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import yaml

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
    Selector,
)

MAX_SIZE = 1 << 20
_MAX_DEPTH = 16
_NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)
_RANGE = re.compile(r"([0-9]{1,9})\s*-\s*([0-9]{1,9})", re.ASCII)
_TAG = "tag:yaml.org,2002:"
# Those that YAML gives by itself.
_TAGS = frozenset(("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "value", "merge"))
_SELECTORS = ("guest", "alias", "label", "network", "group")
_KINDS = {yaml.MappingNode: "keys and values", yaml.SequenceNode: "a list", yaml.ScalarNode: "a text"}

# libyaml's is ten times as fast where PyYAML was built with it.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

T = TypeVar("T")


class PolicyFileError(Exception):
    """The text is no policy. The message says what is wrong and what to do; `line` is where, from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


@dataclass(frozen=True, slots=True)
class PolicyFile:
    """What a text says."""

    groups: tuple[Group, ...]
    networks: tuple[NetworkDefault, ...]


def read(text: str) -> PolicyFile:
    """Reads a policy.

    Raises:
        PolicyFileError: the first thing that is wrong.
    """
    if len(text) > MAX_SIZE:
        raise PolicyFileError(1, f"the text has {len(text)} characters: use at most {MAX_SIZE}, or several files")
    root = _composed(text)
    if root is None:
        raise PolicyFileError(1, "there is nothing in it: write 'groups:' or 'networks:'")
    top = _Mapping(root, "a policy", ("groups", "networks"))
    groups = tuple(_group(key, node) for key, node in top.items("groups", "names of groups"))
    networks = tuple(_network(key, node) for key, node in top.items("networks", "names of networks"))
    return PolicyFile(groups, networks)


def _composed(text: str) -> yaml.Node | None:
    for number, character in enumerate(text):
        if character not in "\t\n\r" and not character.isprintable():
            raise PolicyFileError(
                text.count("\n", 0, number) + 1, f"character {character!r} is not allowed: take it out"
            )
    # Before the nodes are made, for nesting that deep would end the composer by its own depth.
    try:
        depth = 0
        for event in yaml.parse(text, _LOADER):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise PolicyFileError(_line(event), "anchors and aliases (& and *) are not used here: write it out")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > _MAX_DEPTH:
                    raise PolicyFileError(_line(event), f"more than {_MAX_DEPTH} levels: nothing here is that deep")
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
        nodes = list(yaml.compose_all(text, _LOADER))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = " ".join((error.problem or error.context or "it cannot be read").split())
        raise PolicyFileError(mark.line + 1 if mark else 1, f"this is not YAML: {reason}") from error
    except yaml.YAMLError as error:
        raise PolicyFileError(1, f"this is not YAML: {' '.join(str(error).split())}") from error
    if len(nodes) > 1:
        raise PolicyFileError(_line(nodes[1]), "a second document: put all into one, without '---' between")
    return nodes[0] if nodes else None


class _Mapping:
    """The keys of a mapping, each at most once, all of them known unless `known` is None."""

    def __init__(self, node: yaml.Node, what: str, known: tuple[str, ...] | None) -> None:
        self.line = _line(node)
        if not isinstance(node, yaml.MappingNode):
            allowed = f" ({', '.join(known)})" if known else ""
            raise PolicyFileError(self.line, f"{what} must be keys and values{allowed}, not {_kind(node)}")
        _check_tag(node)
        self._nodes: dict[str, yaml.Node] = {}
        self.lines: dict[str, int] = {}
        for key_node, value in node.value:
            key = _text(key_node, f"a key of {what}")
            if known is not None and key not in known:
                raise PolicyFileError(
                    _line(key_node), f"{key!r} is not a key of {what}: use {', '.join(known[:-1])} or {known[-1]}"
                )
            if key in self._nodes:
                raise PolicyFileError(
                    _line(key_node), f"{key!r} is given twice (first at line {self.lines[key]}): give it once"
                )
            self._nodes[key] = value
            self.lines[key] = _line(key_node)

    def __contains__(self, key: str) -> bool:
        return key in self._nodes

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def get(self, key: str, read: Callable[[yaml.Node, str], T], default: T) -> T:
        """The value of a key as `read` takes it from its node and name, or the default."""
        return read(self._nodes[key], key) if key in self._nodes else default

    def node(self, key: str) -> yaml.Node:
        return self._nodes[key]

    def items(self, key: str, what: str) -> list[tuple[tuple[str, int], yaml.Node]]:
        """Names, their lines and their nodes, of a mapping whose keys are names."""
        if key not in self._nodes:
            return []
        inner = _Mapping(self._nodes[key], f"{key!r} ({what})", None)
        return [((name, inner.lines[name]), inner.node(name)) for name in inner]


def _network(key: tuple[str, int], node: yaml.Node) -> NetworkDefault:
    name, line = key
    return NetworkDefault(name, _one_of(node, f"the default of network {name}", DEFAULTS), line)


def _group(key: tuple[str, int], node: yaml.Node) -> Group:
    name, line = key
    fields = _Mapping(node, f"group {name}", ("members", "in", "out"))
    return Group(
        name,
        tuple(fields.get("members", lambda n, k: [_selector(one) for one in _list(n, k)], [])),
        fields.get("in", _rules, None),
        fields.get("out", _rules, None),
        line,
    )


def _rules(node: yaml.Node, direction: str) -> tuple[Rule, ...]:
    return tuple(_rule(one, direction) for one in _list(node, f"'{direction}'"))


def _rule(node: yaml.Node, direction: str) -> Rule:
    side, other = ("from", "to") if direction == IN else ("to", "from")
    known = ("name", "action", "protocol", "ports", side, "priority", "log")
    if isinstance(node, yaml.MappingNode):
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value == other:
                raise PolicyFileError(_line(key), f"a rule of '{direction}' has {side!r}, not {other!r}")
    fields = _Mapping(node, f"a rule of '{direction}'", known)
    rule = Rule(
        fields.get("name", _text, ""),
        fields.get("action", lambda n, k: _one_of(n, k, ACTIONS), ALLOW),
        fields.get("protocol", lambda n, k: _one_of(n, k, PROTOCOLS), ANY),
        fields.get("ports", _ports, ()),
        fields.get(side, _peers, ()),
        fields.get("priority", _number, DEFAULT_PRIORITY),
        fields.get("log", _boolean, False),
        fields.line,
    )
    if not any(True for _ in fields):
        raise PolicyFileError(fields.line, "an empty rule would let everything pass: write 'protocol: any' if it is to")
    if "name" in fields and not rule.name:
        raise PolicyFileError(fields.lines["name"], "the rule's name is empty: leave it out, or write one")
    return rule


def _ports(node: yaml.Node, key: str) -> tuple[Ports, ...]:
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    if not nodes:
        raise PolicyFileError(_line(node), "'ports' has none, so nothing would fit: leave it out for all ports")
    return tuple(_span(one, key) for one in nodes)


def _span(node: yaml.Node, key: str) -> Ports:
    text, line = _scalar(node, key), _line(node)
    if _NUMBER.fullmatch(text):
        return Ports(int(text), int(text), line)
    found = _RANGE.fullmatch(text)
    if found is None:
        raise PolicyFileError(line, f"{text!r} is no port: write 80, or 8000-8010 for a range")
    return Ports(int(found[1]), int(found[2]), line)


def _peers(node: yaml.Node, key: str) -> tuple[Peer, ...]:
    if isinstance(node, yaml.ScalarNode):
        text = _text(node, key)
        if text == "any":
            return ()
        if text == "host":
            return (Peer(host=True, line=_line(node)),)
        raise PolicyFileError(
            _line(node), f"{text!r} is nobody: write any, host, {{group: NAME}}, {{alias: NAME}} or {{cidr: SUBNET}}"
        )
    if isinstance(node, yaml.MappingNode):
        return _peer(node, key)
    nodes = _list(node, key)
    if not nodes:
        raise PolicyFileError(_line(node), f"{key!r} has nobody, so nothing would fit: write any, or leave it out")
    found: list[Peer] = []
    for one in nodes:
        if isinstance(one, yaml.ScalarNode) and one.value == "any":
            raise PolicyFileError(_line(one), "any stands by itself: write 'any' instead of the list")
        found += _peers(one, key) if isinstance(one, yaml.ScalarNode) else _peer(one, key)
    return tuple(found)


def _peer(node: yaml.Node, key: str) -> tuple[Peer, ...]:
    if isinstance(node, yaml.MappingNode) and any(
        isinstance(name, yaml.ScalarNode) and name.value == "cidr" for name, _ in node.value
    ):
        fields = _Mapping(node, "a peer that is a subnet", ("cidr",))
        cidr = fields.node("cidr")
        nodes = cidr.value if isinstance(cidr, yaml.SequenceNode) else [cidr]
        if not nodes:
            raise PolicyFileError(_line(cidr), "'cidr' has no subnet: write one")
        return tuple(Peer(cidr=_scalar(one, "cidr"), line=_line(one)) for one in nodes)
    selector = _selector(node, (*_SELECTORS, "cidr"))
    return (Peer(selector=selector, line=selector.line),)


def _selector(node: yaml.Node, known: tuple[str, ...] = _SELECTORS) -> Selector:
    fields = _Mapping(node, "who is meant" if len(known) > len(_SELECTORS) else "a member", known)
    values = {name: fields.get(name, _text, "") for name in _SELECTORS}
    for name in fields:
        if not values[name]:
            raise PolicyFileError(fields.lines[name], f"{name!r} is empty: write a name, or leave it out")
    return Selector(**values, line=fields.line)


def _list(node: yaml.Node, key: str) -> list[yaml.Node]:
    if not isinstance(node, yaml.SequenceNode):
        hint = " (write [] for none)" if isinstance(node, yaml.ScalarNode) and not node.value else ""
        raise PolicyFileError(_line(node), f"{key} must be a list, not {_kind(node)}{hint}")
    _check_tag(node)
    found: list[yaml.Node] = node.value
    return found


def _text(node: yaml.Node, key: str) -> str:
    text = _scalar(node, key)
    if node.tag not in (_TAG + "str", _TAG + "bool", _TAG + "value", _TAG + "merge"):
        raise PolicyFileError(
            _line(node), f"{key} must be a text, not {_kind(node)}: write it in quotes if it is meant"
        )
    return text


def _scalar(node: yaml.Node, key: str) -> str:
    if not isinstance(node, yaml.ScalarNode):
        raise PolicyFileError(_line(node), f"{key} must be a single value, not {_kind(node)}")
    _check_tag(node)
    return str(node.value)


def _number(node: yaml.Node, key: str) -> int:
    text = _scalar(node, key)
    if not _NUMBER.fullmatch(text) or node.tag != _TAG + "int":
        raise PolicyFileError(_line(node), f"{key} must be a whole number, not {text!r}")
    return int(text)


def _boolean(node: yaml.Node, key: str) -> bool:
    text = _scalar(node, key)
    if text not in ("true", "false") or node.tag != _TAG + "bool":
        raise PolicyFileError(_line(node), f"{key} must be true or false, not {text!r}")
    return text == "true"


def _one_of(node: yaml.Node, key: str, values: tuple[str, ...]) -> str:
    text = _scalar(node, key)
    if text not in values:
        hint = f" (did you mean {DROP}?)" if text in ("deny", "block") and DROP in values else ""
        raise PolicyFileError(
            _line(node), f"{key} cannot be {text!r}: use {', '.join(values[:-1])} or {values[-1]}{hint}"
        )
    return text


def _check_tag(node: yaml.Node) -> None:
    if node.tag.removeprefix(_TAG) not in _TAGS:
        raise PolicyFileError(_line(node), f"tag {node.tag} is not used here: take it out")


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        if node.tag == _TAG + "null":
            return "nothing"
        return f"{node.value!r}" if len(node.value) <= 40 else "a text"
    return next((text for kind, text in _KINDS.items() if isinstance(node, kind)), "that")


def _line(node: yaml.Node | yaml.Event) -> int:
    line: int = node.start_mark.line
    return line + 1

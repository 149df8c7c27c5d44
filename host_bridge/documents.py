"""Documents that people write: YAML, read strictly.

Everything that is not known is refused, with its line: unknown and repeated keys, wrong types, and what YAML could mean
in two ways. Only PyYAML's composer is used, which gives nodes with their places and makes no objects; scalars are taken
as they are written, so a port `22:22` is not YAML 1.1's sexagesimal 1342 and a group called `no` is not false.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import yaml

MAX_SIZE = 1 << 20
_MAX_DEPTH = 16
_NUMBER = re.compile(r"[0-9]{1,9}", re.ASCII)
_TAG = "tag:yaml.org,2002:"
# Those that YAML gives by itself.
_TAGS = frozenset(("map", "seq", "str", "int", "float", "bool", "null", "timestamp", "value", "merge"))
_KINDS = {yaml.MappingNode: "keys and values", yaml.SequenceNode: "a list", yaml.ScalarNode: "a text"}

# libyaml's is ten times as fast where PyYAML was built with it.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

Node = yaml.Node
T = TypeVar("T")


class DocumentError(Exception):
    """The text is not what it should be. The message says what is wrong and what to do; `line` is where, from 1."""

    def __init__(self, line: int, message: str) -> None:
        super().__init__(message)
        self.line = line


def composed(text: str, keys: str) -> yaml.Node:
    """The document's node.

    Args:
        text: the document.
        keys: what may be written at its top, for the message that there is nothing.

    Raises:
        DocumentError: it is too large, no YAML, or YAML of more kinds than are used here.
    """
    if len(text) > MAX_SIZE:
        raise DocumentError(1, f"the text has {len(text)} characters: use at most {MAX_SIZE}, or several files")
    for number, character in enumerate(text):
        if character not in "\t\n\r" and not character.isprintable():
            raise DocumentError(text.count("\n", 0, number) + 1, f"character {character!r} is not allowed: take it out")
    # Before the nodes are made, for nesting that deep would end the composer by its own depth.
    try:
        depth = 0
        for event in yaml.parse(text, _LOADER):
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None) is not None:
                raise DocumentError(line_of(event), "anchors and aliases (& and *) are not used here: write it out")
            if isinstance(event, yaml.CollectionStartEvent):
                depth += 1
                if depth > _MAX_DEPTH:
                    raise DocumentError(line_of(event), f"more than {_MAX_DEPTH} levels: nothing here is that deep")
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
        nodes = list(yaml.compose_all(text, _LOADER))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = " ".join((error.problem or error.context or "it cannot be read").split())
        raise DocumentError(mark.line + 1 if mark else 1, f"this is not YAML: {reason}") from error
    except yaml.YAMLError as error:
        raise DocumentError(1, f"this is not YAML: {' '.join(str(error).split())}") from error
    if len(nodes) > 1:
        raise DocumentError(line_of(nodes[1]), "a second document: put all into one, without '---' between")
    if not nodes:
        raise DocumentError(1, f"there is nothing in it: write {keys}")
    return nodes[0]


class Fields:
    """The keys of a mapping, each at most once, all of them known unless `known` is None."""

    def __init__(self, node: yaml.Node, what: str, known: tuple[str, ...] | None) -> None:
        self.line = line_of(node)
        if not isinstance(node, yaml.MappingNode):
            allowed = f" ({', '.join(known)})" if known else ""
            raise DocumentError(self.line, f"{what} must be keys and values{allowed}, not {kind_of(node)}")
        _check_tag(node)
        self._nodes: dict[str, yaml.Node] = {}
        self.lines: dict[str, int] = {}
        for key_node, value in node.value:
            key = text_of(key_node, f"a key of {what}")
            if known is not None and key not in known:
                raise DocumentError(
                    line_of(key_node), f"{key!r} is not a key of {what}: use {', '.join(known[:-1])} or {known[-1]}"
                )
            if key in self._nodes:
                raise DocumentError(
                    line_of(key_node), f"{key!r} is given twice (first at line {self.lines[key]}): give it once"
                )
            self._nodes[key] = value
            self.lines[key] = line_of(key_node)

    def __contains__(self, key: str) -> bool:
        return key in self._nodes

    def __iter__(self) -> Iterator[str]:
        return iter(self._nodes)

    def get(self, key: str, read: Callable[[yaml.Node, str], T], default: T) -> T:
        """The value of a key as `read` takes it from its node and name, or the default."""
        return read(self._nodes[key], key) if key in self._nodes else default

    def node(self, key: str) -> yaml.Node:
        """What a key has."""
        return self._nodes[key]

    def items(self, key: str, what: str) -> list[tuple[tuple[str, int], yaml.Node]]:
        """Names, their lines and their nodes, of a mapping whose keys are names."""
        if key not in self._nodes:
            return []
        inner = Fields(self._nodes[key], f"{key!r} ({what})", None)
        return [((name, inner.lines[name]), inner.node(name)) for name in inner]


def list_of(node: yaml.Node, key: str) -> list[yaml.Node]:
    """The nodes of a list. As those that follow, it raises DocumentError when the node is something else."""
    if not isinstance(node, yaml.SequenceNode):
        hint = " (write [] for none)" if isinstance(node, yaml.ScalarNode) and not node.value else ""
        raise DocumentError(line_of(node), f"{key} must be a list, not {kind_of(node)}{hint}")
    _check_tag(node)
    found: list[yaml.Node] = node.value
    return found


def text_of(node: yaml.Node, key: str) -> str:
    """A text; numbers and the like are none unless they are in quotes."""
    text = scalar_of(node, key)
    if node.tag not in (_TAG + "str", _TAG + "bool", _TAG + "value", _TAG + "merge"):
        raise DocumentError(
            line_of(node), f"{key} must be a text, not {kind_of(node)}: write it in quotes if it is meant"
        )
    return text


def scalar_of(node: yaml.Node, key: str) -> str:
    """A single value as it is written."""
    if not isinstance(node, yaml.ScalarNode):
        raise DocumentError(line_of(node), f"{key} must be a single value, not {kind_of(node)}")
    _check_tag(node)
    return str(node.value)


def number_of(node: yaml.Node, key: str) -> int:
    """A whole number."""
    text = scalar_of(node, key)
    if not _NUMBER.fullmatch(text) or node.tag != _TAG + "int":
        raise DocumentError(line_of(node), f"{key} must be a whole number, not {text!r}")
    return int(text)


def boolean_of(node: yaml.Node, key: str) -> bool:
    """True or false."""
    text = scalar_of(node, key)
    if text not in ("true", "false") or node.tag != _TAG + "bool":
        raise DocumentError(line_of(node), f"{key} must be true or false, not {text!r}")
    return text == "true"


def one_of(node: yaml.Node, key: str, values: tuple[str, ...], hints: Mapping[str, str] | None = None) -> str:
    """One of some values; `hints` has what is meant by words that are none of them."""
    text = scalar_of(node, key)
    if text not in values:
        meant = (hints or {}).get(text)
        hint = f" (did you mean {meant}?)" if meant else ""
        raise DocumentError(
            line_of(node), f"{key} cannot be {text!r}: use {', '.join(values[:-1])} or {values[-1]}{hint}"
        )
    return text


def _check_tag(node: yaml.Node) -> None:
    if node.tag.removeprefix(_TAG) not in _TAGS:
        raise DocumentError(line_of(node), f"tag {node.tag} is not used here: take it out")


def kind_of(node: yaml.Node) -> str:
    """What a node is, for messages."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag == _TAG + "null":
            return "nothing"
        return f"{node.value!r}" if len(node.value) <= 40 else "a text"
    return next((text for kind, text in _KINDS.items() if isinstance(node, kind)), "that")


def line_of(node: yaml.Node | yaml.Event) -> int:
    """Where it begins, from 1."""
    line: int = node.start_mark.line
    return line + 1

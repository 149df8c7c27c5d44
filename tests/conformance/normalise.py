"""Writes answers without what two equal daemons tell differently: ids, times, durations, random MACs, versions."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from typing import Any

from script import Result, Step

_REPLACEMENTS = [
    (re.compile(r"\b\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?( ?Z| ?[+-]\d\d:?\d\d( [A-Z]+)?)"), "<time>"),
    (re.compile(r"sha256:[0-9a-f]{12,64}"), "<digest>"),
    (re.compile(r"\b[0-9a-f]{64}\b"), "<id>"),
    (re.compile(r"\b(?=[a-f]*\d)[0-9a-f]{12}\b"), "<id>"),
    (re.compile(r"\b(Less than a|About an?|\d+) (second|minute|hour)s?( ago)?"), "<duration>"),
    (re.compile(r"\b(endpoint|name|container) \"?/?[a-z]+(_[a-z]+)+[0-9]?\b"), r"\1 <random name>"),
    (re.compile(r"/tmp/tlt[^\s/\"]+"), "<directory>"),
]
_MAC = re.compile(r"\b[0-9a-f]{2}(:[0-9a-f]{2}){5}\b")
# Values that are moments or process ids.
_MOMENTS = {"Created", "time", "timeNano", "Pid", "StartedAt", "FinishedAt", "CreatedAt", "RunningFor"}
_ZERO = "0001-01-01T00:00:00Z"


def normalise(step: Step, result: Result, symbols: dict[str, str]) -> Any:
    """The answer as a document to compare."""
    kept = {
        match.group() for word in (*step.argv, (step.body or b"").decode("latin-1")) for match in _MAC.finditer(word)
    }
    captured = {value: name for name, value in symbols.items() if len(value) == 64}
    fixed = [
        (re.compile(rf"(?<![\d.]){re.escape(value)}(?!\d)"), f"<{name}>")
        for name, value in symbols.items()
        if len(value) != 64 and len(value) > 6
    ]

    def text(value: str) -> str:
        for identifier, name in captured.items():
            value = value.replace(identifier, f"<{name}>").replace(identifier[:12], f"<{name}>")
        for fixed_value, name in fixed:
            value = fixed_value.sub(name, value)
        for pattern, replacement in _REPLACEMENTS:
            value = pattern.sub(replacement, value)
        return _MAC.sub(lambda match: match.group() if match.group() in kept | _STATIC_MACS else "<mac>", value)

    def walk(value: Any, key: str = "") -> Any:
        if isinstance(value, dict):
            return _members((text(name), walk(item, name)) for name, item in value.items())
        if isinstance(value, list):
            items = [walk(item) for item in value]
            return sorted(items, key=_order) if all(isinstance(item, dict) for item in items) else items
        if key in _MOMENTS and value not in (0, "", _ZERO):
            return "<moment>"
        return text(value) if isinstance(value, str) and value != _ZERO else value

    status = "status" if step.kind == "api" else "exit"
    if step.silent:
        return {status: result.exit}
    answer: dict[str, Any] = {status: result.exit}
    if result.document is not None:
        answer["json"] = walk(result.document)
        if step.title.startswith("docker events"):
            answer["json"] = _leaving_at_once(answer["json"])
    elif result.stdout:
        # Sorted in the container, by what is a symbol here.
        unordered = step.unordered or step.title.endswith((" routes", " addresses"))
        answer["stdout"] = _lines(text(result.stdout), unordered)
    if result.stderr:
        answer["stderr"] = _lines(text(result.stderr), step.unordered)
    if result.headers:
        answer["headers"] = result.headers
    return answer


# The MACs that scenarios choose: always compared.
_STATIC_MACS = {"92:d0:c6:0a:29:33", "02:00:00:00:00:01"}


def _lines(text: str, unordered: bool) -> str:
    # Columns are as wide as what was in them before it was normalised.
    lines = [re.sub(r" {2,}", "  ", line.rstrip()) for line in text.strip("\n").split("\n")]
    return "\n".join(sorted(lines) if unordered else lines)


def _members(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """An object; what has the same name now, such as several containers by their ids, is told apart by its content."""
    found: dict[str, list[Any]] = {}
    for name, item in pairs:
        found.setdefault(name, []).append(item)
    return {
        name if not number else f"{name}#{number + 1}": item
        for name, items in found.items()
        for number, item in enumerate(sorted(items, key=lambda item: json.dumps(item, sort_keys=True)))
    }


def _leaving_at_once(events: Any) -> Any:
    """The networks that a container joins or leaves at once come in an order of dockerd's that varies (a map's)."""
    if not isinstance(events, list):
        return events
    ordered: list[Any] = []
    for (kind, action), run in itertools.groupby(events, key=lambda event: (event.get("Type"), event.get("Action"))):
        several = list(run)
        if kind == "network" and action in ("connect", "disconnect"):
            several.sort(key=lambda event: json.dumps(event["Actor"], sort_keys=True))
        ordered += several
    return ordered


def _order(item: dict[str, Any]) -> str:
    """Lists of objects come in any order from Docker: by name here, as far as they have one."""
    if "PrivatePort" in item:
        return json.dumps(item, sort_keys=True)
    names = item.get("Name") or item.get("Names") or item.get("name") or ""
    return str(names)


def differences(real: Any, ours: Any, path: str = "") -> list[tuple[str, Any, Any]]:
    """Where two documents differ: path, what the one has, what the other has; a missing member is `ABSENT`."""
    if isinstance(real, dict) and isinstance(ours, dict):
        found = []
        for key in [*real, *(key for key in ours if key not in real)]:
            found += differences(real.get(key, ABSENT), ours.get(key, ABSENT), f"{path}.{key}" if path else key)
        return found
    if isinstance(real, list) and isinstance(ours, list) and len(real) == len(ours):
        found = []
        for number, (first, second) in enumerate(zip(real, ours, strict=True)):
            found += differences(first, second, f"{path}[{number}]")
        return found
    return [] if real == ours and type(real) is type(ours) else [(path, real, ours)]


class _Absent:
    def __repr__(self) -> str:
        return "ABSENT"


ABSENT = _Absent()

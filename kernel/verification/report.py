"""What the machine says on its console, and what is made of it: a table for people, JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from kernel.verification.guest.check import CHECKS, Check
from kernel.verification.guest.main import MARK

KERNEL_LOG = Check(
    "kernel-log", "in the end", "read the kernel's log: no warning, no bug, no stall", lambda: None, 0, False
)


@dataclass
class Report:
    """What is known so far of one run, fed with the console's text as it comes."""

    wanted: Sequence[Check]
    kernel: str = ""
    boot_seconds: float = 0.0
    seconds: float = 0.0
    ended: bool = False
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    running: list[str] = field(default_factory=list)
    _rest: str = ""

    def feed(self, text: str) -> list[dict[str, Any]]:
        """Takes more of the console's text; returns the messages in it that were new."""
        lines = (self._rest + text).split("\n")
        self._rest = lines.pop()
        messages = []
        for line in lines:
            _, mark, body = line.partition(MARK)
            if mark and (message := _message(body)):
                self._take(message)
                messages.append(message)
        return messages

    def _take(self, message: dict[str, Any]) -> None:
        kind = message["kind"]
        if kind == "boot":
            self.kernel = f"{message['kernel']} {message['machine']}"
            self.boot_seconds = message["seconds"]
        elif kind == "start":
            self.running.append(message["name"])
        elif kind == "result":
            self.results[message["name"]] = message
            if message["name"] in self.running:
                self.running.remove(message["name"])
        elif kind == "end":
            self.ended = True
            self.seconds = message["seconds"]

    def rows(self, reason: str) -> list[dict[str, Any]]:
        """All wanted checks with their results; one without a result has failed, for the reason given."""
        rows = []
        for check in (*self.wanted, KERNEL_LOG):
            result = self.results.get(check.name)
            rows.append(
                {
                    "name": check.name,
                    "group": check.group,
                    "does": check.does,
                    "ok": bool(result and result["ok"]),
                    "detail": result["detail"] if result else self._why(check, reason),
                    "seconds": result["seconds"] if result else None,
                }
            )
        return rows

    def _why(self, check: Check, reason: str) -> str:
        return f"{'it was running when' if check.name in self.running else 'not reached:'} {reason}"


def _message(body: str) -> dict[str, Any] | None:
    try:
        message = json.loads(body)
    except ValueError:  # something else was printed into the line
        return None
    return message if isinstance(message, dict) and "kind" in message else None


def select(names: Iterable[str]) -> list[Check]:
    """The checks of these names or groups, in the table's order; all of them without any.

    Raises:
        ValueError: a name that is neither.
    """
    asked = list(names)
    groups = {check.group for check in CHECKS.values()}
    unknown = [name for name in asked if name not in CHECKS and name not in groups]
    if unknown:
        raise ValueError(f"no check or group is called {', '.join(unknown)}; --list shows them")
    return [check for check in CHECKS.values() if not asked or check.name in asked or check.group in asked]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text, a heading per group."""
    width = max(len(row["name"]) for row in rows)
    lines: list[str] = []
    group = ""
    for row in rows:
        if row["group"] != group:
            group = row["group"]
            lines += ["", group] if lines else [group]
        took = f"{row['seconds']:6.2f} s" if row["seconds"] is not None else "       -"
        lines.append(f"  {row['name']:{width}}  {'ok    ' if row['ok'] else 'FAILED'} {took}  {row['does']}")
        if row["detail"]:
            lines.append(f"  {'':{width}}  {'':15}  {'-> ' if row['ok'] else 'BECAUSE '}{row['detail']}")
    return "\n".join(lines)

"""Finding a path's processes in /proc."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def children(pid: int) -> list[int]:
    """The pids of a process's children (proc(5), task/TID/children); none when it has ended."""
    found: list[int] = []
    try:
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += [int(child) for child in (task / "children").read_text().split()]
    except OSError:
        pass
    return found


def with_descendants(pids: Iterable[int]) -> list[int]:
    """The pids and those of all processes below them, each once."""
    found: dict[int, None] = {}
    pending = list(pids)
    while pending:
        pid = pending.pop()
        if pid not in found:
            found[pid] = None
            pending += children(pid)
    return list(found)


def program(pid: int) -> str:
    """The name of the program that runs (at most 15 characters); empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""

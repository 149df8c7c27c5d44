"""A path's processes and what the processors do, from /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

_AT_REST = 0.1  # processors busy, at most
_LOOK = 0.1  # s


class CpuTimes(NamedTuple):
    """CPU-seconds of the machine since its start; stolen is what the hypervisor gave to others (proc_stat(5))."""

    busy: float
    idle: float
    stolen: float

    @staticmethod
    def now() -> CpuTimes:
        line = Path("/proc/stat").read_text().splitlines()[0]
        user, nice, system, idle, iowait, irq, softirq, steal = (int(value) for value in line.split()[1:9])
        tick = os.sysconf("SC_CLK_TCK")
        return CpuTimes((user + nice + system + irq + softirq) / tick, (idle + iowait) / tick, steal / tick)

    def stolen_since(self) -> float:
        """The part of all processors' time since then that was stolen."""
        now = CpuTimes.now()
        total = sum(now) - sum(self)
        return (now.stolen - self.stolen) / total if total else 0.0


def busy_cpus(seconds: float) -> float:
    """How many CPUs are busy now. Takes `seconds`: an interval, not a wait for something."""
    before, began = CpuTimes.now(), time.monotonic()
    time.sleep(seconds)
    return (CpuTimes.now().busy - before.busy) / (time.monotonic() - began)


def wait_at_rest(most: float) -> None:
    """Returns once the machine has next to nothing to do, after `most` seconds at the latest."""
    end = time.monotonic() + most
    while time.monotonic() < end and busy_cpus(_LOOK) > _AT_REST:
        pass


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

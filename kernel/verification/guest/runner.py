"""Runs checks: each in a process and namespaces of its own, bounded in time, some at once."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import selectors
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from .check import Check, CheckError, report_steps_to
from .system import CLONE_NEWIPC, CLONE_NEWNET, CLONE_NEWNS, CLONE_NEWPID, MS_PRIVATE, MS_REC, mount, unshare

CGROUPS = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Result:
    """How a check ended. `detail` is what was seen, or why it failed."""

    name: str
    ok: bool
    detail: str
    seconds: float

    def line(self) -> str:
        """The result as one line of JSON."""
        return json.dumps(asdict(self), separators=(",", ":"))


class _Running:
    """A check's process and what it has said so far."""

    def __init__(self, check: Check) -> None:
        self.check = check
        self.start = time.monotonic()
        self.said = b""
        self.fd, theirs = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.fd)
            os.setsid()
            _in_child(check, theirs)
        os.close(theirs)

    @property
    def deadline(self) -> float:
        return self.start + self.check.seconds

    def end(self, hung: bool) -> Result:
        os.close(self.fd)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        _remove_cgroups(CGROUPS / cgroup_name(self.check))
        seconds = round(time.monotonic() - self.start, 2)
        step = ""
        for line in self.said.decode(errors="replace").splitlines():
            if line[0] == "S":
                step = line[1:]
            elif line[0] in "OF":
                return Result(self.check.name, line[0] == "O", line[1:], seconds)
        why = f"hung: no end after {self.check.seconds:g} s" if hung else "its process died"
        return Result(self.check.name, False, f"{why}, at: {step or 'its start'}", seconds)


def cgroup_name(check: Check) -> str:
    """The directory below the root of cgroup v2 in which a check may make cgroups; removed after it."""
    return f"verify-{check.name}"


def _remove_cgroups(top: Path) -> None:
    if not top.is_dir():
        return
    for directory in sorted((path for path in top.rglob("*") if path.is_dir()), reverse=True):
        directory.rmdir()
    for _ in range(100):  # the processes were killed just now
        with contextlib.suppress(OSError):
            top.rmdir()
            return
        time.sleep(0.02)


def _in_child(check: Check, fd: int) -> None:
    """Runs a check in a fork and never returns."""
    status = 1
    try:
        report_steps_to(fd)
        try:
            if not check.alone:
                _seclude()
            answer = b"O" + (check.run() or "").encode()
            status = 0
        except CheckError as error:
            answer = b"F" + str(error).encode()
        except Exception as error:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            answer = f"F{type(error).__name__}: {error} ({Path(frame.filename).name}:{frame.lineno})".encode()
        os.write(fd, answer.replace(b"\n", b"; ")[:1500] + b"\n")
    finally:
        os._exit(status)


def _seclude() -> None:
    """Moves into new namespaces, with a file system that forgets, whose processes die with this one."""
    unshare(CLONE_NEWNS | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWPID)
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    mount("none", "/", flags=MS_REC | MS_PRIVATE)
    mount("proc", "/proc", "proc")
    mount("sysfs", "/sys", "sysfs")
    mount("cgroup2", "/sys/fs/cgroup", "cgroup2")
    for kind, place in (("bpf", "/sys/fs/bpf"), ("tracefs", "/sys/kernel/tracing")):
        with contextlib.suppress(OSError):  # the checks that need it say that it is missing
            mount(kind, place, kind)
    for directory in ("/run", "/tmp", "/var"):  # noqa: S108 - mounted on
        mount("tmpfs", directory, "tmpfs")
    Path("/var/run").symlink_to("/run")


def run_checks(
    checks: Iterable[Check], jobs: int, started: Callable[[Check], None], ended: Callable[[Result], None]
) -> bool:
    """Runs checks, `jobs` at once but those that want to be alone; True when all are well."""
    waiting = list(checks)
    running: dict[int, _Running] = {}
    good = True
    with selectors.DefaultSelector() as selector:
        while waiting or running:
            while waiting and len(running) < jobs:
                lonely = waiting[0].alone or any(one.check.alone for one in running.values())
                if running and lonely:
                    break
                check = waiting.pop(0)
                started(check)
                one = _Running(check)
                running[one.fd] = one
                selector.register(one.fd, selectors.EVENT_READ)
            left = min(one.deadline for one in running.values()) - time.monotonic()
            closed = set()
            for key, _ in selector.select(max(left, 0)):
                data = os.read(key.fd, 65536)
                running[key.fd].said += data
                if not data:
                    closed.add(key.fd)
            now = time.monotonic()
            for fd in [fd for fd, one in running.items() if fd in closed or one.deadline <= now]:
                selector.unregister(fd)
                result = running.pop(fd).end(hung=fd not in closed)
                good = good and result.ok
                ended(result)
    return good

"""Entry point in the machine: makes PID 1's mounts, runs the checks that the kernel's command line names, powers off.

On the console it prints lines that start with MARK, a JSON object each: `boot`, `start`, `result` and `end`.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import checks as _registers_all  # noqa: F401 - importing registers
from .check import CHECKS, Check
from .runner import Result, run_checks
from .system import mount

MARK = "@verify "
# Not stalls and lockups: an emulated processor on a busy host has them without a fault of the kernel's.
_TROUBLE = re.compile(r"WARNING: |BUG: (?!soft|workqueue)|Oops|general protection fault|unregister_netdevice: waiting")


def main() -> None:
    """Runs as PID 1 of a machine made for it."""
    _mount_all()
    os.environ.update(PATH="/usr/sbin:/usr/bin:/sbin:/bin", HOME="/root")
    words = dict(word.partition("=")[::2] for word in Path("/proc/cmdline").read_text().split())
    names = [name for name in words.get("verify.only", "").split(",") if name]
    _say("boot", kernel=os.uname().release, machine=os.uname().machine, seconds=_uptime())
    good = run([CHECKS[name] for name in names] if names else list(CHECKS.values()), int(words.get("verify.jobs", "1")))
    _say("end", ok=good, seconds=_uptime())
    os.sync()
    _power_off()


def run(checks: Sequence[Check], jobs: int) -> bool:
    """Runs the checks, says each start and result, and looks at the kernel's log in the end."""
    good = run_checks(checks, jobs, lambda check: _say("start", name=check.name), _tell)
    start = time.monotonic()
    trouble = [line for line in _kernel_log() if _TROUBLE.search(line)]
    detail = "; ".join(trouble[:3])[:600] if trouble else "clean"
    _tell(Result("kernel-log", not trouble, detail, round(time.monotonic() - start, 2)))
    return good and not trouble


def _tell(result: Result) -> None:
    _say("result", **json.loads(result.line()))


def _say(kind: str, **fields: Any) -> None:
    """One line in one write, so that the kernel's own messages stay outside of it."""
    os.write(1, ("\n" + MARK + json.dumps({"kind": kind, **fields}, separators=(",", ":")) + "\n").encode())


def _uptime() -> float:
    return float(Path("/proc/uptime").read_text().split()[0])


def _kernel_log() -> list[str]:
    lines = []
    fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    try:
        while True:
            try:
                lines.append(os.read(fd, 8192).decode(errors="replace").partition(";")[2].splitlines()[0])
            except BrokenPipeError:  # overwritten meanwhile: the next read has the oldest one left
                continue
            except BlockingIOError:
                return lines
    finally:
        os.close(fd)


def _mount_all() -> None:
    for source, target, options in (
        ("proc", "/proc", ""),
        ("sysfs", "/sys", ""),
        ("tmpfs", "/run", "mode=755"),
        ("tmpfs", "/tmp", ""),  # noqa: S108 - the machine's own
        ("devpts", "/dev/pts", ""),
        ("cgroup2", "/sys/fs/cgroup", ""),
        ("bpf", "/sys/fs/bpf", ""),
        ("tracefs", "/sys/kernel/tracing", ""),
    ):
        try:
            Path(target).mkdir(parents=True, exist_ok=True)
            mount(source, target, source, options=options)
        except OSError as error:
            print(f"{target}: {error}", file=sys.stderr, flush=True)
    for name, target in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        Path("/dev", name).symlink_to(f"/proc/self/fd{target}")


def _power_off() -> None:
    import ctypes

    ctypes.CDLL(None).reboot(0x4321FEDC)  # LINUX_REBOOT_CMD_POWER_OFF


if __name__ == "__main__":
    main()

"""What crun is told: OCI runtime configurations with Docker's defaults.

Sources: the OCI runtime specification (config.md, config-linux.md); capabilities, mounts and masked paths as dockerd
gives them to its own runtime.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from lab.runtime.errors import InvalidFailure
from lab.runtime.users import User

_DEFAULT_CAPABILITIES = (
    *("CHOWN", "DAC_OVERRIDE", "FSETID", "FOWNER", "MKNOD", "NET_RAW", "SETGID", "SETUID", "SETFCAP", "SETPCAP"),
    *("NET_BIND_SERVICE", "SYS_CHROOT", "KILL", "AUDIT_WRITE"),
)
# capability.h, in order of their numbers.
_ALL_CAPABILITIES = (
    *("CHOWN", "DAC_OVERRIDE", "DAC_READ_SEARCH", "FOWNER", "FSETID", "KILL", "SETGID", "SETUID", "SETPCAP"),
    *("LINUX_IMMUTABLE", "NET_BIND_SERVICE", "NET_BROADCAST", "NET_ADMIN", "NET_RAW", "IPC_LOCK", "IPC_OWNER"),
    *("SYS_MODULE", "SYS_RAWIO", "SYS_CHROOT", "SYS_PTRACE", "SYS_PACCT", "SYS_ADMIN", "SYS_BOOT", "SYS_NICE"),
    *("SYS_RESOURCE", "SYS_TIME", "SYS_TTY_CONFIG", "MKNOD", "LEASE", "AUDIT_WRITE", "AUDIT_CONTROL", "SETFCAP"),
    *("MAC_OVERRIDE", "MAC_ADMIN", "SYSLOG", "WAKE_ALARM", "BLOCK_SUSPEND", "AUDIT_READ", "PERFMON", "BPF"),
    "CHECKPOINT_RESTORE",
)
_MASKED = (
    *("/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats"),
    *("/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware"),
    "/sys/devices/virtual/powercap",
)
_READ_ONLY = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
_CAUTIOUS = ("nosuid", "noexec", "nodev")


@dataclass(frozen=True)
class ProcessSpec:
    """A process, as the contract describes it."""

    arguments: tuple[str, ...]
    environment: tuple[str, ...] = ()
    working_directory: str = ""
    user: str = ""
    terminal: bool = False
    stdin: bool = False
    stdin_once: bool = False
    privileged: bool = False
    add_capabilities: tuple[str, ...] = ()
    drop_capabilities: tuple[str, ...] = ()
    columns: int = 0
    rows: int = 0


@dataclass(frozen=True)
class MountSpec:
    """A directory or file of the machine in a container; no source: a tmpfs."""

    source: str
    target: str
    read_only: bool


def process_config(spec: ProcessSpec, user: User) -> dict[str, Any]:
    """The configuration's `process`, also for `crun exec`.

    Raises:
        InvalidFailure: a capability has no such name.
    """
    capabilities = [f"CAP_{name}" for name in capability_names(spec)]
    environment = list(spec.environment)
    if not any(entry.startswith("HOME=") for entry in environment):
        environment.append(f"HOME={user.home}")
    config: dict[str, Any] = {
        "terminal": spec.terminal,
        # The group itself too: it must be impossible to get around a file's mode by leaving it (CVE-2022-36109).
        "user": {"uid": user.uid, "gid": user.gid, "additionalGids": list(dict.fromkeys((user.gid, *user.groups)))},
        "args": list(spec.arguments),
        "env": environment,
        "cwd": spec.working_directory or "/",
        "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), capabilities),
        "noNewPrivileges": False,
    }
    if spec.terminal:
        config["consoleSize"] = {"width": spec.columns or 80, "height": spec.rows or 24}
    return config


def capability_names(spec: ProcessSpec) -> list[str]:
    """The capabilities of a process, without CAP_, in order of their numbers; none that this machine does not give."""
    ours = _bounding_set()
    if spec.privileged:
        return [name for number, name in enumerate(_ALL_CAPABILITIES) if ours & 1 << number]
    added, dropped = (
        {_capability(name) for name in names} for names in (spec.add_capabilities, spec.drop_capabilities)
    )
    if "ALL" in added:
        chosen = set(_ALL_CAPABILITIES) - dropped
    elif "ALL" in dropped:
        chosen = added
    else:
        chosen = (set(_DEFAULT_CAPABILITIES) - dropped) | added
    return [name for number, name in enumerate(_ALL_CAPABILITIES) if name in chosen and ours & 1 << number]


@cache
def _bounding_set() -> int:
    """The capabilities that this process could pass on: the machine may be a container itself, or an older kernel."""
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "CapBnd":
            return int(value, 16)
    return (1 << len(_ALL_CAPABILITIES)) - 1


def _capability(name: str) -> str:
    known = name.upper().removeprefix("CAP_")
    if known != "ALL" and known not in _ALL_CAPABILITIES:
        raise InvalidFailure(f'invalid capability: "{name}"')
    return known


def container_config(
    process: dict[str, Any],
    *,
    root: Path,
    writable: bool,
    hostname: str,
    domainname: str,
    files: Mapping[str, Path],
    mounts: Sequence[MountSpec],
    netns: str | None,
    privileged: bool,
    fresh_run: bool,
) -> dict[str, Any]:
    """The configuration of a container.

    Args:
        process: its main process.
        root: its root file system.
        writable: whether it may write to that.
        files: files of ours that are bound over its own, by path in the container.
        netns: the network namespace's path; None: the machine's own.
        privileged: nothing is masked or read-only.
        fresh_run: whether /run is an empty tmpfs, so that what is in the image's does not show.
    """
    all_mounts: list[dict[str, Any]] = [
        _mount("proc", "proc", "/proc", *_CAUTIOUS),
        _mount("tmpfs", "tmpfs", "/dev", "nosuid", "strictatime", "mode=755", "size=65536k"),
        _mount(
            "devpts", "devpts", "/dev/pts", "nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"
        ),
        _mount("sysfs", "sysfs", "/sys", *_CAUTIOUS, *(() if privileged else ("ro",))),
        _mount("mqueue", "mqueue", "/dev/mqueue", *_CAUTIOUS),
        _mount("tmpfs", "shm", "/dev/shm", *_CAUTIOUS, "mode=1777", "size=65536k"),  # noqa: S108 -- a mount
    ]
    if fresh_run:
        all_mounts.append(_mount("tmpfs", "tmpfs", "/run", "nosuid", "nodev", "mode=755"))
    taken = {mount.target for mount in mounts}
    all_mounts += [
        _mount("bind", str(path), target, "rbind", "rprivate") for target, path in files.items() if target not in taken
    ]
    for mount in sorted(mounts, key=lambda mount: mount.target.count("/")):
        access = "ro" if mount.read_only else "rw"
        if mount.source:
            all_mounts.append(_mount("bind", mount.source, mount.target, "rbind", "rprivate", access))
        else:
            all_mounts.append(_mount("tmpfs", "tmpfs", mount.target, *_CAUTIOUS, access))
    namespaces: list[dict[str, str]] = [{"type": kind} for kind in ("pid", "mount", "uts", "ipc")]
    if netns is not None:
        namespaces.append({"type": "network", "path": netns})
    config: dict[str, Any] = {
        "ociVersion": "1.0.2",
        "process": process,
        "root": {"path": str(root), "readonly": not writable},
        "hostname": hostname,
        "mounts": all_mounts,
        "linux": {
            "namespaces": namespaces,
            "maskedPaths": [] if privileged else list(_MASKED),
            "readonlyPaths": [] if privileged else list(_READ_ONLY),
        },
    }
    if domainname:
        config["domainname"] = domainname
    return config


def _mount(kind: str, source: str, target: str, *options: str) -> dict[str, Any]:
    return {"destination": target, "type": kind, "source": source, "options": list(options)}

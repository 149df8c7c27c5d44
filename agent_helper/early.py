"""The daemons' first start, before the agent has imported itself: in a VM without hardware acceleration that takes as
long as their own start, and a second processor has nothing to do meanwhile.

Only where nothing is: in a state directory that no run before has used. Each daemon is started by a process of its own
that waits for what it needs, for a daemon that is refused a connection pauses for a second. The agent's supervision
takes them over (`taploom.supervise`, `adopt`), and starts them the other way when there is nothing to take over.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agent_helper import daemons, links
from agent_helper.schemas import Record, create_database, read_schema
from taploom.arguments import plain_options
from taploom.children import add_nice, die_with

_ADDRESS = r"vsock:(any|[1-9]\d{0,8}):[1-9]\d{0,8}|unix:/.{1,90}"
_RIGHT = {
    "--control": _ADDRESS,
    "--data": _ADDRESS,
    "--state-dir": r".+",
    "--net": r"kernel|dhcp|none",
    "--log-level": r"debug|info|warning|error",
}
PLAIN = _RIGHT.keys()
"""The agent's options that take a value."""
_LONGEST_PATH = 100
_PROBE_INTERVAL = 0.003  # s


@dataclass(frozen=True)
class Early:
    """What has been started: process ids by daemon.

    Attributes:
        lock: a file descriptor that holds the state directory's lock.
        acl_log: the socket that ovn-controller sends its lines to, bound.
    """

    state_dir: Path
    kernel_datapath: bool
    lock: int
    acl_log: socket.socket
    pids: Mapping[str, int]


def start_daemons(argv: Sequence[str]) -> Early | None:
    """Starts the daemons, with the agent's command line; None: nothing was started, and the agent is to do it all."""
    options = plain_options(argv, PLAIN)
    if options is None or not {"--control", "--data", "--state-dir"} <= options.keys() or os.geteuid():
        return None
    if not all(re.fullmatch(_RIGHT[option], value) for option, value in options.items()):
        return None  # what may be wrong is refused before anything is done
    state_dir = Path(options["--state-dir"]).absolute()
    names = ("ovsdb-server", "ovs-vswitchd", "ovn-northd", "ovn-controller")
    programs = {name: _find(name) for name in names}
    schemas = {name: daemons.schema_file(file, programs["ovsdb-server"]) for name, (file, _) in daemons.SCHEMAS.items()}
    if not all(programs.values()) or not all(file.exists() for file in schemas.values()):
        return None
    run_dir = state_dir / "run"
    if run_dir.exists() or len(str(run_dir)) > _LONGEST_PATH - len("/ovn-controller.4194304.ctl"):
        return None
    try:
        state_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = os.open(state_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if run_dir.exists() or links.marked():  # another's, or interfaces that a run before has left
                os.close(lock)
                return None
            kernel_datapath = links.has_kernel_datapath()
            run_dir.mkdir(mode=0o700)
            (state_dir / "log").mkdir(exist_ok=True)
            for name, file in schemas.items():
                records = [_configuration(run_dir, kernel_datapath)] if name == "conf" else []
                create_database(run_dir / f"{name}.db", read_schema(file), *records)
            acl_log = bind_acl_log(run_dir)
        except OSError:
            os.close(lock)
            raise
    except OSError:  # the agent meets it again, and says what is wrong
        return None
    database, mgmt = daemons.database_socket(run_dir), daemons.mgmt_socket(run_dir)
    after = {"ovsdb-server": None, "ovs-vswitchd": database, "ovn-northd": database, "ovn-controller": mgmt}
    nice = {name: daemons.niceness(name, kernel_datapath) for name in names}
    pids = {name: _start(name, programs[name], state_dir, after[name], nice[name]) for name in names}
    return Early(state_dir, kernel_datapath, lock, acl_log, pids)


def bind_acl_log(run_dir: Path) -> socket.socket:
    """The socket that ovn-controller sends its lines to: it looks for it once, when it starts."""
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    bound.bind(str(run_dir / daemons.ACL_LOG))
    return bound


def _find(name: str) -> str:
    for folder in daemons.search_path().split(":"):
        path = f"{folder}/{name}"
        if folder and os.access(path, os.X_OK):
            return path
    return ""


def _configuration(run_dir: Path, kernel_datapath: bool) -> Record:
    """What Stack.ensure_conf would write, as a transaction."""
    root, bridge, port, interface = (_uuid() for _ in range(4))
    return {
        "Open_vSwitch": {
            root: {
                "bridges": ["uuid", bridge],
                "external_ids": _map(daemons.external_ids(run_dir, kernel_datapath)),
                "other_config": _map(daemons.other_config(kernel_datapath)),
            }
        },
        "Bridge": {
            bridge: {
                "name": daemons.BRIDGE,
                "datapath_type": daemons.datapath_type(kernel_datapath),
                "ports": ["uuid", port],
                **{name: _map(v) if isinstance(v, dict) else v for name, v in daemons.BRIDGE_COLUMNS.items()},
            }
        },
        "Port": {port: {"name": daemons.BRIDGE, "interfaces": ["uuid", interface]}},
        "Interface": {interface: {"name": daemons.BRIDGE, "type": "internal"}},
    }


def _map(values: Mapping[str, str]) -> list[object]:
    return ["map", [[key, value] for key, value in values.items()]]


def _uuid() -> str:
    """A random one (RFC 9562, version 4); the module uuid is not imported for it."""
    digits = os.urandom(16).hex()
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-a{digits[17:20]}-{digits[20:]}"


def _start(name: str, program: str, state_dir: Path, after: Path | None, nice: int) -> int:
    """Starts a daemon once somebody listens on the socket `after`; returns its process id."""
    run_dir = state_dir / "run"
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        die_with(parent)
        add_nice(nice)
        os.setsid()
        log = os.open(state_dir / "log" / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for number, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), log, log)):
            os.dup2(descriptor, number)
        os.closerange(3, 64)  # the lock among others, which is not this process's
        while after is not None and not _listens(after):
            time.sleep(_PROBE_INTERVAL)
        argv, environment = daemons.command(name, program, run_dir), daemons.environment(run_dir, name)
        os.execve(program, argv, environment)  # noqa: S606 -- none is wanted
    finally:
        os._exit(127)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as sock, contextlib.suppress(OSError):
        sock.connect(str(path))
        return True
    return False

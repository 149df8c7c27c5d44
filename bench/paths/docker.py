"""Docker Engine's bridge between two containers, and `docker network connect`.

A private dockerd: its own network, mount and PID namespaces, data, state and socket. Nothing of the machine's own
Docker, if it has one, is touched, and when the namespaces' first process dies, so do containerd, the shims and the
containers.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

from bench.paths import IPERF_PORT, PROBE_PORT, How, Link, Path, Process, Published
from bench.processes import children, program, with_descendants
from bench.run import BenchError, Netns, Run, wait_for

# Debian's own, by full path: /usr/local/bin may have another client first.
CLIENT, DAEMON = "/usr/bin/docker", "/usr/sbin/dockerd"
_CGROUPS = FilePath("/sys/fs/cgroup")
_CGROUP_PREFIX = "taploom-bench-"
_BUSYBOX = FilePath("/bin/busybox")


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: FilePath) -> None:
        super().__init__("docker", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class _Engine:
    """The daemon's API and CLI."""

    def __init__(self, run: Run, socket_path: FilePath) -> None:
        self._run = run
        self._path = socket_path
        self._connection = _Connection(socket_path)

    def cli_command(self, *argv: str) -> list[str]:
        return [CLIENT, "-H", f"unix://{self._path}", *argv]

    def cli(self, *argv: str) -> str:
        return self._run.check(*self.cli_command(*argv), env=self.environment()).strip()

    def environment(self) -> dict[str, str]:
        """So that the user's own client configuration stays out of it."""
        return {"DOCKER_CONFIG": str(self._path.parent), "DOCKER_CONTEXT": ""}

    def reconnect(self) -> None:
        """The next request opens a new connection."""
        self._connection.close()

    def api(self, method: str, path: str, body: object = None) -> Any:
        """One request on the connection that stays open; returns the JSON answer or None.

        Raises:
            BenchError: the daemon refused.
        """
        headers = {"Content-Type": "application/json"}
        self._connection.request(method, path, None if body is None else json.dumps(body), headers)
        response = self._connection.getresponse()
        data = response.read()
        if response.status >= 400:
            raise BenchError(f"dockerd: {method} {path}: {response.status} {data.decode(errors='replace').strip()}")
        return json.loads(data) if data.startswith((b"{", b"[")) else None


@dataclass
class _Hot:
    engine: _Engine
    client: Netns
    server: Netns
    address: str
    network: str
    container: str

    def connect(self, how: How) -> tuple[int, int]:
        if how == "CLI":
            start = time.monotonic_ns()
            self.engine.cli("network", "connect", self.network, self.container)
            return start, time.monotonic_ns()
        self.engine.reconnect()  # the daemon has closed what was idle for minutes
        self.engine.api("GET", "/version")
        start = time.monotonic_ns()
        self.engine.api("POST", f"/networks/{self.network}/connect", {"Container": self.container})
        return start, time.monotonic_ns()

    def disconnect(self) -> None:
        self.engine.api("POST", f"/networks/{self.network}/disconnect", {"Container": self.container})


def build(run: Run, mtus: list[int]) -> Path:
    """Starts a daemon, a network per MTU and two containers on all of them, and a network to connect to.

    Raises:
        BenchError: Docker is not installed, or does not start.
    """
    for needed in (CLIENT, DAEMON, str(_BUSYBOX)):
        if not FilePath(needed).exists():
            raise BenchError(f"{needed} is missing: run bench/setup.sh")
    sweep()
    directory = run.directory / "docker"
    directory.mkdir()
    path = directory / "docker.sock"
    cgroup = f"{_CGROUP_PREFIX}{os.getpid()}"
    run.stack.callback(_remove_cgroups, cgroup)
    outer = run.spawn(
        *("unshare", "--net", "--mount", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"),
        *("sh", "-c", 'ip link set lo up; exec "$@"', "sh"),
        # As the first process of its PID namespace, dockerd would have to reap what its shims leave.
        *("tini", "-s", "--", DAEMON, "--host", f"unix://{path}", "--bridge=none"),
        *("--data-root", str(directory / "data"), "--exec-root", str(directory / "run")),
        *("--pidfile", str(directory / "docker.pid"), "--cgroup-parent", f"/{cgroup}"),
        name="dockerd",
    )
    # The daemon's processes must be gone before its directories and control groups are removed.
    run.stack.callback(outer.wait)
    run.stack.callback(outer.kill)

    def answers() -> bool:
        if outer.poll() is not None:
            raise BenchError(f"dockerd ended: {run.log_of(outer)}")
        with contextlib.suppress(OSError, BenchError):
            _Engine(run, path).api("GET", "/_ping")
            return True
        return False

    wait_for(answers, "dockerd answers", timeout=60)
    engine = _Engine(run, path)
    image = f"{run.name}:latest"
    engine.cli("import", image_archive(run, directory), image)
    networks = [f"mtu{mtu}" for mtu in mtus]
    for network, mtu in zip(networks, mtus, strict=True):
        engine.cli("network", "create", "-o", f"com.docker.network.driver.mtu={mtu}", network)
    engine.cli("network", "create", "hot")
    for container in ("client", "server"):
        engine.cli("run", "--detach", "--name", container, "--network", networks[0], image, "sleep", "86400")
        for network in networks[1:]:
            engine.cli("network", "connect", network, container)
    engine.cli("network", "connect", "hot", "server")

    ports = publish(engine.cli, networks[0], image)
    client, server = (_netns(engine, outer.pid, container) for container in ("client", "server"))
    addresses = engine.api("GET", "/containers/server/json")["NetworkSettings"]["Networks"]
    version = engine.api("GET", "/version")
    return Path(
        "docker",
        [
            Link("docker", mtu, client, server, addresses[network]["IPAddress"])
            for network, mtu in zip(networks, mtus, strict=True)
        ],
        {"Docker Engine": version["Version"]},
        _Hot(engine, client, server, addresses["hot"]["IPAddress"], "hot", "client"),
        Published(Netns(f"/proc/{children(outer.pid)[0]}/ns/net"), _netns(engine, outer.pid, "published"), ports),
        lambda: _processes(outer.pid),
    )


def publish(cli: Callable[..., str], network: str, image: str) -> dict[str, str]:
    """Runs a container with its probes' ports published on the loopback; the host's ports by the container's."""
    wanted = [option for port in (PROBE_PORT, IPERF_PORT) for option in ("--publish", f"127.0.0.1::{port}")]
    cli("run", "--detach", "--name", "published", "--network", network, *wanted, image, "sleep", "86400")
    return {port: cli("port", "published", port).rpartition(":")[2].strip() for port in (PROBE_PORT, IPERF_PORT)}


def image_archive(run: Run, directory: FilePath) -> str:
    """An image of busybox alone, as `docker import` takes it; its path."""
    root = directory / "image"
    (root / "bin").mkdir(parents=True)
    shutil.copy(_BUSYBOX, root / "bin/busybox")
    (root / "bin/sleep").symlink_to("busybox")
    archive = directory / "image.tar"
    run.check("tar", "-C", str(root), "-cf", str(archive), ".")
    return str(archive)


def _netns(engine: _Engine, outer: int, container: str) -> Netns:
    """A container's network namespace, seen from outside the daemon's PID namespace."""
    inner = engine.api("GET", f"/containers/{container}/json")["State"]["Pid"]
    first = children(outer)[0]
    return Netns(f"/proc/{first}/root/proc/{inner}/ns/net")


def _processes(outer: int) -> list[Process]:
    """The daemon's processes and all below, without the containers' own."""
    found = [Process(program(pid), pid) for pid in with_descendants(children(outer))]
    return sorted(
        (process for process in found if process.label not in ("", "tini", "sleep")), key=lambda process: process.label
    )


def sweep() -> None:
    """Removes the control groups of benchmarks that were killed before they could."""
    for pattern in (f"{_CGROUP_PREFIX}*", f"*/{_CGROUP_PREFIX}*"):
        for path in _CGROUPS.glob(pattern):
            pid = path.name.removeprefix(_CGROUP_PREFIX)
            if pid.isdigit() and not FilePath(f"/proc/{pid}").exists():
                _remove_cgroups(path.name)


def _remove_cgroups(name: str) -> None:
    """Removes the control group in every hierarchy, children first; cgroups(7)."""
    for top in [_CGROUPS / name, *_CGROUPS.glob(f"*/{name}")]:
        for directory, _, _ in os.walk(top, topdown=False):
            # Processes that have been killed leave their group a moment later.
            with contextlib.suppress(BenchError):
                wait_for(lambda path=FilePath(directory): _rmdir(path), directory, timeout=5)  # type: ignore[misc]


def _rmdir(path: FilePath) -> bool:
    try:
        path.rmdir()
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True

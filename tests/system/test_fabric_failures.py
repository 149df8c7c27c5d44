"""kill -9 of everything, one at a time, under a running ping: each comes back by itself, and so does the ping."""

from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fabric import Fabric, fabric, until

pytestmark = pytest.mark.system

# Longest wait for a ping to be answered again. Not a promise about speed: bench/ measures that.
RECOVERY = 60
OUTAGES: list[tuple[str, float, str]] = []


@pytest.fixture(scope="module")
def lab() -> Iterator[Fabric]:
    with fabric("web", "db") as lab:
        lab.run("network", "create", "app", "--ipv6")
        lab.run("network", "connect", "app", "web", "--alias", "front")
        lab.run("network", "connect", "app", "db", "--alias", "postgres")
        yield lab


@pytest.fixture(scope="module", autouse=True)
def table(capfd_disabled: Any) -> Iterator[None]:
    yield
    with capfd_disabled():
        print("\n\n  killed (kill -9)    outage of a 10 ms ping    TCP connection")
        for name, seconds, connection in OUTAGES:
            print(f"  {name:<18}  {seconds:>18.2f} s      {connection}")


@pytest.fixture(scope="module")
def capfd_disabled(request: pytest.FixtureRequest) -> Any:
    return request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled


def snapshot(lab: Fabric) -> Any:
    """What must not change: networks and guests with ids, addresses, aliases and MACs."""
    return [
        _stable(lab.json("network", "inspect", "app")),
        [_stable(guest) for guest in lab.json("guest", "ls")],
    ]


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _stable(v) for k, v in value.items() if k not in ("link_up", "linkUp", "connected", "problem")}
    if isinstance(value, list):
        return [_stable(item) for item in value]
    return value


class SteadyPing:
    """A ping every 10 ms from `web` to `db` by address; it knows its longest gap between replies."""

    def __init__(self, lab: Fabric, log: Path) -> None:
        self._log = log
        with log.open("w") as output:
            self._process = lab.start_in_guest(
                "web", "ping", "-n", "-D", "-i", "0.01", lab.address("db", "app"), stdout=output
            )
        until(self.replies, "the first reply")

    def replies(self) -> list[float]:
        return [float(t) for t in re.findall(r"^\[(\d+\.\d+)\] \d+ bytes", self._log.read_text(), re.MULTILINE)]

    def stop(self) -> None:
        self._process.send_signal(signal.SIGINT)
        self._process.wait(10)

    def longest_gap(self) -> float:
        replies = self.replies()
        return max((after - before for before, after in itertools.pairwise(replies)), default=0.0)


class Echo:
    """A TCP connection from `web` to a server in `db` that stays open through a failure."""

    SERVER = (
        "import socket\n"
        "s = socket.create_server(('0.0.0.0', 7))\n"
        "print('ready', flush=True)\n"
        "c, _ = s.accept()\n"
        "while data := c.recv(4096): c.sendall(data)\n"
    )
    CLIENT = (
        "import socket, sys\n"
        "c = socket.create_connection((sys.argv[1], 7), 30)\n"
        "c.settimeout(60)\n"
        "for line in sys.stdin:\n"
        "    c.sendall(line.encode())\n"
        "    print(c.recv(4096).decode().strip(), flush=True)\n"
    )

    def __init__(self, lab: Fabric) -> None:
        self._server = lab.start_in_guest("db", "python3", "-c", self.SERVER)
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"
        self._client = lab.start_in_guest(
            "web", "python3", "-c", self.CLIENT, lab.address("db", "app"), stdin=subprocess.PIPE
        )
        assert self.says("before")

    def says(self, word: str) -> bool:
        assert self._client.stdin is not None
        assert self._client.stdout is not None
        try:
            self._client.stdin.write(word + "\n")
            self._client.stdin.flush()
        except BrokenPipeError:
            return False
        return self._client.stdout.readline() == word + "\n"

    def close(self) -> None:
        for process in (self._client, self._server):
            process.kill()
            process.wait()


def pid_of(lab: Fabric, name: str) -> int:
    processes = lab.processes()
    if name in processes:
        return int(processes[name]["pid"])
    return lab.daemons()[name[:15]][0]


@pytest.mark.parametrize(
    "victim",
    [
        "guest/web",
        "helper",
        "bridge",
        "ovs-vswitchd",
        "ovn-controller",
        "ovn-northd",
        "ovsdb-server",
        "dnsmasq",
    ],
)
def test_kill(lab: Fabric, victim: str, tmp_path: Path) -> None:
    lab.until_converged()
    before = snapshot(lab)
    pid = pid_of(lab, victim)
    echo = Echo(lab)
    ping = SteadyPing(lab, tmp_path / "ping")
    try:
        fd = os.pidfd_open(pid)
        signal.pidfd_send_signal(fd, signal.SIGKILL)
        until(lambda: not _alive(pid), f"{victim} ends")
        os.close(fd)
        killed = ping.replies()[-1]
        until(lambda: _pid_now(lab, victim) not in (None, pid), f"{victim} is started again\n{lab.logs()}")
        lab.until_converged()
        # Replies go on: well after the kill, and after everything has converged.
        count = len(ping.replies())
        until(lambda: len(ping.replies()) > count + 20, f"the ping recovers from {victim}\n{lab.logs()}", RECOVERY)
        assert ping.replies()[-1] > killed
        survived = echo.says("after")
        assert survived, f"the TCP connection did not survive {victim}"
        assert snapshot(lab) == before
        for name in ("db", "postgres", "db.app"):
            lab.until_answers("web", name, "-4")
            lab.until_answers("web", name, "-6")
    finally:
        ping.stop()
        echo.close()
    OUTAGES.append((victim, ping.longest_gap(), "survived" if survived else "lost"))


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _pid_now(lab: Fabric, victim: str) -> int | None:
    try:
        return pid_of(lab, victim) or None
    except (KeyError, IndexError):
        return None

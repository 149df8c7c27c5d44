"""Network namespaces that a check makes, and the commands that are run in them.

Sockets stay in the namespace in which they were made, and a thread can be moved between namespaces: so one process
speaks with itself through every device under test, without a process per end.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import struct
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from .check import CheckError, run, step
from .system import CLONE_NEWNET, MS_BIND, mount, setns, unshare

Lines = Sequence[str]
_SIOCSIFFLAGS = 0x8914
_IFF_UP = 1


class Namespace:
    """A network namespace with `lo` up, known to ip(8) by its name.

    As a context manager it moves the calling thread into the namespace: sockets made and processes started meanwhile
    belong to it.
    """

    def __init__(self, name: str) -> None:
        step(f"network namespace {name}")
        self.name = name
        self.path = Path("/run/netns") / name
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.touch()
        failures: list[OSError] = []
        thread = threading.Thread(target=self._make, args=(failures,))
        thread.start()
        thread.join()
        if failures:
            raise CheckError(f"network namespace {name}: {failures[0]}")
        self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        self._before: list[int] = []

    def _make(self, failures: list[OSError]) -> None:
        try:
            unshare(CLONE_NEWNET)
            mount("/proc/thread-self/ns/net", str(self.path), flags=MS_BIND)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                fcntl.ioctl(sock, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _IFF_UP))
        except OSError as error:
            failures.append(error)

    def __enter__(self) -> Namespace:
        self._before.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC))
        setns(self._fd, CLONE_NEWNET)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        fd = self._before.pop()
        setns(fd, CLONE_NEWNET)
        os.close(fd)

    def run(self, *command: str, stdin: str | None = None, timeout: float = 90) -> str:
        """Runs a command in the namespace; see `check.run`."""
        with self:
            return run(*command, stdin=stdin, timeout=timeout)

    def line(self, text: str) -> str:
        """Runs a command whose words have no spaces in them."""
        return self.run(*text.split())

    def ip(self, *lines: str) -> None:
        """Runs lines of ip(8) in the namespace, by one process."""
        if len(lines) == 1:
            self.line(f"ip {lines[0]}")
        else:
            try:
                self.run("ip", "-batch", "-", stdin="\n".join(lines))
            except CheckError as error:
                found = re.search(r" Command failed -:(\d+)", str(error))
                if found is None:
                    raise
                reason = str(error).removeprefix("ip -batch -: ").replace(found[0], "")
                raise CheckError(f"ip {lines[int(found[1]) - 1]}: {reason}") from None

    def tc(self, *lines: str) -> None:
        """Runs lines of tc(8) in the namespace."""
        for line in lines:
            self.line(f"tc {line}")

    def sysctl(self, name: str, value: object) -> None:
        """Sets a sysctl of the namespace, named with slashes."""
        with self:
            try:
                (Path("/proc/sys") / name).write_text(f"{value}\n")
            except FileNotFoundError:
                raise CheckError(f"the kernel has no sysctl {name}") from None

    def ip_json(self, *command: str) -> list[dict[str, Any]]:
        """The answer of `ip -json COMMAND`."""
        return list(json.loads(self.run("ip", "-json", *command) or "[]"))

    def packets(self, device: str) -> tuple[int, int]:
        """How many packets a device has received and sent."""
        stats = self.ip_json("-statistics", "link", "show", "dev", device)[0]["stats64"]
        return int(stats["rx"]["packets"]), int(stats["tx"]["packets"])

    def mac(self, device: str) -> str:
        """A device's MAC address."""
        return str(self.ip_json("link", "show", "dev", device)[0]["address"])


def veth(
    a: Namespace, b: Namespace, device: str = "eth0", other: str = "", *, then_a: Lines = (), then_b: Lines = ()
) -> None:
    """Connects two namespaces by a veth pair, both ends up; then more lines of ip(8) are run in each.

    Few processes: under emulation each takes a tenth of a second.
    """
    other = other or device
    a.ip(f"link add {device} type veth peer name {other} netns {b.name}", f"link set {device} up", *then_a)
    b.ip(f"link set {other} up", *then_b)


def linked(
    addresses: tuple[str, str] = ("10.1.0.1/24", "10.1.0.2/24"), device: str = "eth0"
) -> tuple[Namespace, Namespace]:
    """Two namespaces, a and b, with a veth pair and an address on each end."""
    a, b = Namespace("a"), Namespace("b")
    lines = [[f"address add {address} dev {device}"] for address in addresses]
    veth(a, b, device, then_a=lines[0], then_b=lines[1])
    return a, b


def routed() -> tuple[Namespace, Namespace, Namespace]:
    """A client (10.1.0.2) and a server (10.2.0.2) with a router (.1 on both sides, devices left and right) between."""
    client, router, server = Namespace("client"), Namespace("router"), Namespace("server")
    for number, (end, device) in enumerate(((client, "left"), (server, "right")), 1):
        veth(
            router,
            end,
            device,
            "eth0",
            then_a=[f"address add 10.{number}.0.1/24 dev {device}"],
            then_b=[f"address add 10.{number}.0.2/24 dev eth0", f"route add default via 10.{number}.0.1"],
        )
    router.sysctl("net/ipv4/ip_forward", 1)
    return client, router, server

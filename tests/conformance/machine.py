"""A machine of its own for each side: a network and a mount namespace with a NIC to an internet of its own.

Bridges, packet filters, published ports and resolver settings of a side are in there. Nothing of the machine that
runs the tests is touched, and two runs at once do not meet.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

HOST_ADDRESS, HOST_ADDRESS6 = "198.51.100.2", "2001:db8:51::2"
INTERNET_ADDRESS, INTERNET_ADDRESS6 = "198.51.100.1", "2001:db8:51::1"

# What a machine's first process does: it holds the namespaces.
_HOLDER = """
set -e
ip link set lo up
mount --bind "$1/resolv.conf" /etc/resolv.conf
touch "$1/held"
exec sleep infinity
"""


def until(condition: Callable[[], T], what: str, timeout: float = 60, details: Callable[[], str] = lambda: "") -> T:
    """Waits for a condition and returns its first true value; fails with `what` and details after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"still waiting after {timeout:.0f} s: {what} {details()}")
        time.sleep(0.02)


class Machine:
    """A network and a mount namespace, and a namespace beside it that plays the internet."""

    def __init__(self) -> None:
        self.name = "tlt" + secrets.token_hex(4)
        self.directory = Path(tempfile.mkdtemp(prefix=f"{self.name}."))
        self.stack = ExitStack()
        self.stack.callback(shutil.rmtree, self.directory, ignore_errors=True)
        try:
            self._start()
        except BaseException:
            self.stack.close()
            raise

    def _start(self) -> None:
        (self.directory / "resolv.conf").write_text(f"nameserver {INTERNET_ADDRESS}\nsearch example.test\n")
        self.holder = self._hold("--mount", "--net")
        self.internet = self._hold("--mount", "--net", directory=self.directory / "internet")
        # What a side does while its bridges still look for others with their IPv6 addresses (DAD, RFC 4862), for a
        # second or two, is chance: another source address, no answer from a gateway. Here nobody else has them.
        for setting in ("accept_dad", "dad_transmits"):
            for scope in ("all", "default"):
                self.check("sh", "-c", f"echo 0 >/proc/sys/net/ipv6/conf/{scope}/{setting}")
        outside = ["ip", "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", str(self.internet.pid)]
        self.check(*outside)
        for enter, addresses in (
            (self.inside, (f"{HOST_ADDRESS}/24", f"{HOST_ADDRESS6}/64")),
            (self.on_the_internet, (f"{INTERNET_ADDRESS}/24", f"{INTERNET_ADDRESS6}/64")),
        ):
            for address in addresses:
                check(*enter("ip", "address", "add", address, "dev", "eth0", *(["nodad"] if ":" in address else [])))
            check(*enter("ip", "link", "set", "eth0", "up"))
        self.check("ip", "route", "add", "default", "via", INTERNET_ADDRESS)
        self.check("ip", "-6", "route", "add", "default", "via", INTERNET_ADDRESS6)
        self.serve_names(self.on_the_internet)

    def serve_names(self, enter: Callable[..., list[str]]) -> None:
        """The internet's DNS server: a few names, and no others."""
        records = [f"--host-record=www.internet.test,{INTERNET_ADDRESS},{INTERNET_ADDRESS6}"]
        records += ["--host-record=four.internet.test,192.0.2.4", "--cname=alias.internet.test,four.internet.test"]
        records += [
            "--txt-record=txt.internet.test,some text",
            "--ptr-record=4.2.0.192.in-addr.arpa,four.internet.test",
        ]
        self.spawn(
            *enter("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-hosts", "--bind-dynamic"),
            *("--no-resolv", "--user=root", "--pid-file", "--cache-size=0", "--address=/#/", *records),
            log="dnsmasq.log",
        )

    def _hold(self, *namespaces: str, directory: Path | None = None) -> subprocess.Popen[bytes]:
        directory = directory or self.directory
        directory.mkdir(exist_ok=True)
        if not (directory / "resolv.conf").exists():
            (directory / "resolv.conf").write_text("")
        holder = subprocess.Popen(
            ["unshare", *namespaces, "--propagation", "private", "sh", "-c", _HOLDER, "sh", str(directory)],
            stdin=subprocess.DEVNULL,
        )
        self.stack.callback(stop, holder)
        until(lambda: (directory / "held").exists() or holder.poll() is not None, "namespaces")
        assert holder.poll() is None, "cannot make a network and a mount namespace: are you root?"
        return holder

    def inside(self, *command: str) -> list[str]:
        """The command, run on the machine."""
        return ["nsenter", f"--target={self.holder.pid}", "--mount", "--net", "--", *command]

    def on_the_internet(self, *command: str) -> list[str]:
        """The command, run on the internet."""
        return ["nsenter", f"--target={self.internet.pid}", "--mount", "--net", "--", *command]

    def check(self, *command: str) -> str:
        """Runs a command on the machine that must succeed."""
        return check(*self.inside(*command))

    def spawn(self, *command: str, log: str, **options: Any) -> subprocess.Popen[bytes]:
        """Starts a process; it is killed at the end."""
        with (self.directory / log).open("ab") as output:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, **options
            )
        self.stack.callback(stop, process)
        return process

    def close(self) -> None:
        """Ends everything and removes it."""
        self.stack.close()


def stop(process: subprocess.Popen[bytes]) -> None:
    """Kills a process and waits for it."""
    process.kill()
    process.wait()


def check(*command: str, environment: dict[str, str] | None = None, timeout: float = 60) -> str:
    """Runs a command that must succeed; returns its standard output."""
    result = run(command, environment=environment, timeout=timeout)
    assert result.returncode == 0, f"{' '.join(command)}: {result.stdout}{result.stderr}"
    return result.stdout


def run(
    command: Sequence[str], *, environment: dict[str, str] | None = None, input: str = "", timeout: float = 60
) -> subprocess.CompletedProcess[str]:
    """Runs a command, whatever it exits with; 124 when it takes longer than `timeout` seconds, as timeout(1) does."""
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        output, error = process.communicate(input, timeout=timeout)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        output, error = process.communicate()
        return subprocess.CompletedProcess(command, 124, output, f"{error}\n(no end within {timeout:.0f} s)")
    return subprocess.CompletedProcess(command, process.returncode, output, error)

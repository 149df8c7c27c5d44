"""What tests of the guest agent share: the agent as a process in a network namespace of its own, and a client."""

from __future__ import annotations

import contextlib
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import trio

from taploom.address import connect, parse_address
from taploom.contracts.taploom.guest.v1 import GetInfoRequest, Interface
from taploom.contracts.taploom.guest.v1.rpc import GuestServiceClient
from taploom.rpc import Channel, RpcError, open_channel

TIMEOUT = 30.0
"""Seconds after which a test that waits for a condition has failed; generous, machines are shared."""


@contextlib.contextmanager
def namespace() -> Iterator[str]:
    """A network namespace with a name of its own; its name."""
    name = f"tlt{secrets.token_hex(4)}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)


def run_in(netns: str, *command: str, check: bool = True) -> str:
    """Runs a command in the namespace; what it printed."""
    done = subprocess.run(["ip", "netns", "exec", netns, *command], capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


class Guest:
    """A guest agent that can be started, stopped and killed; its interfaces are in ``netns``."""

    def __init__(self, netns: str, directory: Path, arguments: tuple[str, ...] = ()) -> None:
        self.netns = netns
        self.directory = directory
        self.arguments = arguments
        self.resolv_conf = directory / "resolv.conf"
        self.hosts = directory / "hosts"
        self.log = directory / "log"
        self.control = parse_address(f"unix:{directory}/control.sock")
        self.data = parse_address(f"unix:{directory}/data.sock")
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Starts the agent and waits until it answers."""
        command = ["ip", "netns", "exec", self.netns, sys.executable, "-m", "agent_guest"]
        command += ["--control", str(self.control), "--data", str(self.data)]
        command += ["--resolv-conf", str(self.resolv_conf), "--state-dir", str(self.directory / "run")]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen([*command, *self.arguments], stdout=log, stderr=log)
        with trio.fail_after(TIMEOUT):
            while True:
                try:
                    async with self.client() as client:
                        await client.get_info(GetInfoRequest())
                        return
                except (OSError, RpcError):
                    assert self.process.poll() is None, self.log.read_text()
                    await trio.sleep(0.01)

    @contextlib.asynccontextmanager
    async def channel(self) -> AsyncIterator[Channel]:
        stream = await connect(self.control)
        async with open_channel(stream) as channel:
            yield channel

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[GuestServiceClient]:
        async with self.channel() as channel:
            yield GuestServiceClient(channel)

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Sends the signal and waits for the agent's end; its exit status."""
        assert self.process is not None
        self.process.send_signal(number)
        with trio.fail_after(TIMEOUT):
            while self.process.poll() is None:
                await trio.sleep(0.01)
        return self.process.returncode

    def ip(self, *arguments: str) -> str:
        return run_in(self.netns, "ip", *arguments)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


@contextlib.asynccontextmanager
async def running_guest(directory: Path, *arguments: str) -> AsyncIterator[Guest]:
    """A guest agent that answers, in a fresh namespace; both are gone afterwards."""
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)
    with namespace() as netns:
        guest = Guest(netns, directory, arguments)
        guest.resolv_conf.write_text("nameserver 192.0.2.53\n")
        try:
            await guest.start()
            yield guest
        finally:
            guest.kill()


def interface(number: int = 0, **changes: object) -> Interface:
    """A description of interface eth<number> on the network 172.<18 + number>.0.0/16."""
    values: dict[str, object] = {
        "endpoint_id": f"ep{number}",
        "name": f"eth{number}",
        "mac_address": f"02:42:ac:{18 + number:02x}:00:02",
        "addresses": [f"172.{18 + number}.0.2/16"],
        "gateways": [f"172.{18 + number}.0.1"],
        "mtu": 1500,
        "network_name": f"net{number}",
        "dns_servers": [f"169.254.64.{number + 1}"],
        **changes,
    }
    return Interface(**values)  # type: ignore[arg-type]


async def until(condition: object, what: str) -> None:
    """Waits until ``condition()`` is true."""
    assert callable(condition)
    with trio.move_on_after(TIMEOUT):
        while not condition():
            await trio.sleep(0.01)
        return
    raise AssertionError(f"waited in vain until {what}")


@pytest.fixture
async def guest(tmp_path: Path) -> AsyncIterator[Guest]:
    async with running_guest(tmp_path / "g") as found:
        yield found


async def test_the_agent_starts_answers_and_stops(guest: Guest) -> None:
    assert await guest.stop() == 0
    assert "SIGTERM" in guest.log.read_text()

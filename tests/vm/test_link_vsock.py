"""The data plane's relay between two VMs over real virtio-vsock devices, with a small program in them as the ends."""

from __future__ import annotations

import array
import contextlib
import fcntl
import itertools
import os
import shutil
import signal
import socket
import termios
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import trio
from portal import Portal

from bench.vsockpeer import PORT, Operation, Result, compile_static, open_stream, result
from images.common import cpio
from lab.vm.machine import Machine, RunningMachine, running
from taploom.address import Address, close_stream, parse_address, write_limit
from taploom.link.dataplane import Dataplane, open_dataplane

MIB = 1 << 20
WRITE = 28 * 1024
SECONDS = 120.0

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Peer:
    """A VM in which vsockpeer is the first process."""

    vm: RunningMachine

    @property
    def address(self) -> Address:
        return parse_address(self.vm.machine.address(PORT))


@dataclass(frozen=True)
class Way:
    """What one end sends to the other: bytes, in writes of that size, read with that pause between."""

    total: int = 0
    write: int = WRITE
    pause: float = 0


@pytest.fixture(scope="module")
def initrd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("vsockpeer")
    (base / "root").mkdir()
    compile_static(base / "root" / "init")
    cpio.write_newc(base / "root", base / "initrd", devices=cpio.CONSOLE)
    return base / "initrd"


@pytest.fixture(scope="module")
def peers(
    kernel: Path, initrd: Path, portal: Portal, machine_directory: Callable[[str], Path]
) -> Iterator[tuple[Peer, Peer]]:
    """Two VMs; what a test breaks of them it repairs."""
    machines = [Machine(name, machine_directory(name), kernel, initrd) for name in ("peer-a", "peer-b")]
    with portal.opened(running(machines[0])) as first, portal.opened(running(machines[1])) as second:
        for vm in (first, second):
            portal.call(vm.wait_console, "vsockpeer: listening")
            portal.call(_answers, Peer(vm))
        yield Peer(first), Peer(second)
    for machine in machines:
        shutil.rmtree(machine.directory)


async def _answers(peer: Peer) -> None:
    await (await peer.vm.wait_connect(PORT)).aclose()


async def exchange(plane: Dataplane, first: Peer, second: Peer, there: Way, back: Way) -> tuple[Result, Result]:
    """Joins a stream to each with a relay; returns what both saw when they are done."""
    number = next(_numbers)
    streams = [
        await open_stream(
            peer.address,
            Operation.STREAM,
            number,
            size=out.write,
            send=out.total,
            pause=into.pause,
            receive=into.total,
        )
        for peer, out, into in ((first, there, back), (second, back, there))
    ]
    downs: list[str] = []
    plane.attach_relay(str(number), streams[0], streams[1], downs.append)
    try:
        return await result(first.address, number), await result(second.address, number)
    finally:
        await plane.detach(str(number))


def check(results: tuple[Result, Result], there: Way, back: Way) -> None:
    for seen, out, into in ((results[0], there, back), (results[1], back, there)):
        assert seen.error == 0
        assert (seen.sent, seen.received, seen.wrong) == (out.total, into.total, None)


WAYS = {
    "bulk": (Way(64 * MIB), Way()),
    "bulk in both directions": (Way(16 * MIB), Way(16 * MIB)),
    "bulk against small writes": (Way(16 * MIB), Way(MIB, write=66)),
    "small writes in both directions": (Way(MIB, write=100), Way(MIB, write=100)),
    "a slow reader": (Way(16 * MIB, pause=0.002), Way()),
    "a slow reader of small writes": (Way(2 * MIB, write=66, pause=0.005), Way()),
}


@pytest.mark.parametrize("ways", WAYS.values(), ids=WAYS.keys())
def test_every_byte_arrives(peers: tuple[Peer, Peer], portal: Portal, ways: tuple[Way, Way]) -> None:
    async def run() -> None:
        with trio.fail_after(SECONDS):
            async with open_dataplane() as plane:
                check(await exchange(plane, *peers, *ways), *ways)

    portal.call(run)


def test_links_beside_each_other(peers: tuple[Peer, Peer], portal: Portal) -> None:
    """One of them is slow, and holds up no other."""
    fast, slow = (Way(4 * MIB), Way(4 * MIB)), (Way(8 * MIB, pause=0.05), Way(8 * MIB, pause=0.05))
    ended: list[str] = []

    async def one(plane: Dataplane, name: str, ways: tuple[Way, Way]) -> None:
        check(await exchange(plane, *peers, *ways), *ways)
        ended.append(name)

    async def run() -> None:
        with trio.fail_after(SECONDS):
            async with open_dataplane() as plane, trio.open_nursery() as nursery:
                nursery.start_soon(one, plane, "slow", slow)
                for _ in range(6):
                    nursery.start_soon(one, plane, "fast", fast)

    portal.call(run)
    assert sorted(ended) == ["fast"] * 6 + ["slow"]


def test_why_writes_are_short(peers: tuple[Peer, Peer], portal: Portal) -> None:
    """A write that the guest's kernel makes a packet of several fragments of is lost in the device, and its stream
    stalls. The data plane's own writes never are (write_limit).
    """

    async def run() -> None:
        with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as vsock:
            assert write_limit(vsock) == WRITE
        async with open_dataplane() as plane:
            with trio.move_on_after(SECONDS) as scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(exchange, plane, *peers, Way(MIB, write=64 * 1024), Way())
                    for _ in range(3):
                        ways = (Way(8 * MIB), Way())
                        check(await exchange(plane, *peers, *ways), *ways)
                    scope.cancel()
        assert scope.cancelled_caught, "writes of 64 KiB pass: the device has learnt it, and write_limit can grow"

    portal.call(run)


@contextlib.contextmanager
def paused(peer: Peer) -> Iterator[None]:
    """The VM does nothing. QEMU's own `stop` would stop the device too."""
    pid = peer.vm.qemu_pid
    os.kill(pid, signal.SIGSTOP)
    try:
        threads = list(Path(f"/proc/{pid}/task").glob("*/stat"))
        while any(stat.read_text().rpartition(")")[2].split()[0] != "T" for stat in threads):
            time.sleep(0.01)
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def unread_by_peer(sock: socket.socket) -> int:
    """TIOCOUTQ (unix(7) calls it SIOCOUTQ): bytes that were sent and not yet read."""
    queued = array.array("i", [0])
    fcntl.ioctl(sock, termios.TIOCOUTQ, queued)
    return queued[0]


def test_requests_that_nobody_waits_for_any_more(peers: tuple[Peer, Peer], portal: Portal) -> None:
    """A VM that is paused answers late; until then nobody closes the sockets."""
    peer = peers[0]

    async def run() -> None:
        with trio.fail_after(SECONDS):
            with paused(peer):
                for _ in range(5):
                    with pytest.raises(TimeoutError):
                        await open_stream(peer.address, Operation.ECHO, 0, timeout=0.2)
            stream = await open_stream(peer.address, Operation.ECHO, 0)
            await stream.send_all(b"there?")
            assert await stream.receive_some(100) == b"there?"
            await stream.aclose()

    portal.call(run)


def test_what_becomes_of_a_device_whose_request_is_abandoned(peers: tuple[Peer, Peer], portal: Portal) -> None:
    """It is deaf from then on, and a new one makes that good."""
    peer = peers[0]

    async def run() -> None:
        with trio.fail_after(SECONDS):
            with paused(peer), socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as raw:
                raw.connect(str(peer.vm.machine.vsock_socket))
                raw.sendall(b"CONNECT %d\n" % PORT)
                while unread_by_peer(raw):
                    await trio.sleep(0.01)
            with pytest.raises((TimeoutError, ConnectionError)):
                await open_stream(peer.address, Operation.ECHO, 0, timeout=2)
            await peer.vm.restart_vsock()
            await (await peer.vm.wait_connect(PORT)).aclose()

    portal.call(run)


def test_a_stream_that_the_host_closes_ends_in_the_guest(peers: tuple[Peer, Peer], portal: Portal) -> None:
    """Also when there is something in it that the host has not read."""

    async def run() -> None:
        with trio.fail_after(SECONDS):
            for _ in range(10):
                number = next(_numbers)
                stream = await open_stream(
                    peers[0].address, Operation.STREAM, number, size=WRITE, send=64 * MIB, receive=64 * MIB
                )
                await trio.lowlevel.wait_readable(stream.socket.fileno())
                plain = socket.socket(fileno=stream.socket.detach())
                plain.setblocking(False)
                close_stream(plain)
                assert (await result(peers[0].address, number)).error != 0

    portal.call(run)

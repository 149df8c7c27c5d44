"""The whole data link with real TAP devices: two namespaces, a pump in each, a relay between them."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import random
import secrets
import shutil
import socket
import struct
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taploom.address import UnixAddress, connect, open_listener
from taploom.contracts.taploom.link.v1 import LinkFeature, LinkHello, LinkRefusal, LinkReply
from taploom.link import (
    Dataplane,
    LinkError,
    LinkServer,
    LinkStatus,
    Tap,
    TapError,
    UnknownEndpointError,
    dial_link,
    new_secret,
    open_dataplane,
    open_relay,
    probe_features,
)
from taploom.link.handshake import encode_message, receive_message
from taploom.link.pump import Pump

pytestmark = pytest.mark.system

VNET, TSO, USO = LinkFeature.VNET_HDR, LinkFeature.TSO, LinkFeature.USO
ALL = frozenset({VNET, TSO, USO})
CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def run(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}: {result.stderr}"
    return result.stdout


@contextmanager
def netns() -> Iterator[str]:
    name = f"tlt{secrets.token_hex(5)}"
    run("ip", "netns", "add", name)
    try:
        run("ip", "-n", name, "link", "set", "lo", "up")
        yield name
    finally:
        run("ip", "netns", "del", name)


@contextmanager
def inside(name: str) -> Iterator[None]:
    """Devices and sockets made within the block belong to the namespace; there is no await in it."""

    def enter(fd: int) -> None:
        if _libc.setns(fd, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")

    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    wanted = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        enter(wanted)
        try:
            yield
        finally:
            enter(before)
    finally:
        os.close(before)
        os.close(wanted)


def link_flags(ns: str, name: str) -> list[str]:
    flags: list[str] = json.loads(run("ip", "-n", ns, "-j", "link", "show", name))[0]["flags"]
    return flags


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.002)


class Side:
    """A guest or the helper: a namespace with a TAP and the listener for its link."""

    def __init__(self, ns: str, tap: Tap, plane: Dataplane, path: Path, features: frozenset[LinkFeature]) -> None:
        self.ns = ns
        self.tap = tap
        self.plane = plane
        self.address = UnixAddress(str(path))
        self.events: list[str] = []
        self.server = LinkServer(
            plane,
            features=features,
            on_up=lambda endpoint, _features: self.events.append(f"{endpoint} up"),
            on_down=lambda endpoint, reason: self.events.append(f"{endpoint} down: {reason}"),
            hello_timeout=1,
            max_handshakes=4,
        )
        self.server.add("e", tap)

    @property
    def status(self) -> LinkStatus:
        return self.server.status("e")

    def secret(self, endpoint: str = "e") -> bytes:
        secret = new_secret()
        self.server.authorize(endpoint, secret)
        return secret

    async def dial(self, *features: LinkFeature) -> trio.SocketStream:
        ups = self.events.count("e up")
        stream, granted = await dial_link(self.address, endpoint_id="e", secret=self.secret(), features=features)
        assert granted == set(features)
        await until(lambda: self.events.count("e up") > ups)
        return stream

    def carrier(self) -> bool:
        return "LOWER_UP" in link_flags(self.ns, self.tap.name)


@asynccontextmanager
async def open_side(directory: Path, number: int, features: frozenset[LinkFeature]) -> AsyncIterator[Side]:
    with netns() as ns:
        with inside(ns):
            tap = Tap.open("eth0")
        with tap:
            run("ip", "-n", ns, "addr", "add", f"10.99.0.{number}/24", "dev", "eth0")
            run("ip", "-n", ns, "addr", "add", f"fd99::{number}/64", "dev", "eth0", "nodad")
            run("ip", "-n", ns, "link", "set", "eth0", "up")
            async with open_dataplane() as plane:
                side = Side(ns, tap, plane, directory / f"{number}.sock", features)
                async with trio.open_nursery() as nursery:
                    await nursery.start(side.server.serve, await open_listener(side.address))
                    yield side
                    nursery.cancel_scope.cancel()


class Fabric:
    def __init__(self, guest: Side, helper: Side, plane: Dataplane) -> None:
        self.guest = guest
        self.helper = helper
        self.plane = plane
        self.down = trio.Event()

    async def link(self, features: frozenset[LinkFeature]) -> None:
        self.down = trio.Event()
        granted = await open_relay(
            self.plane,
            "l",
            guest=self.guest.address,
            helper=self.helper.address,
            endpoint_id="e",
            guest_secret=self.guest.secret(),
            helper_secret=self.helper.secret(),
            features=features,
            on_down=lambda _reason: self.down.set(),
        )
        assert granted == features
        await until(lambda: self.guest.status.up and self.helper.status.up)

    async def break_link(self) -> None:
        await self.plane.stop("l")
        await until(lambda: not self.guest.status.up and not self.helper.status.up)


@asynccontextmanager
async def open_fabric(features: frozenset[LinkFeature] = ALL) -> AsyncIterator[Fabric]:
    directory = Path(tempfile.mkdtemp(prefix="tlt"))
    try:
        async with (
            open_side(directory, 1, ALL) as guest,
            open_side(directory, 2, ALL) as helper,
            open_dataplane() as plane,
        ):
            fabric = Fabric(guest, helper, plane)
            await fabric.link(features)
            yield fabric
    finally:
        shutil.rmtree(directory)


@asynccontextmanager
async def one_side() -> AsyncIterator[Side]:
    directory = Path(tempfile.mkdtemp(prefix="tlt"))
    try:
        async with open_side(directory, 1, ALL) as side:
            yield side
    finally:
        shutil.rmtree(directory)


async def ping(ns: str, address: str, *options: str) -> None:
    # The first one waits for ARP or neighbour discovery.
    await trio.run_process(
        ["ip", "netns", "exec", ns, "ping", "-c", "3", "-i", "0.05", "-W", "5", *options, address],
        capture_stdout=True,
    )


async def tcp_pair(fabric: Fabric, host: str = "10.99.0.2") -> tuple[trio.SocketStream, trio.SocketStream]:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with inside(fabric.helper.ns):
        listening = trio.socket.socket(family, socket.SOCK_STREAM)
    with inside(fabric.guest.ns):
        client = trio.socket.socket(family, socket.SOCK_STREAM)
    with listening:
        await listening.bind((host, 7000))
        listening.listen()
        await client.connect((host, 7000))
        server, _ = await listening.accept()
    return trio.SocketStream(client), trio.SocketStream(server)


async def transfer(source: trio.SocketStream, sink: trio.SocketStream, size: int) -> None:
    data = random.Random(size).randbytes(size)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(source.send_all, data)
        digest = hashlib.sha256()
        left = size
        while left:
            piece = await sink.receive_some(min(left, 1 << 20))
            assert piece
            digest.update(piece)
            left -= len(piece)
    assert digest.digest() == hashlib.sha256(data).digest()


# TAP devices


def test_tap_appears_without_carrier_and_goes() -> None:
    with netns() as ns:
        with inside(ns):
            tap = Tap.open("eth0")
        with tap:
            run("ip", "-n", ns, "link", "set", "eth0", "up")
            assert "NO-CARRIER" in link_flags(ns, "eth0")
            tap.set_carrier(True)
            assert "LOWER_UP" in link_flags(ns, "eth0")
            tap.set_carrier(False)
            assert "LOWER_UP" not in link_flags(ns, "eth0")
            assert tap.is_alive()
            assert not os.get_inheritable(tap.fileno())
        assert tap.fileno() == -1
        tap.close()
        assert not tap.is_alive()
        assert "eth0" not in run("ip", "-n", ns, "link")


def test_persistent_tap_is_adopted_with_its_addresses() -> None:
    with netns() as ns:
        with inside(ns):
            tap = Tap.open("eth0", persist=True)
        run("ip", "-n", ns, "addr", "add", "10.1.0.1/24", "dev", "eth0")
        run("ip", "-n", ns, "addr", "add", "fd01::1/64", "dev", "eth0", "nodad")
        run("ip", "-n", ns, "link", "set", "eth0", "up")
        run("ip", "-n", ns, "route", "add", "10.2.0.0/16", "via", "10.1.0.2")
        tap.set_carrier(True)
        before = run("ip", "-n", ns, "-o", "addr", "show", "dev", "eth0").split()
        index = json.loads(run("ip", "-n", ns, "-j", "link", "show", "eth0"))[0]["ifindex"]
        tap.close()
        with inside(ns):
            adopted = Tap.open("eth0", persist=True)
        assert json.loads(run("ip", "-n", ns, "-j", "link", "show", "eth0"))[0]["ifindex"] == index
        assert run("ip", "-n", ns, "-o", "addr", "show", "dev", "eth0").split() == before
        assert "10.2.0.0/16 via 10.1.0.2" in run("ip", "-n", ns, "route")
        assert "NO-CARRIER" in link_flags(ns, "eth0")
        adopted.set_persist(False)
        adopted.close()
        assert "eth0" not in run("ip", "-n", ns, "link")


@pytest.mark.parametrize("name", ["", "sixteen-letters-", "a/b", "a b", "tap%d", ".", "..", "é", "a\0b", "a:b"])
def test_bad_tap_names(name: str) -> None:
    with pytest.raises(TapError, match="is not 1 to 15 characters"):
        Tap.open(name)


def test_tap_that_is_taken_or_something_else() -> None:
    with netns() as ns:
        with inside(ns), Tap.open("eth0"), pytest.raises(TapError, match="another process holds it"):
            Tap.open("eth0")
        with inside(ns), pytest.raises(TapError, match="not a TAP of this kind"):
            Tap.open("lo")


def test_failed_opens_leave_no_descriptor() -> None:
    before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are enough
    for _ in range(20):
        with pytest.raises(TapError):
            Tap.open("lo")
    assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208


def test_probe_features() -> None:
    assert {VNET, TSO} <= probe_features() <= ALL
    assert "tlp" not in run("ip", "-o", "link")


def test_frames_that_nobody_reads_are_counted() -> None:
    with netns() as ns:
        with inside(ns):
            tap = Tap.open("eth0")
            flood = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        with tap, flood:
            run("ip", "-n", ns, "link", "set", "eth0", "txqueuelen", "50", "up")
            tap.set_carrier(True)
            flood.bind(("eth0", 0))
            for _ in range(500):
                with contextlib.suppress(OSError):
                    flood.send(b"\xff" * 60)
            assert tap.tx_drops() > 0


# the whole link


@pytest.mark.parametrize(
    "features", [frozenset(), frozenset({VNET}), frozenset({VNET, TSO}), frozenset({VNET, USO}), ALL], ids=len
)
@pytest.mark.parametrize("host", ["10.99.0.2", "fd99::2"])
async def test_ping_and_tcp(features: frozenset[LinkFeature], host: str) -> None:
    async with open_fabric(features) as fabric:
        assert fabric.guest.carrier()
        assert fabric.helper.carrier()
        await ping(fabric.guest.ns, host)
        client, server = await tcp_pair(fabric, host)
        await transfer(client, server, 3_000_001)
        await transfer(server, client, 3_000_002)
        await client.aclose()
        await server.aclose()
        guest, helper = fabric.guest.status, fabric.helper.status
        assert guest.features == helper.features == features
        largest = guest.counters.tx_bytes / guest.counters.tx_frames
        if TSO in features:
            assert largest > 1514, "segments were left to the receiver"
        else:
            assert largest <= 1514
        relayed = fabric.plane.counters("l")
        per_frame = 16 if VNET in features else 4
        assert relayed.rx_frames == relayed.tx_frames == 0

        def adds_up() -> bool:
            sent = fabric.guest.status.counters
            relayed = fabric.plane.counters("l").tx_bytes
            return (
                sent.tx_frames == fabric.helper.status.counters.rx_frames
                and relayed == sent.tx_bytes + per_frame * sent.tx_frames
            )

        await until(adds_up)  # neighbour discovery goes on meanwhile
        assert fabric.guest.events == ["e up"]


async def test_udp_segments() -> None:
    async with open_fabric() as fabric:
        with inside(fabric.helper.ns):
            receiver = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with inside(fabric.guest.ns):
            sender = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        with receiver, sender:
            await receiver.bind(("10.99.0.2", 7001))
            sender.setsockopt(socket.IPPROTO_UDP, 103, 1000)  # UDP_SEGMENT
            await sender.sendto(b"".join(bytes([n]) * 1000 for n in range(10)), ("10.99.0.2", 7001))
            assert [(await receiver.recv(2000))[:1] for _ in range(10)] == [bytes([n]) for n in range(10)]


async def test_jumbo_frames() -> None:
    async with open_fabric() as fabric:
        for side in (fabric.guest, fabric.helper):
            run("ip", "-n", side.ns, "link", "set", "eth0", "mtu", "65521")
        await ping(fabric.guest.ns, "10.99.0.2", "-s", "60000", "-M", "do")


async def test_broken_link_leaves_interface_addresses_and_connections() -> None:
    async with open_fabric() as fabric:
        client, server = await tcp_pair(fabric)
        client6, server6 = await tcp_pair(fabric, "fd99::2")
        await transfer(client, server, 100_000)
        await transfer(client6, server6, 100_000)

        def state(side: Side) -> tuple[list[tuple[str, int]], str]:
            links = json.loads(run("ip", "-n", side.ns, "-j", "addr", "show"))
            addresses = [(a["local"], a["prefixlen"]) for link in links for a in link["addr_info"]]
            return addresses, run("ip", "-n", side.ns, "route", "show").replace(" linkdown", "")

        before = [state(side) for side in (fabric.guest, fabric.helper)]
        for features in (ALL, ALL, frozenset[LinkFeature](), frozenset({VNET}), ALL):
            await fabric.break_link()
            for side, before_break in zip((fabric.guest, fabric.helper), before, strict=True):
                assert not side.carrier()
                assert "closed the stream" in side.status.last_close_reason
                assert side.status.features == frozenset()
                assert state(side) == before_break
            async with trio.open_nursery() as nursery:
                # Sent into the gap: arrives once the link is back.
                nursery.start_soon(transfer, client, server, 50_000)
                nursery.start_soon(transfer, server6, client6, 50_000)
                await fabric.link(features)
            assert fabric.guest.carrier()
            assert fabric.helper.carrier()
        assert fabric.guest.status.counters.reconnects == 5
        assert fabric.plane.counters("l").reconnects == 5
        assert fabric.guest.events[:3] == ["e up", "e down: the peer closed the stream between frames", "e up"]
        for stream in (client, server, client6, server6):
            await stream.aclose()


async def test_death_of_one_side_ends_the_link_on_the_other() -> None:
    async with open_fabric() as fabric:
        await fabric.guest.server.remove("e")
        await fabric.down.wait()
        await until(lambda: not fabric.helper.status.up)
        assert not fabric.helper.carrier()
        assert not fabric.guest.carrier()
        assert fabric.guest.events == ["e up"], "what was asked for is not reported"
        with pytest.raises(UnknownEndpointError, match="unknown endpoint e"):
            fabric.guest.server.status("e")
        await fabric.guest.server.remove("e")


async def test_two_hundred_links_leave_no_descriptor() -> None:
    async with one_side() as side:

        def descriptors() -> list[str]:
            return sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are enough

        before = descriptors()
        for cycle in range(200):
            stream = await side.dial(VNET, TSO)
            if cycle % 3 == 0:
                second = await side.dial(VNET)  # replaces the one before
                await second.aclose()
                await until(lambda: not side.status.up)
            elif cycle % 3 == 1:
                await side.server.remove("e")
                side.server.add("e", side.tap)
            await stream.aclose()
            await until(lambda: not side.status.up)
        await until(lambda: side.server._handshakes == 0)
        assert descriptors() == before


async def test_interface_that_is_removed_ends_its_link() -> None:
    async with one_side() as side:
        stream = await side.dial(VNET)
        run("ip", "-n", side.ns, "link", "del", "eth0")
        await until(lambda: not side.status.up)
        assert "TAP device" in side.status.last_close_reason
        with contextlib.suppress(trio.BrokenResourceError):
            while await stream.receive_some(4096):
                pass
        with pytest.raises(Exception, match=r"UNAVAILABLE.*eth0 is gone"):
            await dial_link(side.address, endpoint_id="e", secret=side.secret(), features=())


async def test_second_hello_replaces_the_link() -> None:
    async with one_side() as side:
        first = await side.dial(VNET)
        second = await side.dial(VNET, TSO)
        while await first.receive_some(4096):
            pass
        assert side.status.up
        assert side.status.last_close_reason == "replaced by a new link"
        assert side.events == ["e up", "e up"]
        assert side.carrier()
        await second.aclose()
        await until(lambda: not side.status.up)


# peers with manners of their own


async def read_frame(stream: trio.SocketStream) -> bytes:
    async def exactly(size: int) -> bytes:
        data = b""
        while len(data) < size:
            piece = await stream.receive_some(size - len(data))
            assert piece
            data += piece
        return data

    (length,) = struct.unpack("!I", await exactly(4))
    return await exactly(length)


ARP = struct.pack(
    "!6s6sHHHBBH6s4s6s4s",
    b"\xff" * 6, b"\x52\x54\0\x12\x34\x56", 0x0806, 1, 0x0800, 6, 4, 1,
    b"\x52\x54\0\x12\x34\x56", bytes([10, 99, 0, 77]), bytes(6), bytes([10, 99, 0, 1]),
)  # fmt: skip


async def arp_answer(stream: trio.SocketStream, header: int = 0) -> bytes:
    """The answer to ARP from a kernel, among what else it sends."""
    while True:
        frame = (await read_frame(stream))[header:]
        if frame[12:14] == b"\x08\x06" and frame[20:22] == b"\0\x02":
            return frame


async def test_qemu_framing_without_features() -> None:
    """QEMU's -netdev stream: u32 length in network order, then the frame."""
    async with one_side() as side:
        stream = await side.dial()
        await stream.send_all(struct.pack("!I", len(ARP)) + ARP)
        answer = await arp_answer(stream)
        assert answer[:6] == b"\x52\x54\0\x12\x34\x56"
        assert answer[28:32] == bytes([10, 99, 0, 1])
        # An echo with the checksum of a real NIC, cut at every byte.
        await stream.send_all(b"".join(struct.pack("!I", len(ARP)) + ARP for _ in range(3))[:-1])
        await arp_answer(stream)
        await arp_answer(stream)
        await stream.send_all(ARP[-1:])
        await arp_answer(stream)


async def test_single_bytes() -> None:
    async with one_side() as side:
        stream = await side.dial(VNET)
        for byte in struct.pack("!I", 12 + len(ARP)) + bytes(12) + ARP:
            await stream.send_all(bytes([byte]))
        await arp_answer(stream, header=12)


BAD_STREAMS = {
    "zero length": (b"\0\0\0\0", "frame length 0"),
    "short frame": (b"\0\0\0\x19" + bytes(25), "frame length 25"),
    "oversized frame": (struct.pack("!I", 65566), "frame length 65566"),
    "text": (b"GET / HTTP/1.1\r\n", "frame length 1195725856"),
    "unknown flag": (struct.pack("!I", 72) + b"\x40" + bytes(71), "flags 0x40"),
    "checksum outside": (struct.pack("!I", 72) + struct.pack("<BBHHHHH", 1, 0, 0, 0, 59, 0, 0), "outside its frame"),
    "gso without size": (struct.pack("!I", 72) + struct.pack("<BBHHHHH", 1, 1, 0, 0, 34, 16, 0), "gso_size 0"),
    "uso not agreed": (struct.pack("!I", 72) + struct.pack("<BBHHHHH", 1, 5, 0, 9, 34, 6, 0), "gso_type 0x5"),
}


@pytest.mark.parametrize("name", BAD_STREAMS)
async def test_malformed_frames_close_that_link_only(name: str, caplog: pytest.LogCaptureFixture) -> None:
    data, message = BAD_STREAMS[name]
    async with one_side() as side:
        stream = await side.dial(VNET, TSO)
        good = struct.pack("!I", 12 + len(ARP)) + bytes(12) + ARP
        await stream.send_all(good + data)
        await until(lambda: not side.status.up)
        assert f"the peer broke the frame format: {'virtio_net_hdr ' * ('length' not in message)}" in caplog.text
        assert message in caplog.text
        assert side.status.counters.rx_frames == 1, "the frame before it still counts"
        assert not side.carrier()
        stream = await side.dial(VNET, TSO)
        await stream.send_all(good)
        await arp_answer(stream, header=12)


async def test_truncated_frame_at_the_end(caplog: pytest.LogCaptureFixture) -> None:
    async with one_side() as side:
        stream = await side.dial()
        await stream.send_all((struct.pack("!I", len(ARP)) + ARP)[:20])
        # Not closed: what the kernel has sent to the stream by itself is unread, and would make that a reset.
        await stream.send_eof()
        await until(lambda: not side.status.up)
        await stream.aclose()
        assert "in the middle of a frame" in caplog.text


async def test_interface_that_is_down_drops_frames() -> None:
    async with one_side() as side:
        stream = await side.dial()
        run("ip", "-n", side.ns, "link", "set", "eth0", "down")
        await stream.send_all((struct.pack("!I", len(ARP)) + ARP) * 5)
        await until(lambda: side.status.counters.rx_drops == 5)
        assert side.status.up
        run("ip", "-n", side.ns, "link", "set", "eth0", "up")
        await stream.send_all(struct.pack("!I", len(ARP)) + ARP)
        await arp_answer(stream)


async def test_bytes_of_other_links_do_not_leak_in_headers() -> None:
    """The kernel leaves num_buffers as it finds it, and the buffer is shared."""
    async with one_side() as side:
        stream = await side.dial(VNET)
        good = struct.pack("!I", 12 + len(ARP)) + b"\0" * 10 + b"\xaa\xaa" + ARP
        await stream.send_all(good * 50)
        for _ in range(20):
            frame = await read_frame(stream)
            assert frame[10:12] == b"\0\0"


async def test_slow_peer_stops_its_own_link_only() -> None:
    async with one_side() as side:
        with inside(side.ns):
            other_tap = Tap.open("eth1")
            flood = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        with other_tap, flood:
            run("ip", "-n", side.ns, "addr", "add", "10.98.0.1/24", "dev", "eth1")
            run("ip", "-n", side.ns, "link", "set", "eth1", "up")
            side.server.add("other", other_tap)
            blocked = await side.dial(VNET)
            other, _ = await dial_link(side.address, endpoint_id="other", secret=side.secret("other"), features={VNET})
            flood.bind(("eth0", 0))
            flood.setblocking(False)
            (link,) = [link for link_id, link in side.plane._links.items() if link_id.startswith("e#")]
            await until(lambda: link.job is not None)
            pump = link.job
            assert isinstance(pump, Pump)
            # Nobody reads ``blocked``: its socket fills, then the TAP's queue, then the kernel drops.
            while pump._unsent is None or side.tap.tx_drops() == 0:
                with contextlib.suppress(OSError):
                    flood.send(b"\xff" * 1514)
                await trio.lowlevel.checkpoint()
            arp = ARP[:-3] + bytes([98, 0, 1])
            for _ in range(10):
                await other.send_all(struct.pack("!I", 12 + len(arp)) + bytes(12) + arp)
                await arp_answer(other, header=12)
            # Frames to the TAP of the blocked link still pass.
            received = side.status.counters.rx_frames
            await blocked.send_all(struct.pack("!I", 12 + len(ARP)) + bytes(12) + ARP)
            await until(lambda: side.status.counters.rx_frames == received + 1)
            assert side.status.counters.tx_drops > 0
            # Read again, it goes on where it stopped: nothing is torn.
            async with trio.open_nursery() as nursery:

                async def drain() -> None:
                    while True:
                        frame = await read_frame(blocked)
                        assert 26 <= len(frame) <= 12 + 1514

                nursery.start_soon(drain)
                await until(lambda: pump._unsent is None)
                nursery.cancel_scope.cancel()
            await side.server.remove("other")


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_hostile_headers_and_frames_never_end_the_thread(data: st.DataObject) -> None:
    """What the format permits goes to a real TAP; the kernel may refuse it, the link goes on or closes."""
    features = data.draw(st.sampled_from([frozenset(), frozenset({VNET}), frozenset({VNET, TSO}), ALL]))
    header = st.builds(
        lambda *v: struct.pack("<BBHHHHH", *v),
        st.sampled_from([0, 1, 2, 3, 4, 255]),
        st.sampled_from([0, 1, 3, 4, 5, 0x81, 0x84]),
        st.sampled_from([0, 1, 14, 54, 66, 1500, 65535]),
        st.sampled_from([0, 1, 40, 1448, 65535]),
        st.sampled_from([0, 13, 14, 34, 54, 65535]),
        st.sampled_from([0, 6, 16, 65535]),
        st.sampled_from([0, 1, 65535]),
    )
    ip4 = bytes.fromhex("450000")
    body = st.one_of(
        st.binary(min_size=14, max_size=200),
        st.binary(min_size=40, max_size=3000).map(lambda b: b"\xff" * 12 + b"\x08\0" + ip4 + b),
        st.binary(min_size=60, max_size=300).map(lambda b: b"\xff" * 12 + b"\x86\xdd\x60\0\0\0" + b),
        st.binary(min_size=60, max_size=300).map(lambda b: b"\xff" * 12 + b"\x81\0" + b),
    )
    frames = data.draw(st.lists(st.tuples(header, body), min_size=1, max_size=10))

    async def main() -> None:
        async with one_side() as side:
            stream = await side.dial(*features)
            try:
                for head, frame in frames:
                    payload = (head if VNET in features else b"") + frame
                    await stream.send_all(struct.pack("!I", len(payload)) + payload)
            except trio.BrokenResourceError:
                pass
            total = len(frames)

            def settled() -> bool:
                counters = side.status.counters
                return not side.status.up or counters.rx_frames + counters.rx_drops == total

            await until(settled)
            stream = await side.dial()
            await stream.send_all(struct.pack("!I", len(ARP)) + ARP)
            await arp_answer(stream)

    trio.run(main)


# the handshake, against a real listener


async def say(side: Side, data: bytes) -> LinkReply | None:
    """Send ``data`` to the listener; its reply, or None when it closes without one."""
    async with await connect(side.address) as stream:
        await stream.send_all(data)
        await stream.send_eof()
        try:
            return await receive_message(stream, LinkReply)
        except Exception:
            return None


def hello(endpoint: str, secret: bytes, version: int = 1) -> bytes:
    return encode_message(LinkHello(version=version, endpoint_id=endpoint, secret=secret, features=[VNET]))


@pytest.mark.parametrize(
    ("data", "reason", "logged"),
    [
        (b"", LinkRefusal.MALFORMED, "after 0 of 4 bytes"),
        (b"\0\0", LinkRefusal.MALFORMED, "after 2 of 4 bytes"),
        (b"\0\0\0\0", LinkRefusal.MALFORMED, "message of 0 bytes"),
        (b"GET / HTTP/1.1\r\n\r\n", LinkRefusal.MALFORMED, "message of 1195725856 bytes"),
        (b"\0\0\0\x04\xff\xff\xff\xff", LinkRefusal.MALFORMED, "not a valid LinkHello"),
        (b"\0\0\0\x40abc", LinkRefusal.MALFORMED, "after 3 of 64 bytes"),
        (hello("a/b", bytes(16)), LinkRefusal.MALFORMED, "endpoint id"),
        (hello("e", bytes(15)), LinkRefusal.MALFORMED, "secret has 15 bytes"),
        (hello("e", bytes(16), version=0), LinkRefusal.VERSION, "link version 0"),
        (hello("e", bytes(16)), LinkRefusal.UNAUTHORIZED, "endpoint e: wrong, used or expired secret"),
        (hello("nobody", bytes(16)), LinkRefusal.UNAUTHORIZED, "endpoint nobody: wrong, used or expired secret"),
    ],
)
async def test_bad_hellos(data: bytes, reason: LinkRefusal, logged: str, caplog: pytest.LogCaptureFixture) -> None:
    async with one_side() as side:
        side.secret()
        reply = await say(side, data)
        assert reply is not None
        assert reply.refused is not None
        assert reply.refused.reason == reason
        assert logged in caplog.text
        await (await side.dial(VNET)).aclose()


async def test_used_and_replaced_secrets() -> None:
    async with one_side() as side:
        first, second = side.secret(), side.secret()
        for secret, accepted in ((first, False), (second, True), (second, False), (first, False)):
            reply = await say(side, hello("e", secret))
            assert reply is not None
            assert (reply.ready is not None) == accepted
            if reply.refused is not None:
                assert reply.refused.reason == LinkRefusal.UNAUTHORIZED


async def test_secret_is_used_up_by_a_link_that_fails() -> None:
    async with one_side() as side:
        secret = side.secret()
        run("ip", "-n", side.ns, "link", "del", "eth0")
        first = await say(side, hello("e", secret))
        second = await say(side, hello("e", secret))
        assert first is not None
        assert second is not None
        assert first.refused is not None
        assert second.refused is not None
        assert (first.refused.reason, second.refused.reason) == (LinkRefusal.UNAVAILABLE, LinkRefusal.UNAUTHORIZED)


async def test_hello_that_does_not_come(caplog: pytest.LogCaptureFixture) -> None:
    async with one_side() as side, await connect(side.address) as stream:
        await stream.send_all(b"\0\0")
        assert await stream.receive_some(1) == b""
        assert "no complete hello within 1 s" in caplog.text


async def test_too_many_handshakes(caplog: pytest.LogCaptureFixture) -> None:
    async with one_side() as side:
        waiting = [await connect(side.address) for _ in range(4)]
        await until(lambda: side.server._handshakes == 4)
        fifth = await connect(side.address)
        assert await fifth.receive_some(1) == b""
        assert "4 others are in their handshake" in caplog.text
        for stream in (*waiting, fifth):
            await stream.aclose()
        await until(lambda: side.server._handshakes == 0)
        await (await side.dial(VNET)).aclose()


async def test_authorize_and_add_check_their_arguments() -> None:
    async with one_side() as side:
        with pytest.raises(UnknownEndpointError):
            side.server.authorize("nobody", new_secret())
        with pytest.raises(ValueError, match="16 to 64 bytes"):
            side.server.authorize("e", b"short")
        with pytest.raises(ValueError, match="there already"):
            side.server.add("e", side.tap)


async def test_link_error_names_the_side_that_refuses() -> None:
    async with open_fabric() as fabric:
        with pytest.raises(LinkError, match=r"^helper: link refused \(UNAUTHORIZED\)") as caught:
            await open_relay(
                fabric.plane,
                "l2",
                guest=fabric.guest.address,
                helper=fabric.helper.address,
                endpoint_id="e",
                guest_secret=fabric.guest.secret(),
                helper_secret=new_secret(),
                features=ALL,
                on_down=lambda _reason: None,
            )
        assert caught.value.refusal == LinkRefusal.UNAUTHORIZED

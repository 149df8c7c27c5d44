"""The relay and the dialling side, over Unix sockets, with listeners of the tests' own."""

from __future__ import annotations

import hashlib
import os
import random
import selectors
import socket
import threading
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import trio
import trio.testing

from taploom.address import UnixAddress, open_listener, write_limit
from taploom.contracts.taploom.link.v1 import LinkFeature, LinkHello, LinkRefusal
from taploom.link import (
    Dataplane,
    DataplaneError,
    FeatureMismatchError,
    LinkError,
    close_relay,
    open_dataplane,
    open_relay,
)
from taploom.link.handshake import HandshakeError, ready, receive_message, refused
from taploom.link.relay import Relay

VNET, TSO, USO = LinkFeature.VNET_HDR, LinkFeature.TSO, LinkFeature.USO
SECRET = bytes(range(16))


def stream_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    a, b = (trio.SocketStream(trio.socket.from_stdlib_socket(s)) for s in socket.socketpair())
    return a, b


class Downs:
    """Collects why links went down."""

    def __init__(self) -> None:
        self.reasons: list[str] = []
        self.event = trio.Event()

    def __call__(self, reason: str) -> None:
        self.reasons.append(reason)
        self.event.set()


def attach(plane: Dataplane, link_id: str, downs: Downs) -> tuple[trio.SocketStream, trio.SocketStream]:
    """A relay between two new streams; returns the far ends: the guest's and the helper's."""
    guest, guest_far = stream_pair()
    helper, helper_far = stream_pair()
    plane.attach_relay(link_id, guest, helper, downs)
    return guest_far, helper_far


async def fill(plane: Dataplane, link_id: str, guest: trio.SocketStream) -> int:
    """Send zeros from the guest, who finds no reader, until nothing more goes in; return how many."""
    while (relay := plane._links[link_id].job) is None:
        await trio.lowlevel.checkpoint()
    assert isinstance(relay, Relay)
    sock = socket.socket(fileno=os.dup(guest.socket.fileno()))
    sent = 0
    with sock:
        sock.setblocking(False)
        while True:
            full = relay._helper.unsent is not None
            try:
                sent += sock.send(bytes(1 << 16))
            except BlockingIOError:
                if full:
                    return sent
                await trio.lowlevel.checkpoint()


async def read_all(stream: trio.SocketStream, size: int) -> str:
    digest = hashlib.sha256()
    while size:
        data = await stream.receive_some(min(size, 1 << 20))
        assert data
        digest.update(data)
        size -= len(data)
    return digest.hexdigest()


async def test_bytes_pass_unchanged_in_both_directions() -> None:
    downs = Downs()
    data = [random.Random(n).randbytes(20_000_000 + n) for n in range(2)]
    async with open_dataplane() as plane:
        guest, helper = attach(plane, "l", downs)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.send_all, data[0])
            nursery.start_soon(helper.send_all, data[1])
            results: dict[str, str] = {}

            async def read(name: str, stream: trio.SocketStream, size: int) -> None:
                results[name] = await read_all(stream, size)

            nursery.start_soon(read, "helper", helper, len(data[0]))
            nursery.start_soon(read, "guest", guest, len(data[1]))
        assert results["helper"] == hashlib.sha256(data[0]).hexdigest()
        assert results["guest"] == hashlib.sha256(data[1]).hexdigest()
        counters = plane.counters("l")
        assert (counters.tx_bytes, counters.rx_bytes) == (len(data[0]), len(data[1]))
        assert downs.reasons == []
        await guest.aclose()
        await helper.aclose()


@pytest.mark.parametrize("side", ["guest", "helper"])
async def test_end_of_one_side_ends_the_other(side: str) -> None:
    downs = Downs()
    async with open_dataplane() as plane:
        streams = dict(zip(("guest", "helper"), attach(plane, "l", downs), strict=True))
        gone = streams.pop(side)
        (left,) = streams.values()
        await gone.aclose()
        assert await left.receive_some(1) == b""
        await downs.event.wait()
        assert downs.reasons == [f"the {side} closed its stream"]
        assert not plane.is_attached("l")
        await left.aclose()


async def test_half_close_ends_both_sides() -> None:
    downs = Downs()
    async with open_dataplane() as plane:
        guest, helper = attach(plane, "l", downs)
        await guest.send_eof()
        assert await helper.receive_some(1) == b""
        assert await guest.receive_some(1) == b""
        await downs.event.wait()
        await guest.aclose()
        await helper.aclose()


async def test_reset_while_the_other_side_is_slow() -> None:
    """The relay holds bytes for the helper when the helper goes away with unread ones."""
    downs = Downs()
    async with open_dataplane() as plane:
        guest, helper = attach(plane, "l", downs)
        await fill(plane, "l", guest)
        await helper.aclose()
        await downs.event.wait()
        assert "helper" in downs.reasons[0]
        await guest.aclose()


async def test_slow_peer_stops_its_own_link_only() -> None:
    downs = Downs()
    async with open_dataplane() as plane:
        slow_guest, slow_helper = attach(plane, "slow", downs)
        guest, helper = attach(plane, "other", downs)
        sent = await fill(plane, "slow", slow_guest)
        assert sent < 64 << 20, "what is buffered is bounded"
        data = random.Random(1).randbytes(5_000_000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(guest.send_all, data)
            assert await read_all(helper, len(data)) == hashlib.sha256(data).hexdigest()
        # The slow link's other direction is free too, and what it holds arrives once it is read.
        await slow_helper.send_all(b"back")
        assert await slow_guest.receive_some(4) == b"back"
        assert await read_all(slow_helper, sent) == hashlib.sha256(bytes(sent)).hexdigest()
        assert downs.reasons == []
        for stream in (slow_guest, slow_helper, guest, helper):
            await stream.aclose()


async def test_flooded_links_leave_others_their_turn() -> None:
    downs = Downs()
    async with open_dataplane() as plane:
        stop = threading.Event()
        floods = [attach(plane, f"flood{n}", downs) for n in range(3)]
        quiet = attach(plane, "quiet", downs)

        def send(sock: socket.socket) -> None:
            with sock:
                while not stop.is_set():
                    sock.send(bytes(1 << 16))

        def receive(sock: socket.socket) -> None:
            with sock:
                while sock.recv(1 << 20):
                    pass

        def plain(stream: trio.SocketStream) -> socket.socket:
            sock = socket.socket(fileno=stream.socket.detach())
            sock.setblocking(True)
            return sock

        async with trio.open_nursery() as nursery:
            for guest, helper in floods:
                nursery.start_soon(trio.to_thread.run_sync, send, plain(guest))
                nursery.start_soon(trio.to_thread.run_sync, receive, plain(helper))
            for number in range(100):
                # Every exchange takes place while the floods go on.
                before = [plane.counters(f"flood{n}").tx_bytes for n in range(3)]
                await quiet[0].send_all(bytes([number]))
                assert await quiet[1].receive_some(1) == bytes([number])
                await quiet[1].send_all(bytes([number]))
                assert await quiet[0].receive_some(1) == bytes([number])
                while any(plane.counters(f"flood{n}").tx_bytes == before[n] for n in range(3)):
                    await trio.lowlevel.checkpoint()
            stop.set()
        for stream in quiet:
            await stream.aclose()


async def test_two_hundred_links_leave_no_descriptor() -> None:
    downs = Downs()
    async with open_dataplane() as plane:
        before = sorted(os.listdir("/proc/self/fd"))  # noqa: PTH208 - names are enough
        for cycle in range(200):
            guest, helper = attach(plane, "l", downs)
            await guest.send_all(b"x")
            assert await helper.receive_some(1) == b"x"
            if cycle % 2:
                await plane.detach("l")
                assert await guest.receive_some(1) == b""
            else:
                downs.event = trio.Event()
                await helper.aclose()
                await downs.event.wait()
            await guest.aclose()
            await helper.aclose()
        assert sorted(os.listdir("/proc/self/fd")) == before  # noqa: PTH208
    assert len(downs.reasons) == 100, "detach is no break"


async def test_counters_go_on_over_reconnects_until_detach() -> None:
    downs = Downs()
    async with open_dataplane() as plane:
        for _ in range(3):
            guest, helper = attach(plane, "l", downs)
            await guest.send_all(b"123")
            assert await helper.receive_some(3) == b"123"
            await plane.stop("l")
            await guest.aclose()
            await helper.aclose()
        assert (plane.counters("l").tx_bytes, plane.counters("l").reconnects) == (9, 2)
        await plane.detach("l")
        with pytest.raises(KeyError):
            plane.counters("l")
        await plane.detach("l")


async def test_attaching_twice_is_refused_and_harmless() -> None:
    async with open_dataplane() as plane:
        guest, helper = attach(plane, "l", Downs())
        a, b = stream_pair()
        with pytest.raises(ValueError, match="attached already"):
            plane.attach_relay("l", a, b, Downs())
        await a.send_all(b"still ours")
        await guest.send_all(b"x")
        assert await helper.receive_some(1) == b"x"
        for stream in (a, b, guest, helper):
            await stream.aclose()


async def test_leaving_the_dataplane_closes_links_and_ends_the_thread() -> None:
    async with open_dataplane() as plane:
        guest, helper = attach(plane, "l", Downs())
        assert any(t.name == "taploom-dataplane" for t in threading.enumerate())
    assert await guest.receive_some(1) == b""
    assert await helper.receive_some(1) == b""
    assert not any(t.name == "taploom-dataplane" for t in threading.enumerate())
    await guest.aclose()
    await helper.aclose()


async def test_death_of_the_thread_fails_the_process() -> None:
    def bug() -> None:
        raise ZeroDivisionError("a bug")

    with pytest.raises(DataplaneError, match="a bug"):
        async with open_dataplane() as plane:
            guest, helper = attach(plane, "l", Downs())
            await guest.send_all(b"x")
            assert await helper.receive_some(1) == b"x"
            plane._loop.call(bug)
            await trio.sleep_forever()
    assert await guest.receive_some(1) == b"", "its peers learn of it"
    with pytest.raises(DataplaneError, match="has ended"):
        attach(plane, "m", Downs())
    await guest.aclose()
    await helper.aclose()


async def test_errors_of_the_body_come_out_as_they_are() -> None:
    with pytest.raises(LookupError, match="mine"):
        async with open_dataplane():
            raise LookupError("mine")


async def test_cancellation_passes_through() -> None:
    with trio.CancelScope() as scope:
        async with open_dataplane() as plane:
            attach(plane, "l", Downs())
            scope.cancel()
            await trio.sleep_forever()
    assert scope.cancelled_caught


@pytest.mark.parametrize("selector", ["SelectSelector", "PollSelector"])
async def test_relays_without_epoll(selector: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selectors, "DefaultSelector", getattr(selectors, selector))
    await test_bytes_pass_unchanged_in_both_directions()
    await test_slow_peer_stops_its_own_link_only()


async def test_short_writes_for_vsock(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a vsock socket's smaller writes do, with a limit that divides nothing evenly."""
    with socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM) as vsock:
        assert write_limit(vsock) == 28 * 1024
    monkeypatch.setattr("taploom.link.relay.write_limit", lambda _sock: 10_007)
    await test_bytes_pass_unchanged_in_both_directions()
    await test_slow_peer_stops_its_own_link_only()


async def test_detach_is_not_cut_short_by_cancellation() -> None:
    async with open_dataplane() as plane:
        guest, helper = attach(plane, "l", Downs())
        with trio.CancelScope() as scope:
            scope.cancel()
            await plane.detach("l")
        assert not plane.is_attached("l")
        assert await guest.receive_some(1) == b""
        await guest.aclose()
        await helper.aclose()


async def test_calls_while_the_thread_is_busy_are_all_made() -> None:
    """More of them than the wake-up socket holds."""
    async with open_dataplane() as plane:
        gate = threading.Event()
        done: list[int] = []
        plane._loop.call(lambda: gate.wait(10) and None)
        for number in range(5000):
            plane._loop.call(lambda number=number: done.append(number))  # type: ignore[misc]  # called without
        gate.set()
        while len(done) < 5000:
            await trio.lowlevel.checkpoint()
        assert done == list(range(5000))


# open_relay

Script = Callable[[trio.SocketStream], Awaitable[None]]


def accepting(*features: LinkFeature) -> Script:
    async def script(stream: trio.SocketStream) -> None:
        hello = await receive_message(stream, LinkHello)
        assert (hello.version, hello.endpoint_id, hello.secret) == (1, "e", SECRET)
        await stream.send_all(ready(1, features))
        while data := await stream.receive_some(4096):
            await stream.send_all(data.upper())

    return script


async def refusing(stream: trio.SocketStream) -> None:
    await receive_message(stream, LinkHello)
    await stream.send_all(refused(LinkRefusal.UNAUTHORIZED, "wrong secret"))


async def closing(stream: trio.SocketStream) -> None:
    await receive_message(stream, LinkHello)


async def garbage(stream: trio.SocketStream) -> None:
    await receive_message(stream, LinkHello)
    await stream.send_all(b"\0\0\0\x04\xff\xff\xff\xff")


async def oversized(stream: trio.SocketStream) -> None:
    await receive_message(stream, LinkHello)
    await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")


async def silent(stream: trio.SocketStream) -> None:
    await receive_message(stream, LinkHello)
    await stream.receive_some(1)


class Peers:
    """Listeners for both sides that follow scripts, and a data plane to dial them from."""

    def __init__(self, directory: Path, guest: Script | None, helper: Script | None) -> None:
        self.directory = directory
        self.scripts = {"guest": guest, "helper": helper}
        self.closed = {"guest": trio.Event(), "helper": trio.Event()}
        self.stack = AsyncExitStack()
        self.downs = Downs()

    async def __aenter__(self) -> Peers:
        self.nursery = await self.stack.enter_async_context(trio.open_nursery())
        self.stack.callback(self.nursery.cancel_scope.cancel)
        self.plane = await self.stack.enter_async_context(open_dataplane())
        for side, script in self.scripts.items():
            if script is not None:
                listener = await open_listener(UnixAddress(str(self.directory / f"{side}.sock")))
                await self.stack.enter_async_context(listener)
                self.nursery.start_soon(self._serve, listener, script, self.closed[side])
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.stack.__aexit__(*error)  # type: ignore[arg-type]  # the same three values

    async def _serve(self, listener: trio.abc.Listener[trio.SocketStream], script: Script, closed: trio.Event) -> None:
        async with await listener.accept() as stream:
            try:
                await script(stream)
            except (trio.BrokenResourceError, HandshakeError):
                pass  # the dialler has given up, because of the other side
            finally:
                closed.set()

    async def open(self, features: frozenset[LinkFeature], patience: float = 10) -> frozenset[LinkFeature]:
        return await open_relay(
            self.plane,
            "l",
            guest=UnixAddress(str(self.directory / "guest.sock")),
            helper=UnixAddress(str(self.directory / "helper.sock")),
            endpoint_id="e",
            guest_secret=SECRET,
            helper_secret=SECRET,
            features=features,
            on_down=self.downs,
            timeout=patience,
        )


async def test_open_relay(tmp_path: Path) -> None:
    received: list[bytes] = []

    async def helper(stream: trio.SocketStream) -> None:
        await receive_message(stream, LinkHello)
        await stream.send_all(ready(1, {VNET}) + b"early")
        received.append(await stream.receive_some(5))

    async with Peers(tmp_path, accepting(VNET), helper) as peers:
        assert await peers.open(frozenset({VNET, TSO})) == {VNET}
        await peers.closed["helper"].wait()
        assert received == [b"EARLY"], "what follows the reply at once is not lost"
        await peers.downs.event.wait()


async def test_close_relay_is_no_break(tmp_path: Path) -> None:
    async with Peers(tmp_path, accepting(VNET), accepting(VNET)) as peers:
        await peers.open(frozenset({VNET}))
        await close_relay(peers.plane, "l")
        await peers.closed["guest"].wait()
        await peers.closed["helper"].wait()
        await close_relay(peers.plane, "l")
        assert peers.downs.reasons == []


@pytest.mark.parametrize("side", ["guest", "helper"])
@pytest.mark.parametrize(
    ("script", "message"),
    [
        (None, "cannot connect to unix:"),
        (refusing, "UNAUTHORIZED.*wrong secret"),
        (closing, "closed the stream after 0 of 4 bytes"),
        (garbage, "not a valid LinkReply"),
        (oversized, "handshake message of 1213486160 bytes"),
        (accepting(VNET, USO), "not asked for"),
        (accepting(TSO), "without VNET_HDR"),
    ],
)
async def test_open_relay_says_which_side_fails_and_why(
    tmp_path: Path, side: str, script: Script | None, message: str
) -> None:
    scripts: dict[str, Script | None] = {"guest": accepting(VNET), "helper": accepting(VNET), side: script}
    async with Peers(tmp_path, scripts["guest"], scripts["helper"]) as peers:
        with pytest.raises(LinkError, match=f"^{side}: .*{message}") as caught:
            await peers.open(frozenset({VNET, TSO}))
        assert caught.value.side == side
        assert caught.value.refusal == (LinkRefusal.UNAUTHORIZED if script is refusing else None)
        assert not peers.plane.is_attached("l")


async def test_sides_that_differ(tmp_path: Path) -> None:
    async with Peers(tmp_path, accepting(VNET, TSO), accepting(VNET, USO)) as peers:
        with pytest.raises(FeatureMismatchError, match="guest grants the features VNET_HDR, TSO, the helper") as caught:
            await peers.open(frozenset({VNET, TSO, USO}))
        assert caught.value.common == {VNET}
        await peers.closed["guest"].wait()
        await peers.closed["helper"].wait()


@pytest.mark.parametrize(("guest", "helper", "side"), [(silent, silent, "both"), (silent, accepting(), "guest")])
async def test_sides_that_do_not_answer(tmp_path: Path, guest: Script, helper: Script, side: str) -> None:
    async with Peers(tmp_path, guest, helper) as peers:
        with pytest.raises(LinkError, match=f"^{side}: no answer within 0.1 s"):
            await peers.open(frozenset(), patience=0.1)
        await peers.closed["guest"].wait()
        await peers.closed["helper"].wait()


async def test_opening_again_replaces_the_relay(tmp_path: Path) -> None:
    async with Peers(tmp_path, accepting(), accepting()) as peers:
        old_guest, old_helper = attach(peers.plane, "l", peers.downs)
        await peers.open(frozenset())
        assert await old_guest.receive_some(1) == b""
        assert await old_helper.receive_some(1) == b""
        assert peers.plane.counters("l").reconnects == 1
        assert peers.downs.reasons == []
        await old_guest.aclose()
        await old_helper.aclose()

"""The plug between a VM's network card and its link: whole frames, whatever side comes and goes."""

from __future__ import annotations

import random
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio

from taploom.link import Dataplane, open_dataplane
from taploom.link.frames import FrameDecoder, encode_frame
from taploom.link.plug import CARD, LINK, Plug

PATIENCE = 20.0


class Rig:
    """A plug with streams to its sides."""

    def __init__(self, dataplane: Dataplane) -> None:
        self.dataplane = dataplane
        self.lost: list[tuple[int, int, str]] = []
        self.made = trio.Event()
        token = trio.lowlevel.current_trio_token()

        def make(loop: object, _end: object) -> Plug:
            self.plug = Plug(loop, lambda *what: token.run_sync_soon(self.lost.append, what))  # type: ignore[arg-type]
            token.run_sync_soon(self.made.set)
            return self.plug

        self.attachment = dataplane.attach(make, lambda _reason: None)
        self._serial = 0

    async def side(self, number: int) -> trio.SocketStream:
        """Gives a side a new stream; its other end."""
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._serial += 1
        serial, done, token = self._serial, trio.Event(), trio.lowlevel.current_trio_token()

        def put() -> None:
            self.plug.set(number, theirs, serial)
            token.run_sync_soon(done.set)

        self.dataplane.call(put)
        await done.wait()
        ours.setblocking(False)
        return trio.SocketStream(trio.socket.from_stdlib_socket(ours))

    async def until_lost(self, number: int) -> str:
        while not any(side == number for side, _, _ in self.lost):
            await trio.sleep(0.001)
        return self.lost.pop()[2]


@asynccontextmanager
async def rig() -> AsyncIterator[Rig]:
    with trio.fail_after(PATIENCE):
        async with open_dataplane() as dataplane:
            rig = Rig(dataplane)
            await rig.made.wait()
            yield rig


async def read(stream: trio.SocketStream, count: int) -> list[bytes]:
    decoder, frames = FrameDecoder(()), list[bytes]()
    while len(frames) < count:
        data = await stream.receive_some(65536)
        assert data, f"ended after {len(frames)} of {count} frames"
        frames += decoder.feed(data)
    assert decoder.pending == 0
    return frames


def some_frames(count: int, seed: int) -> list[bytes]:
    chosen = random.Random(seed)
    return [chosen.randbytes(chosen.choice((14, 60, 1514, 9014, 65553))) for _ in range(count)]


async def send_in_pieces(stream: trio.SocketStream, frames: list[bytes], seed: int) -> None:
    data, chosen = b"".join(map(encode_frame, frames)), random.Random(seed)
    while data:
        size = chosen.choice((1, 3, 100, 5000, 200_000))
        await stream.send_all(data[:size])
        data = data[size:]


async def test_frames_pass_both_ways_in_whatever_pieces() -> None:
    async with rig() as one:
        card, link = await one.side(CARD), await one.side(LINK)
        there, back = some_frames(60, 1), some_frames(60, 2)
        found: dict[int, list[bytes]] = {}
        async with trio.open_nursery() as nursery:

            async def take(number: int, stream: trio.SocketStream, count: int) -> None:
                found[number] = await read(stream, count)

            nursery.start_soon(send_in_pieces, card, there, 3)
            nursery.start_soon(send_in_pieces, link, back, 4)
            nursery.start_soon(take, LINK, link, len(there))
            nursery.start_soon(take, CARD, card, len(back))
        assert found == {LINK: there, CARD: back}


async def test_a_new_link_begins_with_a_frame() -> None:
    async with rig() as one:
        card, first = await one.side(CARD), await one.side(LINK)
        frame, half = b"a" * 1000, encode_frame(b"b" * 1000)
        await card.send_all(encode_frame(frame) + half[:500])
        assert await read(first, 1) == [frame]
        # It goes in the middle of a frame from the card, and with one of its own begun.
        await first.send_all(encode_frame(b"c" * 100)[:50])
        await first.aclose()
        assert "closed" in await one.until_lost(LINK)
        await card.send_all(half[500:] + encode_frame(b"d" * 20))
        second = await one.side(LINK)
        await card.send_all(encode_frame(b"e" * 30))
        await second.send_all(encode_frame(b"f" * 40))
        assert await read(card, 1) == [b"f" * 40]
        seen = await read(second, 1)
        while seen[-1] != b"e" * 30:  # what was under way when it was plugged in may be whole frames
            assert seen[-1] in (b"b" * 1000, b"d" * 20)
            seen = await read(second, 1)


async def test_without_a_link_frames_vanish_and_nothing_waits() -> None:
    async with rig() as one:
        card = await one.side(CARD)
        await send_in_pieces(card, some_frames(200, 5), 6)
        link = await one.side(LINK)
        await link.send_all(encode_frame(b"x" * 60))
        assert await read(card, 1) == [b"x" * 60]


async def test_a_slow_side_holds_the_other_up_until_it_goes() -> None:
    async with rig() as one:
        card, link = await one.side(CARD), await one.side(LINK)
        flood = encode_frame(bytes(60_000)) * 50
        with trio.move_on_after(0.5) as scope:
            while True:
                await card.send_all(flood)
        assert scope.cancelled_caught
        await link.aclose()
        with trio.fail_after(PATIENCE):
            await card.send_all(b"")
            await one.until_lost(LINK)
            fresh = await one.side(LINK)
            await fresh.send_all(encode_frame(b"y" * 60))
            assert await read(card, 1) == [b"y" * 60]


async def test_a_card_that_breaks_the_format_is_let_go() -> None:
    async with rig() as one:
        card, link = await one.side(CARD), await one.side(LINK)
        await card.send_all(b"\xff\xff\xff\xff")
        assert "frame format" in await one.until_lost(CARD)
        again = await one.side(CARD)
        await again.send_all(encode_frame(b"z" * 60))
        assert await read(link, 1) == [b"z" * 60]
        one.dataplane.end_attachment(one.attachment, within=PATIENCE)
        assert await link.receive_some(1) == b""

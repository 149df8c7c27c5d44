"""Streams on the data port: the agent's side, dialled as the host dials it."""

from __future__ import annotations

import gc
import hashlib
import random
import selectors
import socket
import struct
import time
from pathlib import Path

import pytest
import trio

from taploom.address import UnixAddress, connect, open_listener
from taploom.contracts.taploom.link.v1 import LinkFeature, LinkHello, LinkRefusal, LinkReply, StreamTarget
from taploom.link import (
    LinkServer,
    StreamError,
    StreamUnauthorizedError,
    StreamUnavailableError,
    StreamUnreachableError,
    new_secret,
    open_dataplane,
    open_stream,
)
from taploom.link.datagrams import MAX_DATAGRAM
from taploom.link.handshake import encode_message, ready, receive_message, refused
from tests.protocol.stream_support import TCP, UDP, echo, open_helper, tcp_server, udp_server, until


async def receive_all(stream: trio.abc.ReceiveStream) -> bytes:
    return b"".join([data async for data in stream])


async def receive_exactly(stream: trio.abc.ReceiveStream, size: int) -> bytes:
    data = b""
    while len(data) < size:
        chunk = await stream.receive_some(size - len(data))
        assert chunk, "the stream ended"
        data += chunk
    return data


async def receive_datagram(stream: trio.abc.ReceiveStream) -> bytes:
    (length,) = struct.unpack(">I", await receive_exactly(stream, 4))
    return await receive_exactly(stream, length)


def datagram(data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + data


@pytest.fixture(params=["DefaultSelector", "PollSelector"])
def selector(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system's best, and what others have."""
    monkeypatch.setattr(selectors, "DefaultSelector", getattr(selectors, request.param))


@pytest.mark.usefixtures("selector")
async def test_bytes_and_half_close_both_ways(tmp_path: Path) -> None:
    data = random.Random(1).randbytes(5_000_003)
    async with open_helper(tmp_path) as helper, tcp_server(echo) as port, await helper.open(port) as stream:
        received = b""
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                await stream.send_all(data)
                await stream.send_eof()

            nursery.start_soon(send)
            received = await receive_all(stream)
        assert hashlib.sha256(received).digest() == hashlib.sha256(data).digest()
        await until(lambda: helper.streams.active == 0)


@pytest.mark.usefixtures("selector")
async def test_target_closes_first(tmp_path: Path) -> None:
    got: list[bytes] = []

    async def server(stream: trio.SocketStream) -> None:
        await stream.send_all(b"greeting")
        await stream.send_eof()
        got.append(await receive_all(stream))

    async with open_helper(tmp_path) as helper, tcp_server(server) as port, await helper.open(port) as stream:
        assert await receive_all(stream) == b"greeting"
        await stream.send_all(b"still here")
        await stream.send_eof()
        await until(lambda: got == [b"still here"])
        await until(lambda: helper.streams.active == 0)


async def test_bytes_right_behind_the_hello(tmp_path: Path) -> None:
    async with (
        open_helper(tmp_path) as helper,
        tcp_server(echo) as port,
        await connect(helper.address) as stream,
    ):
        hello = LinkHello(version=1, secret=helper.secret, stream=helper.target(port))
        await stream.send_all(encode_message(hello) + b"early")
        reply = await receive_message(stream, LinkReply)
        assert reply.ready is not None
        assert await receive_exactly(stream, 5) == b"early"


@pytest.mark.usefixtures("selector")
async def test_target_that_resets_breaks_the_stream(tmp_path: Path) -> None:
    async def server(stream: trio.SocketStream) -> None:
        await receive_exactly(stream, 1)
        stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    async with open_helper(tmp_path) as helper, tcp_server(server) as port, await helper.open(port) as stream:
        await stream.send_all(b"x")
        await until(lambda: helper.streams.active == 0)
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await stream.send_all(b"y")


@pytest.mark.usefixtures("selector")
async def test_stream_that_breaks_resets_the_target(tmp_path: Path) -> None:
    """Also when the host had closed its direction before: that was no end in order."""
    seen: list[str] = []

    async def server(stream: trio.SocketStream) -> None:
        assert await receive_all(stream) == b"request"
        seen.append("request")
        try:
            while True:
                await stream.send_all(b"answer")
                await trio.sleep(0.01)
        except trio.BrokenResourceError as error:
            seen.append(type(error.__cause__).__name__)

    async with open_helper(tmp_path) as helper, tcp_server(server) as port:
        stream = await helper.open(port)
        await stream.send_all(b"request")
        await stream.send_eof()
        await until(lambda: seen == ["request"])
        await stream.aclose()
        await until(lambda: len(seen) == 2)
        assert seen[1] in ("ConnectionResetError", "BrokenPipeError")
        await until(lambda: helper.streams.active == 0)


async def test_nobody_listens(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with open_helper(tmp_path) as helper:
        with pytest.raises(StreamUnreachableError, match="connection refused") as caught:
            await helper.open(port)
        assert caught.value.refusal == LinkRefusal.UNREACHABLE
        await until(lambda: helper.streams.active == 0)


async def test_ipv6(tmp_path: Path) -> None:
    async with (
        open_helper(tmp_path) as helper,
        tcp_server(echo, host="::1") as port,
        await helper.open(port, address="::1") as stream,
    ):
        await stream.send_all(b"six")
        assert await receive_exactly(stream, 3) == b"six"


@pytest.mark.parametrize(
    "hello",
    [
        LinkHello(version=1, stream=StreamTarget(protocol=TCP, address="127.0.0.1", port=1)),
        LinkHello(version=1, secret=bytes(16), stream=StreamTarget(protocol=TCP, address="127.0.0.1", port=1)),
        LinkHello(version=1, secret=bytes(32), stream=StreamTarget(protocol=TCP, token=bytes(16))),
    ],
)
async def test_without_the_secret(tmp_path: Path, hello: LinkHello) -> None:
    async with open_helper(tmp_path) as helper, await connect(helper.address) as stream:
        await stream.send_all(encode_message(hello))
        reply = await receive_message(stream, LinkReply)
        assert reply.refused is not None
        assert reply.refused.reason in (LinkRefusal.UNAUTHORIZED, LinkRefusal.MALFORMED)
        assert await stream.receive_some() == b""


async def test_a_new_secret_voids_the_one_before(tmp_path: Path) -> None:
    async with (
        open_helper(tmp_path) as helper,
        tcp_server(echo) as port,
        await helper.open(port) as stream,
    ):
        newer = new_secret()
        helper.streams.authorize(newer)
        with pytest.raises(StreamUnauthorizedError):
            await helper.open(port)
        async with await open_stream(helper.address, helper.target(port), newer):
            pass
        # What is open stays.
        await stream.send_all(b"on")
        assert await receive_exactly(stream, 2) == b"on"


async def test_unknown_token(tmp_path: Path) -> None:
    async with open_helper(tmp_path) as helper:
        with pytest.raises(StreamUnauthorizedError):
            await open_stream(helper.address, StreamTarget(protocol=TCP, token=new_secret()), helper.secret)
        helper.streams.refuse(new_secret())


async def test_limit(tmp_path: Path) -> None:
    async with open_helper(tmp_path, max_streams=3) as helper, tcp_server(echo) as port:
        streams = [await helper.open(port) for _ in range(3)]
        with pytest.raises(StreamUnavailableError, match="3 streams already"):
            await helper.open(port)
        await streams.pop().aclose()
        await until(lambda: helper.streams.active == 2)
        async with await helper.open(port):
            pass
        for stream in streams:
            await stream.aclose()


async def test_one_slow_stream_does_not_stop_others(tmp_path: Path) -> None:
    async def deaf(stream: trio.SocketStream) -> None:
        await trio.sleep_forever()

    async with (
        open_helper(tmp_path) as helper,
        tcp_server(deaf) as slow,
        tcp_server(echo) as quick,
        await helper.open(slow) as stuck,
        await helper.open(quick) as stream,
    ):
        with trio.move_on_after(0.5):
            while True:
                await stuck.send_all(bytes(1 << 20))
        for n in range(20):
            await stream.send_all(b"%4d" % n)
            assert await receive_exactly(stream, 4) == b"%4d" % n


async def test_many_streams_leak_nothing(tmp_path: Path) -> None:
    async with open_helper(tmp_path) as helper, tcp_server(echo) as port:

        async def one(limiter: trio.Semaphore, number: int) -> None:
            async with limiter, await helper.open(port) as stream:
                await stream.send_all(b"hello")
                if number % 3:
                    await stream.send_eof()
                    assert await receive_all(stream) == b"hello"

        async def many(count: int) -> None:
            limiter = trio.Semaphore(100)
            async with trio.open_nursery() as nursery:
                for number in range(count):
                    nursery.start_soon(one, limiter, number)
            await until(lambda: helper.streams.active == 0)

        def descriptors() -> int:
            return sum(1 for _ in Path("/proc/self/fd").iterdir())

        await many(50)
        await until(lambda: not helper.plane._attachments)
        before = descriptors()
        await many(1000)
        await until(lambda: descriptors() <= before)
        assert not helper.streams._carried
        assert not helper.plane._attachments
        gc.collect()


@pytest.mark.usefixtures("selector")
async def test_datagrams(tmp_path: Path) -> None:
    async with (
        open_helper(tmp_path) as helper,
        udp_server(lambda data: data.upper()) as (port, peers),
        await helper.open(port, UDP) as stream,
    ):
        for data in (b"one", b"", b"x" * MAX_DATAGRAM):
            # In pieces: a stream has no boundaries of its own.
            framed = datagram(data)
            await stream.send_all(framed[:2])
            await stream.send_all(framed[2:])
            assert await receive_datagram(stream) == data.upper()
        await stream.send_all(datagram(b"a") + datagram(b"b"))
        assert {await receive_datagram(stream), await receive_datagram(stream)} == {b"A", b"B"}
        assert len(peers) == 1


async def test_datagrams_to_a_port_that_is_closed_are_lost(tmp_path: Path) -> None:
    async with udp_server(lambda data: data) as (port, _):
        pass
    async with open_helper(tmp_path) as helper, await helper.open(port, UDP) as stream:
        for _ in range(3):
            await stream.send_all(datagram(b"nobody"))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as late:
            late.bind(("127.0.0.1", port))
            late.settimeout(10)
            with trio.fail_after(60):
                late.setblocking(False)
                while True:
                    await stream.send_all(datagram(b"now"))
                    try:
                        assert late.recv(10) in (b"nobody", b"now")
                        break
                    except BlockingIOError:
                        await trio.sleep(0.01)


async def test_datagram_that_is_too_long_ends_the_stream(tmp_path: Path) -> None:
    async with (
        open_helper(tmp_path) as helper,
        udp_server(lambda data: data) as (port, _),
        await helper.open(port, UDP) as stream,
        await helper.open(port, UDP) as other,
    ):
        await stream.send_all(struct.pack(">I", MAX_DATAGRAM + 1))
        assert await stream.receive_some() == b""
        await other.send_all(datagram(b"fine"))
        assert await receive_datagram(other) == b"fine"


async def test_datagrams_that_nobody_reads_stop_nobody(tmp_path: Path) -> None:
    async with (
        open_helper(tmp_path) as helper,
        udp_server(lambda data: bytes(8000)) as (port, _),
        await helper.open(port, UDP) as stuck,
        await helper.open(port, UDP) as stream,
    ):
        for _ in range(500):
            await stuck.send_all(datagram(b"more"))
        received = False
        while not received:  # the server may have no room for it yet
            await stream.send_all(datagram(b"x"))
            with trio.move_on_after(0.5):
                received = await receive_datagram(stream) == bytes(8000)


async def test_idle_flow_ends(tmp_path: Path) -> None:
    async with (
        open_helper(tmp_path, udp_idle=0.3) as helper,
        udp_server(lambda data: data) as (port, _),
        await helper.open(port, UDP) as stream,
    ):
        await stream.send_all(datagram(b"x"))
        assert await receive_datagram(stream) == b"x"
        assert await stream.receive_some() == b""
        assert helper.streams.active == 0


async def test_hostile_hellos(tmp_path: Path) -> None:
    """Bytes of any kind where a hello is expected: the connection is closed, and the next one served."""
    rng = random.Random(7)
    async with open_helper(tmp_path, hello_timeout=0.2) as helper, tcp_server(echo) as port:
        valid = encode_message(LinkHello(version=1, secret=helper.secret, stream=helper.target(port)))
        for _ in range(200):
            data = bytearray(valid)
            for _ in range(rng.randrange(1, 4)):
                data[rng.randrange(len(data))] = rng.randrange(256)
            stream = await connect(helper.address)
            await stream.send_all(bytes(data[: rng.randrange(1, len(data) + 1)]))
            await stream.aclose()
        async with await helper.open(port) as stream:
            await stream.send_all(b"x")
            assert await receive_exactly(stream, 1) == b"x"


async def test_agent_without_streams_refuses(tmp_path: Path) -> None:
    """A guest's agent, say."""
    address = UnixAddress(str(tmp_path / "data.sock"))
    async with open_dataplane() as plane, trio.open_nursery() as nursery:
        server = LinkServer(plane, features=(), on_up=lambda *_: None, on_down=lambda *_: None)
        await nursery.start(server.serve, await open_listener(address))
        target = StreamTarget(protocol=TCP, address="127.0.0.1", port=1)
        with pytest.raises(StreamUnavailableError, match="not served") as caught:
            await open_stream(address, target, new_secret())
        assert caught.value.refusal == LinkRefusal.UNAVAILABLE
        nursery.cancel_scope.cancel()


async def test_agent_that_is_older_than_streams_refuses(tmp_path: Path) -> None:
    """It ignores the unknown field, and sees a hello without an endpoint."""
    address = UnixAddress(str(tmp_path / "data.sock"))

    async def old_agent(stream: trio.SocketStream) -> None:
        hello = await receive_message(stream, LinkHello)
        assert not hello.endpoint_id
        assert not hello.features
        message = "the endpoint id is not 1 to 64 characters of [a-zA-Z0-9_.-]"
        await stream.send_all(refused(LinkRefusal.MALFORMED, message))
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, old_agent, [await open_listener(address)])
        target = StreamTarget(protocol=TCP, address="127.0.0.1", port=1)
        with pytest.raises(StreamUnavailableError, match="endpoint id"):
            await open_stream(address, target, new_secret())
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (b"", StreamError),
        (b"\0\0\0\0", StreamError),
        (ready(1, {LinkFeature.VNET_HDR}), StreamError),
        (ready(2, ()), StreamError),
        (refused(LinkRefusal.VERSION, "too new"), StreamUnavailableError),
    ],
)
async def test_answers_that_make_no_sense(tmp_path: Path, answer: bytes, error: type[StreamError]) -> None:
    address = UnixAddress(str(tmp_path / "data.sock"))

    async def agent(stream: trio.SocketStream) -> None:
        await receive_message(stream, LinkHello)
        if answer:
            await stream.send_all(answer)
        await stream.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, agent, [await open_listener(address)])
        with pytest.raises(error):
            await open_stream(address, StreamTarget(protocol=TCP, address="127.0.0.1", port=1), new_secret())
        nursery.cancel_scope.cancel()


async def test_no_agent(tmp_path: Path) -> None:
    with pytest.raises(StreamUnavailableError, match="cannot connect"):
        await open_stream(
            UnixAddress(str(tmp_path / "none.sock")), StreamTarget(protocol=TCP, address="127.0.0.1", port=1), b"x" * 16
        )


async def test_target_that_does_not_answer(tmp_path: Path) -> None:
    with socket.socket() as full, trio.socket.socket() as first, trio.socket.socket() as second:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        # Its queue has room for one; what comes after that gets no answer.
        await first.connect(full.getsockname())
        async with open_helper(tmp_path) as helper:
            errors: list[StreamError] = []

            async def dial() -> None:
                try:
                    await helper.open(full.getsockname()[1])
                except StreamError as error:
                    errors.append(error)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(second.connect, full.getsockname())
                nursery.start_soon(dial)
                await until(lambda: any(attachment.job is not None for attachment in helper.streams._carried))
                helper.streams._sweep(time.monotonic())
                assert errors == []
                helper.streams._sweep(time.monotonic() + 11)
                await until(lambda: len(errors) == 1)
                nursery.cancel_scope.cancel()
            assert isinstance(errors[0], StreamUnreachableError)
            assert "timed out" in str(errors[0])
            assert helper.streams.active == 0

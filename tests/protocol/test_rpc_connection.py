"""Our server and our client against peers that break rules, frame by frame."""

import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
import trio
import trio.testing
from hyperframe.frame import Frame, GoAwayFrame, HeadersFrame, PingFrame, RstStreamFrame, SettingsFrame
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rpc_support import SERVICE, Echo, memory_pair
from rpc_testing.taploomtest.echo.v1 import BidiRequest, ServerStreamRequest, UnaryRequest, UnaryResponse
from rpc_testing.taploomtest.echo.v1.rpc import EchoServiceClient

from taploom.rpc import ConnectionConfig, RpcError, Server, StatusCode, open_channel
from taploom.rpc.framing import frame_message
from taploom.rpc.gate import PREFACE, FloodLimits, goaway_frame

HEADERS = [
    (":method", "POST"),
    (":scheme", "http"),
    (":path", f"/{SERVICE}/Unary"),
    (":authority", "test"),
    ("te", "trailers"),
    ("content-type", "application/grpc"),
]
SETTINGS = SettingsFrame(0).serialize()
SETTINGS_ACK = SettingsFrame(0, flags=["ACK"]).serialize()


class RawClient:
    """A client that sends what it is told to."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self.h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=True, validate_outbound_headers=False)
        )
        self.frames: list[Frame] = []
        self.buffer = b""

    async def handshake(self) -> None:
        self.h2.initiate_connection()
        await self.flush()

    async def flush(self) -> None:
        data = self.h2.data_to_send()
        if data:
            await self.stream.send_all(data)

    def request(self, headers: list[tuple[str, str]] | None = None, *, end: bool = False) -> int:
        stream_id = self.h2.get_next_available_stream_id()
        self.h2.send_headers(stream_id, headers or HEADERS, end_stream=end)
        return stream_id

    async def read_frames(self, until: Callable[[Frame], bool] | None = None) -> list[Frame]:
        """Frames until one satisfies `until`, or until the server closes the connection."""
        frames: list[Frame] = []
        while True:
            while len(self.buffer) >= 9:
                frame, length = Frame.parse_frame_header(memoryview(self.buffer[:9]))
                if len(self.buffer) < 9 + length:
                    break
                frame.parse_body(memoryview(self.buffer[9 : 9 + length]))
                self.buffer = self.buffer[9 + length :]
                frames.append(frame)
                if until is not None and until(frame):
                    return frames
            try:
                data = await self.stream.receive_some(65_536)
            except trio.BrokenResourceError:
                return frames
            if not data:
                return frames
            self.buffer += data

    async def events(self, wanted: type) -> Any:
        """The next event of a kind."""
        while True:
            data = await self.stream.receive_some(65_536)
            assert data, "the server closed the connection"
            for event in self.h2.receive_data(data):
                if isinstance(event, wanted):
                    return event


@asynccontextmanager
async def raw_client(server: Server) -> AsyncIterator[RawClient]:
    async with memory_pair(server) as stream:
        yield RawClient(stream)


def goaway_of(frames: list[Frame]) -> GoAwayFrame:
    goaways = [frame for frame in frames if isinstance(frame, GoAwayFrame)]
    assert goaways, frames
    return goaways[-1]


async def test_a_trivial_raw_call() -> None:
    async with raw_client(Server([Echo()])) as client:
        await client.handshake()
        stream_id = client.request()
        client.h2.send_data(stream_id, frame_message(b"\x0a\x01x"), end_stream=True)
        await client.flush()
        assert (await client.events(h2.events.DataReceived)).data == frame_message(b"\x0a\x01x")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "preface"),
        (b"\x00" * 64, "preface"),
        (PREFACE + PingFrame(0, b"12345678").serialize(), "not SETTINGS"),
        (PREFACE + b"\xff\xff\xff\x04\x00\x00\x00\x00\x00", "16777215 bytes"),
        (PREFACE + SETTINGS + b"\x00\x00\x05\x00\x00\x00\x00\x00\x01hello", "protocol violation"),
        (PREFACE + SETTINGS + b"\x00\x00\x03\x01\x04\x00\x00\x00\x01\xff\xff\xff", "protocol violation"),
        (PREFACE + SETTINGS + b"\x00\x00\x00\x09\x00\x00\x00\x00\x01", "protocol violation"),
        (PREFACE + SETTINGS + b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x00", "protocol violation"),
        (PREFACE + SETTINGS + b"\x00\x00\x04\x05\x04\x00\x00\x00\x01\x00\x00\x00\x02", "protocol violation"),
    ],
)
async def test_garbage_closes_its_connection_with_a_logged_reason(
    data: bytes, reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server([Echo()])
    async with raw_client(server) as bad, memory_pair(server) as stream, open_channel(stream) as channel:
        await bad.stream.send_all(data)
        frames = await bad.read_frames()
        assert goaway_of(frames).error_code != 0
        assert reason in caplog.text
        assert (await EchoServiceClient(channel).unary(UnaryRequest(text="x"))).text == "x"


@settings(deadline=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.booleans(), st.lists(st.binary(max_size=60), max_size=6))
def test_any_bytes_after_the_preface(prefixed: bool, frames: list[bytes]) -> None:
    """Well-framed and unframed garbage: the connection ends or goes on, nothing else happens."""

    async def run() -> None:
        client_end, server_end = trio.testing.memory_stream_pair()
        server = Server([Echo()], reflection=False)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve_stream, server_end)
            with trio.move_on_after(60):
                await client_end.send_all(PREFACE + SETTINGS + SETTINGS_ACK)
                try:
                    for data in frames:
                        # Kind, flags and stream of the frame are the first bytes of the garbage.
                        head = (data[:3] + bytes(3))[:3]
                        framed = len(data).to_bytes(3, "big") + head[:2] + bytes(3) + head[2:] + data
                        await client_end.send_all(framed if prefixed else data)
                    await client_end.send_eof()
                except trio.BrokenResourceError:
                    pass
                while True:
                    try:
                        if not await client_end.receive_some(65_536):
                            break
                    except trio.BrokenResourceError:
                        break

    trio.run(run)


@pytest.mark.parametrize(
    ("flood", "reason"),
    [
        (PingFrame(0, b"12345678").serialize() * 1000, "control frames"),
        (SETTINGS * 1000, "control frames"),
        (b"\x00\x00\x05\x02\x00\x00\x00\x00\x0b\x00\x00\x00\x00\x10" * 1000, "control frames"),
        (b"\x00\x00\x04\x08\x00\x00\x00\x00\x00\x00\x00\x00\x01" * 4000, "WINDOW_UPDATE"),
    ],
)
async def test_floods_end_the_connection(flood: bytes, reason: str, caplog: pytest.LogCaptureFixture) -> None:
    async with raw_client(Server([Echo()])) as client:
        await client.handshake()
        await client.stream.send_all(flood)
        assert goaway_of(await client.read_frames()).error_code == 0xB
    assert reason in caplog.text


async def test_rapid_reset_ends_the_connection(caplog: pytest.LogCaptureFixture) -> None:
    async with raw_client(Server([Echo()])) as client:
        await client.handshake()
        for _ in range(500):
            client.h2.reset_stream(client.request(), 8)
        await client.flush()
        assert goaway_of(await client.read_frames()).error_code == 0xB
    assert "reset" in caplog.text


async def test_resets_that_the_server_is_made_to_send_count_too(caplog: pytest.LogCaptureFixture) -> None:
    """CVE-2025-8671: the peer breaks a rule of each stream rather than resetting it."""
    async with raw_client(Server([Echo()])) as client:
        await client.handshake()
        data = b""
        for _ in range(500):
            stream_id = client.request(end=True)
            data += client.h2.data_to_send()
            data += b"\x00\x00\x00\x00\x01" + struct.pack(">I", stream_id)  # DATA after the end
        await client.stream.send_all(data)
        goaway_of(await client.read_frames())
    assert "closing the connection" in caplog.text


async def test_too_many_streams_are_refused_one_by_one() -> None:
    echo = Echo()
    async with raw_client(Server([echo], config=ConnectionConfig(max_concurrent_streams=3))) as client:
        await client.handshake()
        ids = [client.request() for _ in range(5)]
        await client.flush()
        frames = await client.read_frames(
            lambda frame: isinstance(frame, RstStreamFrame) and frame.stream_id == ids[-1]
        )
        refused = {frame.stream_id: frame.error_code for frame in frames if isinstance(frame, RstStreamFrame)}
        assert refused == {ids[3]: 7, ids[4]: 7}
        # The others are served.
        client.h2.send_data(ids[0], frame_message(b""), end_stream=True)
        await client.flush()
        await client.read_frames(lambda frame: isinstance(frame, HeadersFrame) and frame.stream_id == ids[0])


async def test_a_header_list_over_the_limit(caplog: pytest.LogCaptureFixture) -> None:
    async with raw_client(Server([Echo()])) as client:
        await client.handshake()
        client.request([*HEADERS, *((f"key-{number}", "x" * 1000) for number in range(40))])
        await client.flush()
        assert goaway_of(await client.read_frames()).error_code != 0
    assert "closing the connection" in caplog.text


async def test_an_endless_header_block(caplog: pytest.LogCaptureFixture) -> None:
    async with raw_client(Server([Echo()])) as client:
        await client.handshake()
        start = b"\x00\x40\x00\x01\x00\x00\x00\x00\x01" + bytes(16_384)
        more = b"\x00\x40\x00\x09\x00\x00\x00\x00\x01" + bytes(16_384)
        await client.stream.send_all(start + more * 10)
        assert goaway_of(await client.read_frames()).error_code == 0xB
    assert "header block" in caplog.text


async def test_a_client_that_says_nothing(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with raw_client(Server([Echo()])) as client:
        frames = await client.read_frames()
        assert goaway_of(frames).error_code == 4  # SETTINGS_TIMEOUT
    assert "within 10 s" in caplog.text


async def test_a_client_that_never_acknowledges_settings(autojump_clock: trio.testing.MockClock) -> None:
    async with raw_client(Server([Echo()])) as client:
        await client.stream.send_all(PREFACE + SETTINGS)
        assert goaway_of(await client.read_frames()).error_code == 4


async def test_a_client_that_sends_but_does_not_read(caplog: pytest.LogCaptureFixture) -> None:
    client_end, server_end = trio.testing.lockstep_stream_pair()
    limits = FloodLimits(control_burst=10**9)
    server = Server([Echo()], config=ConnectionConfig(flood_limits=limits, max_backlog=100_000))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, server_end)
        with pytest.raises(trio.BrokenResourceError):
            await client_end.send_all(PREFACE + SETTINGS)
            while True:
                await client_end.send_all(PingFrame(0, b"12345678").serialize() * 1000)
    assert "does not read" in caplog.text


async def test_a_client_with_wide_windows_may_read_late() -> None:
    """A large response that waits to be read is not taken for a backlog of answers to a flood."""
    client_end, server_end = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Server([Echo()]).serve_stream, server_end)
        client = RawClient(client_end)
        codes = h2.settings.SettingCodes
        client.h2.local_settings = h2.settings.Settings(
            initial_values={codes.MAX_FRAME_SIZE: 2**24 - 1, codes.INITIAL_WINDOW_SIZE: 2**31 - 1}
        )
        client.h2.max_inbound_frame_size = 2**24 - 1
        client.h2.initiate_connection()
        client.h2.increment_flow_control_window(2**30)
        await client.flush()
        stream_id = client.request([(key, value.replace("Unary", "ServerStream")) for key, value in HEADERS])
        request = bytes(ServerStreamRequest(count=4, payload_size=4 * 2**20))
        client.h2.send_data(stream_id, frame_message(request), end_stream=True)
        await client.flush()
        for _ in range(50):
            client.h2.ping(b"12345678")
            await client.flush()
        received = 0
        while True:
            events = client.h2.receive_data(await client_end.receive_some(2**20))
            received += sum(len(event.data) for event in events if isinstance(event, h2.events.DataReceived))
            if any(isinstance(event, h2.events.TrailersReceived) for event in events):
                break
        assert received > 16 * 2**20
        nursery.cancel_scope.cancel()


async def test_a_huge_encoder_table_is_not_used() -> None:
    async with raw_client(Server([Echo()])) as client:
        client.h2.local_settings.header_table_size = 2**31
        await client.handshake()
        stream_id = client.request()
        client.h2.send_data(stream_id, frame_message(b""), end_stream=True)
        await client.flush()
        await client.events(h2.events.TrailersReceived)


@pytest.mark.parametrize(
    ("change", "status"),
    [({":method": "GET"}, "405"), ({"content-type": "text/plain"}, "415"), ({"content-type": None}, "415")],
)
async def test_what_is_not_grpc_gets_an_http_status(change: dict[str, str | None], status: str) -> None:
    async with raw_client(Server([Echo()])) as client:
        await client.handshake()
        merged = {**dict(HEADERS), **change}
        client.request([(key, value) for key, value in merged.items() if value is not None], end=True)
        await client.flush()
        event = await client.events(h2.events.ResponseReceived)
        assert (b":status", status.encode()) in [tuple(pair) for pair in event.headers]


@pytest.mark.parametrize(
    ("headers", "data", "code"),
    [
        ([("grpc-timeout", "soon")], frame_message(b""), 13),
        ([("grpc-encoding", "snappy")], frame_message(b""), 12),
        ([], b"\x01\x00\x00\x00\x01x", 12),  # compressed
        ([], b"\x07\x00\x00\x00\x01x", 13),
        ([], b"\x00\x00\x00\x00\x05x", 13),  # the end within a message
        ([], b"\x00\xff\xff\xff\xff", 8),
        ([], b"", 12),  # no message
        ([], frame_message(b"") * 2, 12),
        ([], frame_message(b"\xff"), 3),
        ([("grpc-timeout", "0n")], frame_message(b""), 4),
    ],
)
async def test_calls_that_break_the_protocol(headers: list[tuple[str, str]], data: bytes, code: int) -> None:
    async with raw_client(Server([Echo()])) as client:
        await client.handshake()
        stream_id = client.request([*HEADERS, *headers])
        client.h2.send_data(stream_id, data, end_stream=True)
        await client.flush()
        event = await client.events((h2.events.ResponseReceived, h2.events.TrailersReceived))  # type: ignore[arg-type]
        assert dict(event.headers)[b"grpc-status"] == str(code).encode()
        # The connection is still good.
        client.h2.send_data(client.request(), frame_message(b""), end_stream=True)
        await client.flush()
        await client.events(h2.events.TrailersReceived)


# The client against scripted servers.


class RawServer:
    """A server that answers what it is told to."""

    def __init__(self, stream: trio.abc.Stream) -> None:
        self.stream = stream
        self._complete: list[int] = []
        self.h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(client_side=False, validate_outbound_headers=False)
        )

    async def flush(self) -> None:
        data = self.h2.data_to_send()
        if data:
            await self.stream.send_all(data)

    async def next_request(self) -> int:
        """The stream of the next request that is complete."""
        while not self._complete:
            data = await self.stream.receive_some(65_536)
            assert data, "the client closed the connection"
            events = self.h2.receive_data(data)
            await self.flush()
            self._complete += [event.stream_id for event in events if isinstance(event, h2.events.StreamEnded)]
        return self._complete.pop(0)

    def respond(self, stream_id: int, data: bytes = frame_message(b"\x0a\x01x")) -> None:
        self.h2.send_headers(stream_id, [(":status", "200"), ("content-type", "application/grpc")])
        self.h2.send_data(stream_id, data)
        self.h2.send_headers(stream_id, [("grpc-status", "0")], end_stream=True)


Script = Callable[[RawServer], Any]


@asynccontextmanager
async def scripted(script: Script, **options: Any) -> AsyncIterator[EchoServiceClient]:
    """A client of a server that runs `script` after the handshake."""
    client_end, server_end = trio.testing.memory_stream_pair()

    async def serve() -> None:
        server = RawServer(server_end)
        server.h2.initiate_connection()
        await server.flush()
        await script(server)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(serve)
        async with open_channel(client_end, **options) as channel:
            client = EchoServiceClient(channel)
            yield client
        nursery.cancel_scope.cancel()


async def test_calls_that_end_in_the_same_packet_as_one_that_was_held_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call whose credit was deferred has ended on the wire when it is its turn: no violation by anybody."""
    monkeypatch.setattr("taploom.rpc.connection._INCOMPLETE_LIMIT", 100)
    message = frame_message(bytes(UnaryResponse(payload=bytes(1000))))

    async def script(server: RawServer) -> None:
        streams = [await server.next_request() for _ in range(2)]
        for stream_id in streams:
            server.h2.send_headers(stream_id, [(":status", "200"), ("content-type", "application/grpc")])
            server.h2.send_data(stream_id, message[:500])
        await server.flush()
        for stream_id in streams:
            server.h2.send_data(stream_id, message[500:])
            server.h2.send_headers(stream_id, [("grpc-status", "0")], end_stream=True)
        await server.flush()
        server.respond(await server.next_request())
        await server.flush()

    sizes: list[int] = []
    async with scripted(script) as client:

        async def one() -> None:
            sizes.append(len((await client.unary(UnaryRequest(text="a"))).payload))

        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(one)
        assert sizes == [1000, 1000]
        assert (await client.unary(UnaryRequest(text="b"))).text == "x"


async def call_against(script: Script) -> RpcError:
    """The error of a unary call."""
    caught: RpcError | None = None
    async with scripted(script) as client:
        try:
            await client.unary(UnaryRequest())
        except RpcError as error:
            caught = error
    assert caught is not None
    return caught


def answers(*frames: Callable[[RawServer, int], None]) -> Script:
    async def script(server: RawServer) -> None:
        stream_id = await server.next_request()
        for frame in frames:
            frame(server, stream_id)
        await server.flush()
        await trio.sleep_forever()

    return script


GRPC = [(":status", "200"), ("content-type", "application/grpc")]


@pytest.mark.parametrize(
    ("script", "code", "message"),
    [
        (
            answers(lambda s, i: s.h2.send_headers(i, [*GRPC, ("grpc-status", "5")], end_stream=True)),
            StatusCode.NOT_FOUND,
            "",
        ),
        (answers(lambda s, i: s.h2.send_headers(i, GRPC, end_stream=True)), StatusCode.INTERNAL, "without a status"),
        (
            answers(lambda s, i: s.h2.send_headers(i, [*GRPC, ("grpc-status", "99")], end_stream=True)),
            StatusCode.UNKNOWN,
            "",
        ),
        (
            answers(lambda s, i: s.h2.send_headers(i, [(":status", "503")], end_stream=True)),
            StatusCode.UNAVAILABLE,
            "HTTP status 503",
        ),
        (
            answers(
                lambda s, i: s.h2.send_headers(i, [(":status", "404"), ("content-type", "text/html")]),
                lambda s, i: s.h2.send_data(i, b"<html>not here</html>", end_stream=True),
            ),
            StatusCode.UNIMPLEMENTED,
            "HTTP status 404",
        ),
        (
            answers(
                lambda s, i: s.h2.send_headers(i, [(":status", "200"), ("content-type", "text/html")]),
                lambda s, i: s.h2.send_data(i, b"<html>hello</html>", end_stream=True),
            ),
            StatusCode.UNKNOWN,
            "text/html",
        ),
        (answers(lambda s, i: s.h2.reset_stream(i, 8)), StatusCode.CANCELLED, "reset"),
        (answers(lambda s, i: s.h2.reset_stream(i, 2)), StatusCode.INTERNAL, "reset"),
        (answers(lambda s, i: s.h2.reset_stream(i, 0xB)), StatusCode.RESOURCE_EXHAUSTED, "reset"),
        (
            answers(lambda s, i: s.respond(i, b"\x01\x00\x00\x00\x01x")),
            StatusCode.INTERNAL,
            "compressed",
        ),
        (answers(lambda s, i: s.respond(i, frame_message(b"\xff"))), StatusCode.INTERNAL, "malformed response"),
        (answers(lambda s, i: s.respond(i, frame_message(b"") * 2)), StatusCode.UNIMPLEMENTED, "several responses"),
        (answers(lambda s, i: s.respond(i, b"")), StatusCode.UNIMPLEMENTED, "without a response"),
    ],
)
async def test_statuses(script: Script, code: StatusCode, message: str) -> None:
    error = await call_against(script)
    assert error.code is code
    assert message in error.message


async def test_trailers_followed_by_a_reset_are_a_success() -> None:
    async def script(server: RawServer) -> None:
        while True:
            data = await server.stream.receive_some(65_536)
            if not data:
                return
            for event in server.h2.receive_data(data):
                if isinstance(event, h2.events.RequestReceived):
                    server.respond(event.stream_id)
                    await server.flush()
                    await server.stream.send_all(RstStreamFrame(event.stream_id, error_code=0).serialize())
            await server.flush()

    async with scripted(script) as client, client.bidi() as call:
        await call.send(BidiRequest())
        await trio.testing.wait_all_tasks_blocked()
        assert [item.text async for item in call] == ["x"]


async def test_informational_responses_are_skipped() -> None:
    def early(server: RawServer, stream_id: int) -> None:
        server.h2.send_headers(stream_id, [(":status", "103")])
        server.respond(stream_id)

    async with scripted(answers(early)) as client:
        assert (await client.unary(UnaryRequest())).text == "x"


async def test_a_refused_call_is_tried_again() -> None:
    async def script(server: RawServer) -> None:
        for _ in range(2):
            server.h2.reset_stream(await server.next_request(), 7)
            await server.flush()
        server.respond(await server.next_request())
        await server.flush()
        await trio.sleep_forever()

    async with scripted(script) as client:
        assert (await client.unary(UnaryRequest())).text == "x"


async def test_a_call_that_is_always_refused_fails(autojump_clock: trio.testing.MockClock) -> None:
    async def script(server: RawServer) -> None:
        for _ in range(7):
            server.h2.reset_stream(await server.next_request(), 7)
            await server.flush()
        await trio.sleep_forever()

    async with scripted(script, keepalive=None) as client:
        with pytest.raises(RpcError) as caught:
            await client.unary(UnaryRequest())
    assert caught.value.code is StatusCode.UNAVAILABLE


async def test_goaway_fails_later_calls_and_lets_earlier_ones_finish() -> None:
    """Also a GOAWAY in two steps, as servers that drain send it."""
    seen = trio.Event()

    async def script(server: RawServer) -> None:
        first = await server.next_request()
        second = await server.next_request()
        await server.stream.send_all(goaway_frame(2**31 - 1))
        await server.stream.send_all(goaway_frame(first, 0, b"bye"))
        await seen.wait()
        server.respond(first)
        await server.flush()
        assert second > first
        await trio.sleep_forever()

    results: list[str] = []
    client_end, server_end = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:

        async def serve() -> None:
            server = RawServer(server_end)
            server.h2.initiate_connection()
            await server.flush()
            await script(server)

        nursery.start_soon(serve)
        async with open_channel(client_end) as channel:
            client = EchoServiceClient(channel)

            async def first() -> None:
                results.append((await client.unary(UnaryRequest())).text)

            nursery.start_soon(first)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(RpcError, match="before it took the call") as caught:
                await client.unary(UnaryRequest())
            assert caught.value.code is StatusCode.UNAVAILABLE
            assert channel.closed
            seen.set()
            await channel.wait_closed()
            assert results == ["x"]
        nursery.cancel_scope.cancel()


async def test_a_server_without_http2(caplog: pytest.LogCaptureFixture) -> None:
    client_end, server_end = trio.testing.memory_stream_pair()
    await server_end.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")
    with pytest.raises(RpcError, match=r"does not speak HTTP/2|bytes") as caught:
        async with open_channel(client_end):
            raise AssertionError("opened")
    assert caught.value.code is StatusCode.UNAVAILABLE


async def test_a_server_that_says_nothing(autojump_clock: trio.testing.MockClock) -> None:
    client_end, _server_end = trio.testing.memory_stream_pair()
    with pytest.raises(RpcError, match="within 10 s"):
        async with open_channel(client_end):
            raise AssertionError("opened")


async def test_a_server_that_floods_is_left() -> None:
    async def script(server: RawServer) -> None:
        await server.next_request()
        await server.stream.send_all(PingFrame(0, b"12345678").serialize() * 1000)
        await trio.sleep_forever()

    error = await call_against(script)
    assert error.code is StatusCode.UNAVAILABLE
    assert "control frames" in error.message


async def test_a_server_that_pushes_is_left() -> None:
    async def script(server: RawServer) -> None:
        await server.next_request()
        await server.stream.send_all(b"\x00\x00\x04\x05\x04\x00\x00\x00\x01\x00\x00\x00\x02")
        await trio.sleep_forever()

    assert (await call_against(script)).code is StatusCode.UNAVAILABLE


async def test_keepalive_finds_a_silent_server(autojump_clock: trio.testing.MockClock) -> None:
    pings: list[float] = []

    async def script(server: RawServer) -> None:
        await server.next_request()
        while True:
            data = await server.stream.receive_some(65_536)
            if not data:
                return
            server.h2.receive_data(data)
            server.h2.data_to_send()  # and nothing is sent
            pings.append(trio.current_time())

    start = trio.current_time()
    async with scripted(script, keepalive=20.0) as client:
        with pytest.raises(RpcError, match="did not answer a PING") as caught:
            await client.unary(UnaryRequest())
    assert caught.value.code is StatusCode.UNAVAILABLE
    assert pings[0] - start == pytest.approx(20, abs=1)


async def test_keepalive_asks_only_while_calls_are_live(autojump_clock: trio.testing.MockClock) -> None:
    echo = Echo()
    async with memory_pair(Server([echo])) as stream, open_channel(stream, keepalive=5.0) as channel:
        client = EchoServiceClient(channel)
        await client.unary(UnaryRequest())
        await trio.sleep(10_000)
        assert not channel.closed
        async with client.server_stream(ServerStreamRequest(count=1, behaviour="wait")) as responses:
            await responses.receive()
            await trio.sleep(10_000)  # the server answers every PING
            echo.release.set()
            assert await responses.receive() is None

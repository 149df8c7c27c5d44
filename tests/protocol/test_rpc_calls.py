"""Calls between our client and our server, over in-memory streams and Unix sockets."""

import logging
import math
from pathlib import Path
from random import Random

import pytest
import trio
import trio.testing
from rpc_support import DESCRIPTORS, SERVICE, Echo, connect_unix, memory_pair, open_unix_listener, serving
from rpc_testing.taploomtest.echo.v1 import (
    BidiRequest,
    ClientStreamRequest,
    ServerStreamRequest,
    UnaryRequest,
)
from rpc_testing.taploomtest.echo.v1.rpc import EchoServiceClient

from taploom.rpc import (
    ConnectionConfig,
    RpcError,
    SendStream,
    Server,
    ServerContext,
    StatusCode,
    open_channel,
)
from taploom.rpc.gate import FloodLimits
from taploom.rpc.health import CHECK, WATCH, HealthCheckRequest, ServingStatus
from taploom.rpc.service import Method
from taploom.rpc.status import unpack_any


def echo_server(echo: Echo | None = None, **options: object) -> Server:
    return Server([echo or Echo()], descriptor_sets=[DESCRIPTORS], **options)  # type: ignore[arg-type]


async def test_all_four_shapes() -> None:
    async with memory_pair(echo_server()) as stream, open_channel(stream) as channel:
        client = EchoServiceClient(channel)
        response = await client.unary(UnaryRequest(text="ü", payload=b"\x00\xff"), timeout=5.0, metadata=None)
        assert (response.text, response.payload) == ("ü", b"\x00\xff")
        async with client.server_stream(ServerStreamRequest(text="s", count=5)) as responses:
            assert [item.number async for item in responses] == [0, 1, 2, 3, 4]
            assert await responses.receive() is None
        async with client.client_stream() as call:
            for _ in range(7):
                await call.send(ClientStreamRequest(payload=b"123"))
            result = await call.finish()
        assert (result.count, result.size) == (7, 21)
        async with client.bidi() as bidi:
            for text in ("a", "b"):
                await bidi.send(BidiRequest(text=text))
                answer = await bidi.receive()
                assert answer is not None
                assert answer.text == text
            await bidi.done_writing()
            assert [item async for item in bidi] == []
        assert not channel.closed
    assert channel.closed


async def test_empty_messages_and_empty_streams() -> None:
    async with memory_pair(echo_server()) as stream, open_channel(stream) as channel:
        client = EchoServiceClient(channel)
        assert (await client.unary(UnaryRequest())).text == ""
        async with client.server_stream(ServerStreamRequest()) as responses:
            assert [item async for item in responses] == []
        async with client.client_stream() as call:
            assert (await call.finish()).count == 0


async def test_streams_that_deliver_byte_by_byte() -> None:
    client_end, server_end = trio.testing.lockstep_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo_server().serve_stream, server_end)
        async with open_channel(client_end) as channel:
            assert (await EchoServiceClient(channel).unary(UnaryRequest(text="x"))).text == "x"


async def test_many_calls_at_once_wait_for_the_stream_limit() -> None:
    """150 tasks on a connection that allows 10 streams: nobody fails, nobody waits for ever."""
    server = echo_server(config=ConnectionConfig(max_concurrent_streams=10))
    done: list[str] = []
    async with memory_pair(server) as stream, open_channel(stream) as channel:
        client = EchoServiceClient(channel)

        async def one(number: int) -> None:
            response = await client.unary(UnaryRequest(text=str(number), payload=bytes(number * 200)))
            done.append(response.text)

        async with trio.open_nursery() as nursery:
            for number in range(150):
                nursery.start_soon(one, number)
    assert sorted(map(int, done)) == list(range(150))


async def test_messages_up_to_the_limit_and_over_it() -> None:
    limit = 4 * 2**20
    async with memory_pair(echo_server()) as stream, open_channel(stream) as channel:
        client = EchoServiceClient(channel)
        payload = bytes(limit - 10)
        assert (await client.unary(UnaryRequest(payload=payload))).payload == payload
        with pytest.raises(RpcError) as caught:
            await client.unary(UnaryRequest(payload=bytes(limit + 1)))
        assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(RpcError) as caught:
            async with client.server_stream(ServerStreamRequest(count=1, payload_size=limit + 1)) as responses:
                await responses.receive()
        assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED
        assert (await client.unary(UnaryRequest(text="still here"))).text == "still here"


async def test_several_large_messages_at_once() -> None:
    """Together over the limit for incomplete messages: they take turns rather than block each other."""
    async with memory_pair(echo_server()) as stream, open_channel(stream) as channel:
        client = EchoServiceClient(channel)
        sizes: list[int] = []

        async def one() -> None:
            response = await client.unary(UnaryRequest(payload=bytes(3 * 2**20)))
            sizes.append(len(response.payload))

        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(one)
    assert sizes == [3 * 2**20] * 8


async def test_a_slow_reader_holds_the_sender_back() -> None:
    echo = Echo()
    config = ConnectionConfig(stream_window=65_536)
    async with memory_pair(echo_server(echo)) as stream, open_channel(stream, config=config) as channel:
        client = EchoServiceClient(channel)
        async with client.server_stream(ServerStreamRequest(count=1000, payload_size=10_000)) as responses:
            assert await responses.receive() is not None
            await trio.testing.wait_all_tasks_blocked()
            assert echo.sent < 50
            # Another call is not held back by it.
            assert (await client.unary(UnaryRequest(text="x"))).text == "x"
            count = 1
            async for _ in responses:
                count += 1
            assert count == 1000


async def test_abandoned_streams_give_their_credit_back() -> None:
    """Far more than the connection's window is left unread, a part in each of many calls."""
    async with memory_pair(echo_server()) as stream, open_channel(stream) as channel:
        client = EchoServiceClient(channel)
        for _ in range(30):
            async with client.server_stream(ServerStreamRequest(count=100, payload_size=20_000)) as responses:
                await responses.receive()
                await trio.testing.wait_all_tasks_blocked()
        assert len((await client.unary(UnaryRequest(payload=bytes(2**20)))).payload) == 2**20


async def test_status_with_message_details_and_metadata() -> None:
    async with memory_pair(echo_server()) as stream, open_channel(stream) as channel:
        with pytest.raises(RpcError) as caught:
            await EchoServiceClient(channel).unary(UnaryRequest(behaviour="not found"))
    error = caught.value
    assert error.code is StatusCode.NOT_FOUND
    assert error.message == "kein Netz: 100% wäg\n"
    assert unpack_any(error.details[0]) == ("type.googleapis.com/test.Detail", b"\x08\x07")
    assert ("why", "because") in error.metadata
    assert ("why-bin", b"\x00\xff") in error.metadata


async def test_an_error_from_a_handlers_nursery_is_its_status() -> None:
    async with memory_pair(echo_server()) as stream, open_channel(stream) as channel:
        with pytest.raises(RpcError) as caught:
            await EchoServiceClient(channel).unary(UnaryRequest(behaviour="grouped error"))
    assert caught.value.code is StatusCode.ABORTED


async def test_a_crash_in_a_handler_is_logged_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    async with memory_pair(echo_server()) as stream, open_channel(stream) as channel:
        client = EchoServiceClient(channel)
        with pytest.raises(RpcError) as caught:
            await client.unary(UnaryRequest(behaviour="crash"))
        assert (await client.unary(UnaryRequest(text="x"))).text == "x"
    assert caught.value.code is StatusCode.INTERNAL
    assert "secret" not in str(caught.value)
    assert "ZeroDivisionError" in caplog.text


async def test_an_error_that_cannot_be_sent_ends_its_call_only(caplog: pytest.LogCaptureFixture) -> None:
    async with memory_pair(echo_server()) as stream, open_channel(stream) as channel:
        client = EchoServiceClient(channel)
        with pytest.raises(RpcError) as caught:
            await client.unary(UnaryRequest(behaviour="bad metadata"))
        assert caught.value.code is StatusCode.INTERNAL
        assert (await client.unary(UnaryRequest(text="x"))).text == "x"
    assert "could not be answered" in caplog.text


async def test_the_error_of_a_call_is_not_wrapped_in_a_group() -> None:
    method = Method(
        "/no.Service/Method",
        HealthCheckRequest,
        HealthCheckRequest,
        client_streaming=False,
        server_streaming=False,
    )
    client_end, server_end = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo_server().serve_stream, server_end)
        with pytest.raises(RpcError, match=r"no service 'no\.Service'") as caught:
            async with open_channel(client_end) as channel:
                await channel.unary_unary(method, HealthCheckRequest())
    assert type(caught.value) is RpcError
    assert caught.value.code is StatusCode.UNIMPLEMENTED


async def test_any_exception_leaves_open_channel_unwrapped() -> None:
    client_end, server_end = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo_server().serve_stream, server_end)
        with pytest.raises(KeyError) as caught:
            async with open_channel(client_end):
                raise KeyError("mine")
        assert type(caught.value) is KeyError


async def test_cancelling_around_a_channel() -> None:
    client_end, server_end = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo_server().serve_stream, server_end)
        with trio.CancelScope() as scope:
            async with open_channel(client_end) as channel:
                scope.cancel()
                await EchoServiceClient(channel).unary(UnaryRequest(behaviour="hang"))
        assert scope.cancelled_caught


async def test_metadata_both_ways() -> None:
    echo = Echo()
    async with memory_pair(echo_server(echo)) as stream, open_channel(stream) as channel:
        client = EchoServiceClient(channel)
        metadata = [("key", "one"), ("key", "two"), ("key-bin", b"\x00\x01,")]
        async with client.server_stream(
            ServerStreamRequest(count=0, behaviour="metadata"), metadata=metadata
        ) as responses:
            initial = await responses.initial_metadata()
            assert [item async for item in responses] == []
            trailing = responses.trailing_metadata
    assert [pair for pair in echo.metadata if pair[0].startswith("key")] == metadata
    assert ("initial", "1") in initial
    assert ("initial-bin", b"\x01\xfe") in initial
    assert trailing == (("trailing", "2"), ("trailing-bin", b"\x02\xfd"))


async def test_a_deadline_ends_the_call_on_both_sides(autojump_clock: trio.testing.MockClock) -> None:
    echo = Echo()
    async with memory_pair(echo_server(echo)) as stream, open_channel(stream, keepalive=None) as channel:
        client = EchoServiceClient(channel)
        with pytest.raises(RpcError) as caught:
            await client.unary(UnaryRequest(behaviour="hang"), timeout=7.0)
        await echo.cancelled.wait()
        assert (await client.unary(UnaryRequest(text="x"))).text == "x"
    assert caught.value.code is StatusCode.DEADLINE_EXCEEDED
    assert echo.remaining == math.inf  # of the last call
    assert trio.current_time() - autojump_clock.current_time() == pytest.approx(0.0)


async def test_the_server_enforces_the_deadline_by_itself(autojump_clock: trio.testing.MockClock) -> None:
    echo = Echo()
    async with memory_pair(echo_server(echo)) as stream, open_channel(stream, keepalive=None) as channel:
        client = EchoServiceClient(channel)
        async with client.server_stream(ServerStreamRequest(count=1, behaviour="hang"), timeout=3.0) as responses:
            assert await responses.receive() is not None
            await echo.cancelled.wait()  # without the client doing anything
            assert echo.remaining == pytest.approx(3.0, abs=0.01)
            with pytest.raises(RpcError) as caught:
                await responses.receive()
    assert caught.value.code is StatusCode.DEADLINE_EXCEEDED


async def test_a_deadline_covers_the_wait_for_a_stream(autojump_clock: trio.testing.MockClock) -> None:
    echo = Echo()
    server = echo_server(echo, config=ConnectionConfig(max_concurrent_streams=1))
    async with memory_pair(server) as stream, open_channel(stream, keepalive=None) as channel:
        client = EchoServiceClient(channel)
        async with client.server_stream(ServerStreamRequest(count=1, behaviour="hang")) as responses:
            await responses.receive()
            with pytest.raises(RpcError) as caught:
                await client.unary(UnaryRequest(), timeout=2.0)
            assert caught.value.code is StatusCode.DEADLINE_EXCEEDED
        assert (await client.unary(UnaryRequest(text="x"), timeout=2.0)).text == "x"


async def test_leaving_a_call_cancels_its_handler() -> None:
    echo = Echo()
    async with memory_pair(echo_server(echo)) as stream, open_channel(stream) as channel:
        client = EchoServiceClient(channel)
        async with client.server_stream(ServerStreamRequest(count=1, behaviour="hang")) as responses:
            await responses.receive()
        await echo.cancelled.wait()
        assert (await client.unary(UnaryRequest(text="x"))).text == "x"


async def test_cancelling_a_unary_call_cancels_its_handler() -> None:
    echo = Echo()
    async with memory_pair(echo_server(echo)) as stream, open_channel(stream) as channel:
        client = EchoServiceClient(channel)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.unary, UnaryRequest(behaviour="hang"))
            await echo.started.wait()
            nursery.cancel_scope.cancel()
        await echo.cancelled.wait()
        assert (await client.unary(UnaryRequest(text="x"))).text == "x"


async def test_a_send_cancelled_half_way_ends_its_call_and_nothing_else() -> None:
    echo = Echo()
    async with memory_pair(echo_server(echo)) as stream, open_channel(stream) as channel:
        client = EchoServiceClient(channel)
        async with client.client_stream() as call:
            await call.send(ClientStreamRequest(text="wait"))  # the handler reads no more now
            with trio.CancelScope() as scope:
                async with trio.open_nursery() as nursery:

                    async def cancel_when_blocked() -> None:
                        await trio.testing.wait_all_tasks_blocked()
                        scope.cancel()

                    nursery.start_soon(cancel_when_blocked)
                    while True:
                        await call.send(ClientStreamRequest(payload=bytes(300_000)))
            with pytest.raises(RpcError, match="in the middle of a message"):
                await call.send(ClientStreamRequest())
            with pytest.raises(RpcError, match="in the middle of a message"):
                await call.finish()  # rather than wait for an answer that cannot come
        assert (await client.unary(UnaryRequest(text="x"))).text == "x"


async def test_a_storm_of_cancelled_calls_leaves_a_good_connection() -> None:
    """Calls of all shapes, cancelled at random points: no credit, stream or handler is lost on the way."""
    random = Random(7)
    limits = FloodLimits(reset_burst=10**9)
    config = ConnectionConfig(flood_limits=limits)
    async with (
        memory_pair(echo_server(config=config)) as stream,
        open_channel(stream, config=config) as channel,
    ):
        client = EchoServiceClient(channel)

        async def unary(size: int) -> None:
            await client.unary(UnaryRequest(payload=bytes(size)))

        async def server_stream(size: int) -> None:
            async with client.server_stream(ServerStreamRequest(count=10, payload_size=size)) as responses:
                async for _ in responses:
                    if random.random() < 0.1:
                        break

        async def client_stream(size: int) -> None:
            async with client.client_stream() as call:
                for _ in range(random.randrange(6)):
                    await call.send(ClientStreamRequest(payload=bytes(size)))
                await call.finish()

        async def bidi(size: int) -> None:
            async with client.bidi() as call:
                for _ in range(random.randrange(6)):
                    await call.send(BidiRequest(payload=bytes(size)))
                    await call.receive()

        async def worker() -> None:
            for _ in range(6):
                steps = random.randrange(40)
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as nursery:
                        shape = random.choice([unary, server_stream, client_stream, bidi])
                        nursery.start_soon(shape, random.choice([0, 100, 30_000, 400_000]))
                        for _ in range(steps):
                            await trio.lowlevel.checkpoint()
                        scope.cancel()

        async with trio.open_nursery() as nursery:
            for _ in range(30):
                nursery.start_soon(worker)
        response = await client.unary(UnaryRequest(payload=bytes(3 * 2**20)))
        assert len(response.payload) == 3 * 2**20


async def test_a_server_that_ends_early_is_heard_by_a_client_that_still_sends() -> None:
    async with memory_pair(echo_server()) as stream, open_channel(stream) as channel:
        client = EchoServiceClient(channel)
        async with client.client_stream() as call:
            with pytest.raises(RpcError) as caught:
                while True:
                    await call.send(ClientStreamRequest(text="not found", payload=bytes(10_000)))
            assert caught.value.code is StatusCode.NOT_FOUND
        async with client.bidi() as bidi:
            await bidi.send(BidiRequest(text="stop"))
            assert [item.text async for item in bidi] == ["stop"]  # OK, although we have not finished
            with pytest.raises(RpcError, match="ended the call"):
                await bidi.send(BidiRequest())
            await bidi.done_writing()


async def test_requests_that_break_the_wire_check_are_refused() -> None:
    class Raw:
        def __init__(self, data: bytes) -> None:
            self.data = data

        def __bytes__(self) -> bytes:
            return self.data

        @classmethod
        def parse(cls, data: bytes) -> "Raw":
            return cls(data)

    method = Method(f"/{SERVICE}/Unary", Raw, Raw, client_streaming=False, server_streaming=False)
    for data in (b"\x0a\x05a", b"\x08\x01", b"\x0a\x01\xff", b"\x0b\x0c"):
        async with memory_pair(echo_server()) as stream, open_channel(stream) as channel:
            with pytest.raises(RpcError, match="malformed request") as caught:
                await channel.unary_unary(method, Raw(data))
            assert caught.value.code is StatusCode.INVALID_ARGUMENT


async def test_responses_that_break_the_wire_check_are_refused() -> None:
    class Liar(Echo):
        async def server_stream(
            self, request: ServerStreamRequest, stream: SendStream[object], context: ServerContext
        ) -> None:
            await stream.send(b"\x12\x01\xff")

    async with memory_pair(echo_server(Liar())) as stream, open_channel(stream) as channel:
        client = EchoServiceClient(channel)
        with pytest.raises(RpcError, match="malformed response") as caught:
            async with client.server_stream(ServerStreamRequest(count=1)) as responses:
                await responses.receive()
        assert caught.value.code is StatusCode.INTERNAL


async def test_health() -> None:
    server = echo_server()
    async with memory_pair(server) as stream, open_channel(stream) as channel:
        for name in ("", SERVICE):
            response = await channel.unary_unary(CHECK, HealthCheckRequest(name))
            assert response.status is ServingStatus.SERVING
        with pytest.raises(RpcError) as caught:
            await channel.unary_unary(CHECK, HealthCheckRequest("no.Such"))
        assert caught.value.code is StatusCode.NOT_FOUND
        async with channel.unary_stream(WATCH, HealthCheckRequest(SERVICE)) as watch:
            first = await watch.receive()
            server.health.set(SERVICE, False)
            second = await watch.receive()
            server.health.set(SERVICE, True)
            third = await watch.receive()
        assert [item and item.status for item in (first, second, third)] == [
            ServingStatus.SERVING,
            ServingStatus.NOT_SERVING,
            ServingStatus.SERVING,
        ]
        async with channel.unary_stream(WATCH, HealthCheckRequest("later")) as watch:
            unknown = await watch.receive()
            server.health.set("later", True)
            known = await watch.receive()
        assert unknown is not None
        assert unknown.status is ServingStatus.SERVICE_UNKNOWN
        assert known is not None
        assert known.status is ServingStatus.SERVING


async def test_drain_lets_calls_finish_and_takes_no_new_ones(tmp_path: Path) -> None:
    echo = Echo()
    server = echo_server(echo)
    path = tmp_path / "socket"
    async with serving(server, path) as nursery, open_channel(await connect_unix(path)) as channel:
        client = EchoServiceClient(channel)
        results: list[str] = []

        async def call() -> None:
            results.append((await client.unary(UnaryRequest(text="finished", behaviour="wait"))).text)

        async with channel.unary_stream(WATCH, HealthCheckRequest("")) as watch:
            await watch.receive()  # does not hold the drain up
            nursery.start_soon(call)
            await echo.started.wait()
            nursery.start_soon(server.drain, 60)
            change = await watch.receive()
            assert change is not None
            assert change.status is ServingStatus.NOT_SERVING
            while not channel.closed:
                await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(RpcError) as caught:
                await client.unary(UnaryRequest())
            assert caught.value.code is StatusCode.UNAVAILABLE
            with pytest.raises(OSError, match=r"refused|No such file"):
                await connect_unix(path)
            echo.release.set()
            with pytest.raises(RpcError):
                await watch.receive()
        await channel.wait_closed()
    assert results == ["finished"]


async def test_drain_cuts_off_what_does_not_finish(autojump_clock: trio.testing.MockClock) -> None:
    echo = Echo()
    server = echo_server(echo)
    client_end, server_end = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, server_end)
        async with open_channel(client_end, keepalive=None) as channel:

            async def hang() -> None:
                with pytest.raises(RpcError) as caught:
                    await EchoServiceClient(channel).unary(UnaryRequest(behaviour="hang"))
                assert caught.value.code is StatusCode.UNAVAILABLE

            nursery.start_soon(hang)
            await echo.started.wait()
            await server.drain(5)
            await echo.cancelled.wait()
            await channel.wait_closed()


async def test_drain_without_calls_ends_at_once() -> None:
    server = echo_server()
    client_end, server_end = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, server_end)
        async with open_channel(client_end) as channel:
            await EchoServiceClient(channel).unary(UnaryRequest())
            await server.drain(1000)
            await channel.wait_closed()
            assert channel.closed
            assert channel.close_reason is not None


async def test_closing_the_channel_cancels_its_calls() -> None:
    echo = Echo()
    async with memory_pair(echo_server(echo)) as stream, trio.open_nursery() as nursery:
        async with open_channel(stream) as channel:

            async def hang() -> None:
                with pytest.raises(RpcError) as caught:
                    await EchoServiceClient(channel).unary(UnaryRequest(behaviour="hang"))
                assert caught.value.code is StatusCode.UNAVAILABLE

            nursery.start_soon(hang)
            await echo.started.wait()
        await echo.cancelled.wait()


async def test_a_peer_that_vanishes_fails_the_calls(tmp_path: Path) -> None:
    echo = Echo()
    client_end, server_end = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(echo_server(echo).serve_stream, server_end)
        async with open_channel(client_end) as channel:
            nursery.start_soon(_vanish, echo, server_end)
            with pytest.raises(RpcError, match="connection lost") as caught:
                await EchoServiceClient(channel).unary(UnaryRequest(behaviour="hang"))
            assert caught.value.code is StatusCode.UNAVAILABLE
            await channel.wait_closed()
            with pytest.raises(RpcError, match="takes no more calls"):
                await EchoServiceClient(channel).unary(UnaryRequest())


async def _vanish(echo: Echo, stream: trio.abc.AsyncResource) -> None:
    await echo.started.wait()
    await trio.aclose_forcefully(stream)


async def test_no_more_connections_than_allowed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "socket"
    async with serving(echo_server(max_connections=2), path):
        async with open_channel(await connect_unix(path)) as one, open_channel(await connect_unix(path)) as two:
            with pytest.raises(RpcError, match="cannot open the channel"):
                async with open_channel(await connect_unix(path)):
                    pass
            for channel in (one, two):
                assert (await EchoServiceClient(channel).unary(UnaryRequest(text="x"))).text == "x"
        with trio.fail_after(60):
            while True:  # the two are gone as soon as the server has noticed
                try:
                    async with open_channel(await connect_unix(path)) as three:
                        assert (await EchoServiceClient(three).unary(UnaryRequest(text="y"))).text == "y"
                except RpcError:
                    continue
                break
    assert "refusing a connection" in caplog.text


async def test_accepting_goes_on_after_an_error(
    tmp_path: Path, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    class Flaky(trio.abc.Listener[trio.SocketStream]):
        def __init__(self, listener: trio.SocketListener) -> None:
            self.listener = listener
            self.failures = 3

        async def accept(self) -> trio.SocketStream:
            if self.failures:
                self.failures -= 1
                raise OSError(24, "Too many open files")
            return await self.listener.accept()

        async def aclose(self) -> None:
            await self.listener.aclose()

    autojump_clock.autojump_threshold = 0.05  # sockets are not seen by the clock
    path = tmp_path / "socket"
    async with trio.open_nursery() as nursery:
        await nursery.start(echo_server().serve, Flaky(await open_unix_listener(path)))
        async with open_channel(await connect_unix(path), keepalive=None) as channel:
            assert (await EchoServiceClient(channel).unary(UnaryRequest(text="x"))).text == "x"
        nursery.cancel_scope.cancel()
    assert caplog.text.count("Too many open files") == 3


async def test_logging_says_nothing_in_good_times(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with memory_pair(echo_server()) as stream, open_channel(stream) as channel:
        await EchoServiceClient(channel).unary(UnaryRequest())
    assert caplog.text == ""

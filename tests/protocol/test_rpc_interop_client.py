"""Our client against a grpcio server, on a Unix socket."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import trio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from rpc_support import GrpcioEcho, connect_unix, grpcio_server
from rpc_testing.taploomtest.echo.v1 import (
    BidiRequest,
    ClientStreamRequest,
    ServerStreamRequest,
    UnaryRequest,
)
from rpc_testing.taploomtest.echo.v1.rpc import EchoServiceClient

from taploom.rpc import ConnectionConfig, RpcError, StatusCode, open_channel
from taploom.rpc.health import CHECK, WATCH, HealthCheckRequest, ServingStatus
from taploom.rpc.status import unpack_any


class Peer:
    """A grpcio server."""

    def __init__(self, path: Path, echo: GrpcioEcho, server: grpc.Server) -> None:
        self.path = path
        self.echo = echo
        self.server = server


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    path = tmp_path / "socket"
    echo = GrpcioEcho()
    with grpcio_server(path, echo) as server:
        yield Peer(path, echo, server)
        echo.release.set()
        echo.cancelled.set()


async def test_all_four_shapes(peer: Peer) -> None:
    async with open_channel(await connect_unix(peer.path)) as channel:
        client = EchoServiceClient(channel)
        assert (await client.unary(UnaryRequest(text="ü"), timeout=30)).text == "ü"
        async with client.server_stream(ServerStreamRequest(count=100), timeout=30) as responses:
            assert [item.number async for item in responses] == list(range(100))
        async with client.client_stream(timeout=30) as call:
            for _ in range(200):
                await call.send(ClientStreamRequest(payload=bytes(1000)))
            assert (await call.finish()).size == 200_000
        async with client.bidi(timeout=30) as bidi:
            for number in range(50):
                await bidi.send(BidiRequest(text=str(number)))
                answer = await bidi.receive()
                assert answer is not None
                assert answer.text == str(number)
            await bidi.done_writing()
            assert await bidi.receive() is None


async def test_large_messages(peer: Peer) -> None:
    async with open_channel(await connect_unix(peer.path)) as channel:
        client = EchoServiceClient(channel)
        payload = bytes(4 * 2**20 - 20)
        assert (await client.unary(UnaryRequest(payload=payload), timeout=60)).payload == payload
        with pytest.raises(RpcError) as caught:
            await client.unary(UnaryRequest(payload=bytes(4 * 2**20 + 1)), timeout=60)
        assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED
        with pytest.raises(RpcError) as caught:
            async with client.server_stream(
                ServerStreamRequest(count=1, payload_size=5 * 2**20), timeout=60
            ) as responses:
                await responses.receive()
        assert caught.value.code is StatusCode.RESOURCE_EXHAUSTED
        total = 0
        async with client.server_stream(ServerStreamRequest(count=40, payload_size=500_000), timeout=60) as responses:
            async for item in responses:
                total += len(item.payload)
        assert total == 20_000_000


async def test_calls_at_once(peer: Peer) -> None:
    done: list[str] = []
    async with open_channel(await connect_unix(peer.path)) as channel:
        client = EchoServiceClient(channel)

        async def one(number: int) -> None:
            done.append((await client.unary(UnaryRequest(text=str(number)), timeout=60)).text)

        async with trio.open_nursery() as nursery:
            for number in range(300):
                nursery.start_soon(one, number)
    assert sorted(map(int, done)) == list(range(300))


async def test_a_server_with_few_streams(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    done: list[str] = []
    with grpcio_server(path, GrpcioEcho(), max_concurrent_streams=3):
        async with open_channel(await connect_unix(path)) as channel:
            client = EchoServiceClient(channel)

            async def one(number: int) -> None:
                done.append((await client.unary(UnaryRequest(text=str(number)), timeout=60)).text)

            async with trio.open_nursery() as nursery:
                for number in range(50):
                    nursery.start_soon(one, number)
    assert len(done) == 50


async def test_errors_with_details_and_metadata(peer: Peer) -> None:
    async with open_channel(await connect_unix(peer.path)) as channel:
        client = EchoServiceClient(channel)
        with pytest.raises(RpcError) as caught:
            await client.unary(UnaryRequest(behaviour="not found"), timeout=30)
        error = caught.value
        assert (error.code, error.message) == (StatusCode.NOT_FOUND, "kein Netz: 100% wäg\n")
        assert ("why", "because") in error.metadata
        assert ("why-bin", b"\x00\xff") in error.metadata
        assert unpack_any(error.details[0]) == ("type.googleapis.com/test.Detail", b"\x08\x07")
        with pytest.raises(RpcError) as caught:
            async with client.client_stream(timeout=30) as call:
                await call.send(ClientStreamRequest(text="not found"))
                await call.finish()
        assert caught.value.code is StatusCode.NOT_FOUND
        with pytest.raises(RpcError) as caught:
            await client.unary(UnaryRequest(behaviour="crash"), timeout=30)
        assert caught.value.code is StatusCode.UNKNOWN
        with pytest.raises(RpcError) as caught:
            await channel.unary_unary(CHECK, HealthCheckRequest(), timeout=30)  # not served there
        assert caught.value.code is StatusCode.UNIMPLEMENTED


async def test_metadata(peer: Peer) -> None:
    metadata: list[tuple[str, str | bytes]] = [("key", "one"), ("key", "two"), ("key-bin", b"\x00\x01,")]
    async with open_channel(await connect_unix(peer.path)) as channel:
        client = EchoServiceClient(channel)
        async with client.server_stream(
            ServerStreamRequest(behaviour="metadata"), metadata=metadata, timeout=30
        ) as responses:
            initial = await responses.initial_metadata()
            assert await responses.receive() is None
            trailing = responses.trailing_metadata
    assert [tuple(pair) for pair in peer.echo.metadata if pair[0].startswith("key")] == metadata
    assert {("initial", "1"), ("initial-bin", b"\x01\xfe")} <= set(initial)
    assert {("trailing", "2"), ("trailing-bin", b"\x02\xfd")} <= set(trailing)


async def test_deadline(peer: Peer) -> None:
    async with open_channel(await connect_unix(peer.path)) as channel:
        client = EchoServiceClient(channel)
        with pytest.raises(RpcError) as caught:
            await client.unary(UnaryRequest(behaviour="hang"), timeout=0.3)
        assert caught.value.code is StatusCode.DEADLINE_EXCEEDED
        assert await trio.to_thread.run_sync(peer.echo.cancelled.wait, 60)
        assert peer.echo.remaining is not None
        assert peer.echo.remaining <= 0.3


async def test_cancellation(peer: Peer) -> None:
    async with open_channel(await connect_unix(peer.path)) as channel:
        client = EchoServiceClient(channel)
        async with client.server_stream(ServerStreamRequest(count=1, behaviour="hang")) as responses:
            await responses.receive()
            assert await trio.to_thread.run_sync(peer.echo.started.wait, 60)
        assert await trio.to_thread.run_sync(peer.echo.cancelled.wait, 60)
        assert (await client.unary(UnaryRequest(text="x"), timeout=30)).text == "x"


async def test_a_server_that_ends_early(peer: Peer) -> None:
    async with open_channel(await connect_unix(peer.path)) as channel:
        client = EchoServiceClient(channel)
        async with client.bidi(timeout=60) as bidi:
            await bidi.send(BidiRequest(text="stop"))
            assert [item.text async for item in bidi] == ["stop"]


async def test_a_compressed_response_is_refused(tmp_path: Path) -> None:
    """We say that we take identity only; a server that compresses all the same is not understood."""
    path = tmp_path / "socket"
    gzip = int(grpc.Compression.Gzip)
    with grpcio_server(path, GrpcioEcho(), default_compression_algorithm=gzip):
        async with open_channel(await connect_unix(path)) as channel:
            client = EchoServiceClient(channel)
            with pytest.raises(RpcError, match="compressed") as caught:
                await client.unary(UnaryRequest(text="x" * 5000), timeout=30)
            assert caught.value.code is StatusCode.INTERNAL


async def test_goaway_lets_the_call_finish(peer: Peer) -> None:
    results: list[str] = []
    async with open_channel(await connect_unix(peer.path)) as channel, trio.open_nursery() as nursery:
        client = EchoServiceClient(channel)

        async def call() -> None:
            results.append((await client.unary(UnaryRequest(text="finished", behaviour="wait"))).text)

        nursery.start_soon(call)
        assert await trio.to_thread.run_sync(peer.echo.started.wait, 60)
        stopped = peer.server.stop(60)
        with trio.fail_after(60):
            while not channel.closed:
                await trio.testing.wait_all_tasks_blocked()
                await trio.to_thread.run_sync(stopped.wait, 0.01)
        with pytest.raises(RpcError) as caught:
            await client.unary(UnaryRequest())
        assert caught.value.code is StatusCode.UNAVAILABLE
        peer.echo.release.set()
        await channel.wait_closed()
    assert results == ["finished"]


async def test_a_killed_server_fails_the_calls(peer: Peer) -> None:
    async with open_channel(await connect_unix(peer.path)) as channel:
        client = EchoServiceClient(channel)
        async with client.server_stream(ServerStreamRequest(count=1, behaviour="wait")) as responses:
            await responses.receive()
            peer.server.stop(0)
            with pytest.raises(RpcError) as caught:
                await responses.receive()
        assert caught.value.code in (StatusCode.UNAVAILABLE, StatusCode.CANCELLED)
        with trio.fail_after(60):
            await channel.wait_closed()


async def test_health(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    servicer = health.HealthServicer()
    servicer.set("x.Y", health_pb2.HealthCheckResponse.SERVING)

    def register(server: grpc.Server) -> None:
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)

    with grpcio_server(path, register=register):
        async with open_channel(await connect_unix(path)) as channel:
            response = await channel.unary_unary(CHECK, HealthCheckRequest("x.Y"), timeout=30)
            assert response.status is ServingStatus.SERVING
            async with channel.unary_stream(WATCH, HealthCheckRequest("x.Y"), timeout=30) as watch:
                first = await watch.receive()
                servicer.set("x.Y", health_pb2.HealthCheckResponse.NOT_SERVING)
                second = await watch.receive()
            assert first is not None
            assert first.status is ServingStatus.SERVING
            assert second is not None
            assert second.status is ServingStatus.NOT_SERVING


async def test_small_windows(peer: Peer) -> None:
    config = ConnectionConfig(stream_window=1000, connection_window=65_536)
    async with open_channel(await connect_unix(peer.path), config=config) as channel:
        client = EchoServiceClient(channel)
        response = await client.unary(UnaryRequest(payload=bytes(200_000)), timeout=60)
        assert len(response.payload) == 200_000

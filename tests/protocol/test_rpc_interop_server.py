"""A grpcio client against our server, on a Unix socket."""

import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trio
from google.protobuf import descriptor_pool
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from rpc_support import DESCRIPTORS, POOL, SERVICE, Echo, GrpcioStub, grpcio_channel, open_unix_listener, pb

from taploom.contracts.taploom.bridge.v1 import rpc as bridge
from taploom.contracts.taploom.guest.v1 import rpc as guest
from taploom.contracts.taploom.helper.v1 import rpc as helper
from taploom.rpc import Server
from taploom.rpc.service import Handler, Service


class Peer:
    """Our server in the test's loop."""

    def __init__(self, path: Path, echo: Echo, server: Server) -> None:
        self.path = path
        self.echo = echo
        self.server = server


class Described(Service):
    """A service that is only listed and described."""

    def __init__(self, name: str) -> None:
        self.service_name = name

    def handlers(self) -> tuple[Handler, ...]:
        return ()


CONTRACTS = [
    base.service_name
    for base in (
        guest.GuestServiceBase,
        helper.HelperServiceBase,
        bridge.NetworkServiceBase,
        bridge.GuestServiceBase,
        bridge.StatusServiceBase,
    )
]


@pytest.fixture
async def peer(tmp_path: Path) -> AsyncIterator[Peer]:
    echo = Echo()
    server = Server([echo, *map(Described, CONTRACTS)], descriptor_sets=[DESCRIPTORS])
    path = tmp_path / "socket"
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, await open_unix_listener(path))
        yield Peer(path, echo, server)
        nursery.cancel_scope.cancel()


async def in_thread(peer: Peer, function: Any, **options: Any) -> Any:
    """Runs `function(stub)` in a thread with a grpcio channel to the peer."""

    def run() -> Any:
        with grpcio_channel(peer.path, **options) as channel:
            return function(GrpcioStub(channel))

    return await trio.to_thread.run_sync(run)


async def test_all_four_shapes(peer: Peer) -> None:
    def calls(stub: GrpcioStub) -> None:
        assert stub.unary(pb("UnaryRequest")(text="ü", payload=b"\x00\xff"), timeout=30).payload == b"\x00\xff"
        numbers = [item.number for item in stub.server_stream(pb("ServerStreamRequest")(count=100), timeout=30)]
        assert numbers == list(range(100))
        requests = (pb("ClientStreamRequest")(payload=bytes(1000)) for _ in range(200))
        assert stub.client_stream(requests, timeout=30).size == 200_000
        texts = [str(number) for number in range(100)]
        answers = stub.bidi((pb("BidiRequest")(text=text) for text in texts), timeout=30)
        assert [item.text for item in answers] == texts

    await in_thread(peer, calls)


async def test_large_messages(peer: Peer) -> None:
    def calls(stub: GrpcioStub) -> None:
        payload = bytes(4 * 2**20 - 20)
        assert stub.unary(pb("UnaryRequest")(payload=payload), timeout=60).payload == payload
        with pytest.raises(grpc.RpcError) as caught:
            stub.unary(pb("UnaryRequest")(payload=bytes(4 * 2**20 + 1)), timeout=60)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        total = sum(
            len(item.payload)
            for item in stub.server_stream(pb("ServerStreamRequest")(count=40, payload_size=500_000), timeout=60)
        )
        assert total == 20_000_000

    await in_thread(peer, calls)


async def test_calls_at_once(peer: Peer) -> None:
    def calls(stub: GrpcioStub) -> None:
        waiting = [stub.unary.future(pb("UnaryRequest")(text=str(number)), timeout=60) for number in range(300)]
        assert [call.result().text for call in waiting] == [str(number) for number in range(300)]

    await in_thread(peer, calls)


async def test_errors_with_details_and_metadata(peer: Peer) -> None:
    def calls(stub: GrpcioStub) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            stub.unary(pb("UnaryRequest")(behaviour="not found"), timeout=30)
        error = caught.value
        assert error.code() is grpc.StatusCode.NOT_FOUND
        assert error.details() == "kein Netz: 100% wäg\n"
        trailing = dict(error.trailing_metadata())
        assert trailing["why"] == "because"
        assert trailing["why-bin"] == b"\x00\xff"
        # google.rpc.Status: code 5, message, one Any.
        assert trailing["grpc-status-details-bin"].startswith(b"\x08\x05\x12")
        assert b"type.googleapis.com/test.Detail" in trailing["grpc-status-details-bin"]
        with pytest.raises(grpc.RpcError) as caught:
            stub.unary(pb("UnaryRequest")(behaviour="crash"), timeout=30)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in caught.value.details()
        with pytest.raises(grpc.RpcError) as caught:
            stub.unknown(pb("UnaryRequest")(), timeout=30)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED

    await in_thread(peer, calls)


async def test_metadata(peer: Peer) -> None:
    def calls(stub: GrpcioStub) -> Any:
        _, call = stub.unary.with_call(
            pb("UnaryRequest")(behaviour="metadata"),
            metadata=(("key", "one"), ("key", "two"), ("key-bin", b"\x00\x01,")),
            timeout=30,
        )
        return call.initial_metadata(), call.trailing_metadata()

    initial, trailing = await in_thread(peer, calls)
    assert [pair for pair in peer.echo.metadata if pair[0].startswith("key")] == [
        ("key", "one"),
        ("key", "two"),
        ("key-bin", b"\x00\x01,"),
    ]
    assert {("initial", "1"), ("initial-bin", b"\x01\xfe")} <= {tuple(pair) for pair in initial}
    assert {("trailing", "2"), ("trailing-bin", b"\x02\xfd")} <= {tuple(pair) for pair in trailing}


async def test_deadline(peer: Peer) -> None:
    def calls(stub: GrpcioStub) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            stub.unary(pb("UnaryRequest")(behaviour="hang"), timeout=0.2)
        assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED

    await in_thread(peer, calls)
    with trio.fail_after(60):
        await peer.echo.cancelled.wait()
    assert 0 < peer.echo.remaining <= 0.2


async def test_cancellation(peer: Peer) -> None:
    def calls(stub: GrpcioStub) -> None:
        responses = stub.server_stream(pb("ServerStreamRequest")(count=1, behaviour="hang"))
        next(responses)
        responses.cancel()
        with pytest.raises(grpc.RpcError) as caught:
            next(responses)
        assert caught.value.code() is grpc.StatusCode.CANCELLED

    await in_thread(peer, calls)
    with trio.fail_after(60):
        await peer.echo.cancelled.wait()


async def test_a_server_that_ends_early(peer: Peer) -> None:
    def endless() -> Iterator[Any]:
        while True:
            yield pb("ClientStreamRequest")(text="not found", payload=bytes(1000))

    def calls(stub: GrpcioStub) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            stub.client_stream(endless(), timeout=60)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        hold = threading.Event()

        def requests() -> Iterator[Any]:
            yield pb("BidiRequest")(text="stop")
            hold.wait(60)

        assert [item.text for item in stub.bidi(requests(), timeout=60)] == ["stop"]
        hold.set()

    await in_thread(peer, calls)


async def test_compression_is_refused(peer: Peer) -> None:
    def calls(stub: GrpcioStub) -> None:
        with pytest.raises(grpc.RpcError) as caught:
            stub.unary(pb("UnaryRequest")(text="x" * 5000), compression=grpc.Compression.Gzip, timeout=30)
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert "gzip" in caught.value.details()
        assert stub.unary(pb("UnaryRequest")(text="x"), timeout=30).text == "x"

    await in_thread(peer, calls)


async def test_drain_lets_the_call_finish(peer: Peer) -> None:
    results: list[str] = []

    def calls(stub: GrpcioStub) -> None:
        results.append(stub.unary(pb("UnaryRequest")(text="finished", behaviour="wait"), timeout=60).text)
        with pytest.raises(grpc.RpcError) as caught:
            stub.unary(pb("UnaryRequest")(text="late"), timeout=60)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

    async with trio.open_nursery() as nursery:
        nursery.start_soon(in_thread, peer, calls)
        await peer.echo.started.wait()
        nursery.start_soon(peer.server.drain, 60)
        await trio.testing.wait_all_tasks_blocked()
        peer.echo.release.set()
    assert results == ["finished"]


async def test_health(peer: Peer) -> None:
    statuses: trio.MemorySendChannel[int]
    statuses, received = trio.open_memory_channel(10)
    token = trio.lowlevel.current_trio_token()
    serving = health_pb2.HealthCheckResponse

    def watch() -> None:
        with grpcio_channel(peer.path) as channel:
            stub = health_pb2_grpc.HealthStub(channel)
            assert stub.Check(health_pb2.HealthCheckRequest(), timeout=30).status == serving.SERVING
            with pytest.raises(grpc.RpcError) as caught:
                stub.Check(health_pb2.HealthCheckRequest(service="no.Such"), timeout=30)
            assert caught.value.code() is grpc.StatusCode.NOT_FOUND
            responses = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE), timeout=60)
            for response in responses:
                trio.from_thread.run_sync(statuses.send_nowait, response.status, trio_token=token)
                if response.status == serving.NOT_SERVING:
                    break
            responses.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, watch)
        assert await received.receive() == serving.SERVING
        peer.server.health.set(SERVICE, False)
        assert await received.receive() == serving.NOT_SERVING


async def test_reflection_lists_and_describes_every_service(peer: Peer) -> None:
    def describe() -> list[str]:
        with grpcio_channel(peer.path) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            names = list(database.get_services())
            pool = descriptor_pool.DescriptorPool(database)
            for name in names:
                service = pool.FindServiceByName(name)
                if service.file.package.startswith("taploom"):
                    ours = POOL.FindServiceByName(name)
                    assert [method.name for method in service.methods] == [m.name for m in ours.methods]
                    for method in service.methods:
                        assert method.input_type.full_name == ours.methods_by_name[method.name].input_type.full_name
                        assert pool.FindMethodByName(method.full_name) is not None
            assert pool.FindFileByName("google/protobuf/timestamp.proto").package == "google.protobuf"
            assert pool.FindMessageTypeByName("taploom.link.v1.LinkCounters") is not None
            assert pool.FindEnumTypeByName("taploom.guest.v1.GuestFeature") is not None
            with pytest.raises(KeyError):
                pool.FindMessageTypeByName("no.Such")
            with pytest.raises(KeyError):
                pool.FindFileByName("no_such.proto")
            return names

    names = await trio.to_thread.run_sync(describe)
    assert set(names) == {
        *CONTRACTS,
        SERVICE,
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
    }
    assert {
        "taploom.guest.v1.GuestService",
        "taploom.helper.v1.HelperService",
        "taploom.bridge.v1.NetworkService",
        "taploom.bridge.v1.GuestService",
        "taploom.bridge.v1.StatusService",
    } == set(CONTRACTS)


async def test_stable_reflection_answers_the_same(peer: Peer) -> None:
    """grpc.reflection.v1, which grpcurl asks first."""

    def ask() -> list[Any]:
        request, response = (pb(f"grpc.reflection.v1.ServerReflection{kind}") for kind in ("Request", "Response"))
        questions = [
            request(host="h", list_services=""),
            request(file_containing_symbol="taploom.guest.v1.Interface.mtu"),
            request(file_by_filename="taploom/guest/v1/guest.proto"),
            request(file_containing_symbol="no.Such"),
            request(all_extension_numbers_of_type="taploom.guest.v1.Interface"),
            request(file_containing_extension={"containing_type": "x.Y", "extension_number": 5}),
            request(),
        ]
        with grpcio_channel(peer.path) as channel:
            call = channel.stream_stream(
                "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
                request_serializer=lambda message: message.SerializeToString(),
                response_deserializer=response.FromString,
            )
            answers = list(call(iter(questions), timeout=30))
        for question, answer in zip(questions, answers, strict=True):
            assert answer.original_request == question
            assert answer.valid_host == question.host
        return answers

    listed, by_symbol, by_name, missing, extensions, extension, nothing = await trio.to_thread.run_sync(ask)
    assert "taploom.guest.v1.GuestService" in [service.name for service in listed.list_services_response.service]
    assert by_symbol.file_descriptor_response == by_name.file_descriptor_response
    assert len(by_name.file_descriptor_response.file_descriptor_proto) == 3
    assert missing.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
    assert extensions.all_extension_numbers_response.base_type_name == "taploom.guest.v1.Interface"
    assert extension.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
    assert nothing.error_response.error_code == grpc.StatusCode.INVALID_ARGUMENT.value[0]


async def test_keepalive_pings_of_grpcio(peer: Peer) -> None:
    """A client that pings ten times a second, as fast as grpcio can, is served as long as it likes."""

    def calls(stub: GrpcioStub) -> None:
        responses = stub.server_stream(pb("ServerStreamRequest")(count=1, behaviour="wait"), timeout=60)
        next(responses)
        token_release()
        assert list(responses) == []

    token = trio.lowlevel.current_trio_token()

    def token_release() -> None:
        trio.from_thread.run_sync(peer.echo.release.set, trio_token=token)

    await in_thread(
        peer,
        calls,
        keepalive_time_ms=100,
        keepalive_timeout_ms=5000,
        keepalive_permit_without_calls=1,
        **{"http2.max_pings_without_data": 0},
    )

"""The echo service in both implementations, and how to reach each from the other, for the tests of taploom.rpc."""

from __future__ import annotations

import contextlib
import math
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import trio
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from rpc_testing.taploomtest.echo.v1 import (
    BidiRequest,
    BidiResponse,
    ClientStreamRequest,
    ClientStreamResponse,
    ServerStreamRequest,
    ServerStreamResponse,
    UnaryRequest,
    UnaryResponse,
)
from rpc_testing.taploomtest.echo.v1.rpc import EchoServiceBase

from taploom.rpc import ReceiveStream, RpcError, SendStream, Server, ServerContext, StatusCode
from taploom.rpc.reflection import contract_descriptors
from taploom.rpc.status import pack_any

PACKAGE = "taploomtest.echo.v1"
SERVICE = f"{PACKAGE}.EchoService"
DESCRIPTORS = (Path(__file__).parent / "rpc_testing" / "descriptors.binpb").read_bytes()


def _pool() -> descriptor_pool.DescriptorPool:
    pool = descriptor_pool.DescriptorPool()
    files: dict[str, descriptor_pb2.FileDescriptorProto] = {}
    for data in (DESCRIPTORS, contract_descriptors()):
        for file in descriptor_pb2.FileDescriptorSet.FromString(data).file:
            files.setdefault(file.name, file)

    added: set[str] = set()

    def add(name: str) -> None:
        if name not in added:
            added.add(name)
            for dependency in files[name].dependency:
                add(dependency)
            pool.Add(files[name])  # type: ignore[no-untyped-call]

    for name in files:
        add(name)
    return pool


POOL = _pool()


def pb(name: str) -> Any:
    """google.protobuf's class of a message of the echo service or of the contracts (full name)."""
    full = name if "." in name else f"{PACKAGE}.{name}"
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(full))  # type: ignore[no-untyped-call]


class Echo(EchoServiceBase):
    """The echo service on taploom.rpc. `behaviour` in a request asks for something special."""

    def __init__(self) -> None:
        self.started = trio.Event()
        self.cancelled = trio.Event()
        self.release = trio.Event()
        self.sent = 0
        self.remaining = math.nan
        self.metadata: tuple[tuple[str, str | bytes], ...] = ()

    async def _behave(self, behaviour: str, context: ServerContext) -> None:
        self.metadata = context.metadata
        self.remaining = context.deadline - trio.current_time()
        self.started.set()
        match behaviour:
            case "hang":
                try:
                    await trio.sleep_forever()
                finally:
                    self.cancelled.set()
            case "wait":
                await self.release.wait()
            case "not found":
                raise RpcError(
                    StatusCode.NOT_FOUND,
                    "kein Netz: 100% wäg\n",
                    details=(pack_any("type.googleapis.com/test.Detail", b"\x08\x07"),),
                    metadata=(("why", "because"), ("why-bin", b"\x00\xff")),
                )
            case "grouped error":
                raise ExceptionGroup("one", [RpcError(StatusCode.ABORTED, "from a nursery")])
            case "bad metadata":
                raise RpcError(StatusCode.ABORTED, "", metadata=(("Not Legal", "x"),))
            case "crash":
                raise ZeroDivisionError("secret of the implementation")
            case "metadata":
                context.send_initial_metadata({"initial": "1", "initial-bin": b"\x01\xfe"})
                context.set_trailing_metadata([("trailing", "2"), ("trailing-bin", b"\x02\xfd")])

    async def unary(self, request: UnaryRequest, context: ServerContext) -> UnaryResponse:
        await self._behave(request.behaviour, context)
        return UnaryResponse(text=request.text, payload=request.payload)

    async def server_stream(
        self, request: ServerStreamRequest, stream: SendStream[ServerStreamResponse], context: ServerContext
    ) -> None:
        for number in range(request.count):
            await stream.send(
                ServerStreamResponse(number=number, text=request.text, payload=bytes(request.payload_size))
            )
            self.sent += 1
        await self._behave(request.behaviour, context)

    async def client_stream(
        self, requests: ReceiveStream[ClientStreamRequest], context: ServerContext
    ) -> ClientStreamResponse:
        count = size = 0
        text = ""
        async for request in requests:
            count += 1
            size += len(request.payload)
            text = request.text
            if request.text in ("not found", "wait"):
                await self._behave(request.text, context)
        return ClientStreamResponse(count=count, size=size, text=text)

    async def bidi(
        self, requests: ReceiveStream[BidiRequest], responses: SendStream[BidiResponse], context: ServerContext
    ) -> None:
        async for request in requests:
            await responses.send(BidiResponse(text=request.text, payload=request.payload))
            if request.text == "stop":
                return
            await self._behave(request.text, context)


class GrpcioEcho(grpc.GenericRpcHandler):
    """The echo service on grpcio."""

    def __init__(self) -> None:
        self.release = threading.Event()
        self.started = threading.Event()
        self.cancelled = threading.Event()
        self.metadata: list[tuple[str, str | bytes]] = []
        self.remaining: float | None = None

    def _behave(self, behaviour: str, context: grpc.ServicerContext) -> None:
        self.metadata = [(key, value) for key, value in context.invocation_metadata()]
        self.remaining = context.time_remaining()
        if behaviour == "hang":
            context.add_callback(self.cancelled.set)
            self.started.set()
            self.cancelled.wait(60)
        elif behaviour == "wait":
            self.started.set()
            self.release.wait(60)
        elif behaviour == "not found":
            detail = pack_any("type.googleapis.com/test.Detail", b"\x08\x07")
            from taploom.rpc.status import encode_status

            status = encode_status(StatusCode.NOT_FOUND, "kein Netz", (detail,))
            context.set_trailing_metadata(
                (("why", "because"), ("why-bin", b"\x00\xff"), ("grpc-status-details-bin", status))
            )
            context.abort(grpc.StatusCode.NOT_FOUND, "kein Netz: 100% wäg\n")
        elif behaviour == "metadata":
            context.send_initial_metadata((("initial", "1"), ("initial-bin", b"\x01\xfe")))
            context.set_trailing_metadata((("trailing", "2"), ("trailing-bin", b"\x02\xfd")))
        elif behaviour == "crash":
            raise ZeroDivisionError("boom")

    def _unary(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._behave(request.behaviour, context)
        return pb("UnaryResponse")(text=request.text, payload=request.payload)

    def _server_stream(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        for number in range(request.count):
            yield pb("ServerStreamResponse")(number=number, text=request.text, payload=bytes(request.payload_size))
        self._behave(request.behaviour, context)

    def _client_stream(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Any:
        count = size = 0
        text = ""
        for request in requests:
            count += 1
            size += len(request.payload)
            text = request.text
            if text == "not found":
                self._behave(text, context)
        return pb("ClientStreamResponse")(count=count, size=size, text=text)

    def _bidi(self, requests: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
        for request in requests:
            yield pb("BidiResponse")(text=request.text, payload=request.payload)
            if request.text == "stop":
                return
            self._behave(request.text, context)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        def codec(name: str) -> dict[str, Any]:
            return {
                "request_deserializer": pb(f"{name}Request").FromString,
                "response_serializer": lambda message: message.SerializeToString(),
            }

        return {
            f"/{SERVICE}/Unary": grpc.unary_unary_rpc_method_handler(self._unary, **codec("Unary")),
            f"/{SERVICE}/ServerStream": grpc.unary_stream_rpc_method_handler(
                self._server_stream, **codec("ServerStream")
            ),
            f"/{SERVICE}/ClientStream": grpc.stream_unary_rpc_method_handler(
                self._client_stream, **codec("ClientStream")
            ),
            f"/{SERVICE}/Bidi": grpc.stream_stream_rpc_method_handler(self._bidi, **codec("Bidi")),
        }.get(details.method)


class GrpcioStub:
    """The echo service's client on grpcio."""

    def __init__(self, channel: grpc.Channel) -> None:
        def arguments(name: str, method: str) -> dict[str, Any]:
            return {
                "method": f"/{SERVICE}/{method}",
                "request_serializer": lambda message: message.SerializeToString(),
                "response_deserializer": pb(f"{name}Response").FromString,
            }

        self.unary = channel.unary_unary(**arguments("Unary", "Unary"))
        self.server_stream = channel.unary_stream(**arguments("ServerStream", "ServerStream"))
        self.client_stream = channel.stream_unary(**arguments("ClientStream", "ClientStream"))
        self.bidi = channel.stream_stream(**arguments("Bidi", "Bidi"))
        self.unknown = channel.unary_unary(**arguments("Unary", "NoSuchMethod"))


async def open_unix_listener(path: Path) -> trio.SocketListener:
    """A listener on a Unix socket."""
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await sock.bind(str(path))
    sock.listen(64)
    return trio.SocketListener(sock)


async def connect_unix(path: Path) -> trio.SocketStream:
    """A connection to a Unix socket."""
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    await sock.connect(str(path))
    return trio.SocketStream(sock)


@contextlib.asynccontextmanager
async def serving(server: Server, path: Path) -> AsyncIterator[trio.Nursery]:
    """`server` on a Unix socket while the block runs."""
    async with trio.open_nursery() as nursery:
        await nursery.start(server.serve, await open_unix_listener(path))
        try:
            yield nursery
        finally:
            nursery.cancel_scope.cancel()


@contextlib.asynccontextmanager
async def memory_pair(server: Server) -> AsyncIterator[trio.StapledStream[Any, Any]]:
    """The client's end of an in-memory connection that `server` serves."""
    client, other = trio.testing.memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.serve_stream, other)
        try:
            yield client
        finally:
            nursery.cancel_scope.cancel()


@contextlib.contextmanager
def grpcio_server(
    path: Path,
    *handlers: grpc.GenericRpcHandler,
    register: Callable[[grpc.Server], None] = lambda server: None,
    **options: Any,
) -> Iterator[grpc.Server]:
    """A grpcio server on a Unix socket; `register` adds generated services before it starts."""
    server = grpc.server(
        futures.ThreadPoolExecutor(16),
        options=[(f"grpc.{key}", value) for key, value in options.items()],
    )
    server.add_generic_rpc_handlers(handlers)
    register(server)
    server.add_insecure_port(f"unix:{path}")
    server.start()
    try:
        yield server
    finally:
        server.stop(None).wait()


@contextlib.contextmanager
def grpcio_channel(path: Path, **options: Any) -> Iterator[grpc.Channel]:
    """A grpcio channel to a Unix socket."""
    merged = {"use_local_subchannel_pool": 1, **options}
    with grpc.insecure_channel(
        f"unix:{path}", options=[(f"grpc.{key}", value) for key, value in merged.items()]
    ) as channel:
        yield channel

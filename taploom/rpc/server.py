"""The server: services on any number of trio streams."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, Self, TypeVar

import trio

from .codec import make_parser
from .connection import INTERNAL_ERROR, NO_ERROR, Connection, ConnectionConfig, Http2Stream
from .health import Health
from .metadata import (
    Metadata,
    MetadataLike,
    decode_metadata,
    decode_timeout,
    encode_binary,
    encode_metadata,
)
from .service import Handler, Service
from .status import RpcError, StatusCode, encode_message, encode_status
from .wire import WireError

logger = logging.getLogger("taploom.rpc")

T = TypeVar("T")

# What an accept may fail with although the listener is good (accept(2): limits, and connections that died waiting).
_ACCEPT_BACKOFF = 0.1
# Messages and details of errors are cut to what fits into the header list of a common peer (8 KiB).
_MAX_STATUS_MESSAGE = 2048
_MAX_STATUS_DETAILS = 4096

_RESPONSE_HEADERS = [
    (b":status", b"200"),
    (b"content-type", b"application/grpc"),
    (b"grpc-accept-encoding", b"identity"),
]


@dataclass(frozen=True)
class _Route:
    """How a path is served."""

    handler: Handler
    parse: Callable[[bytes], Any]
    infrastructure: bool


class _Context:
    """A call on the server: its ServerContext, and what the messages go through."""

    def __init__(self, connection: Connection, stream: Http2Stream, path: str, peer: str) -> None:
        self._connection = connection
        self._stream = stream
        self._path = path
        self._peer = peer
        self._headers_sent = False
        self._trailing: list[tuple[bytes, bytes]] = []
        self.deadline = math.inf

    @property
    def method(self) -> str:
        return self._path

    @property
    def peer(self) -> str:
        return self._peer

    @property
    def metadata(self) -> Metadata:
        return decode_metadata(self._stream.headers or ())

    def send_initial_metadata(self, metadata: MetadataLike) -> None:
        if self._headers_sent:
            raise RuntimeError("the response's headers have been sent; initial metadata comes before messages")
        self._send_headers(encode_metadata(metadata))

    def set_trailing_metadata(self, metadata: MetadataLike) -> None:
        self._trailing = encode_metadata(metadata)

    def _send_headers(self, metadata: list[tuple[bytes, bytes]]) -> None:
        self._headers_sent = True
        self._connection.send_headers(self._stream, _RESPONSE_HEADERS + metadata)

    async def send(self, message: Any) -> None:
        """Sends a response message, with the headers before the first."""
        data = bytes(message)
        if not self._headers_sent:
            self._send_headers([])
        await self._connection.send_message(self._stream, data)

    def send_status(self, error: RpcError | None) -> None:
        """Ends the call with OK or with `error`."""
        trailers = [(b"grpc-status", b"%d" % (error.code if error else StatusCode.OK))]
        if error is not None:
            message = error.message[:_MAX_STATUS_MESSAGE]
            if message:
                trailers.append((b"grpc-message", encode_message(message).encode()))
            if error.details:
                details = encode_status(error.code, message, error.details)
                if len(details) <= _MAX_STATUS_DETAILS:
                    trailers.append((b"grpc-status-details-bin", encode_binary(details)))
                else:
                    logger.warning("%s: %d bytes of error details are left out", self._path, len(details))
        trailers += self._trailing
        if error is not None:
            trailers += encode_metadata(error.metadata)
        if not self._headers_sent:
            trailers = _RESPONSE_HEADERS + trailers
        self._connection.send_headers(self._stream, trailers, end_stream=True)


class _Requests(Generic[T]):
    """The requests of a call, parsed."""

    def __init__(self, connection: Connection, stream: Http2Stream, parse: Callable[[bytes], T]) -> None:
        self._connection = connection
        self._stream = stream
        self._parse = parse

    async def receive(self) -> T | None:
        await trio.lowlevel.checkpoint_if_cancelled()
        data = await self._connection.receive(self._stream)
        if data is None:
            return None
        try:
            return self._parse(data)
        except WireError as error:
            raise RpcError(StatusCode.INVALID_ARGUMENT, f"malformed request: {error}") from error

    async def single(self) -> T:
        """The one request of a call without request stream."""
        request = await self.receive()
        if request is None:
            raise RpcError(StatusCode.UNIMPLEMENTED, "the request is missing")
        if await self.receive() is not None:
            raise RpcError(StatusCode.UNIMPLEMENTED, "more than one request where one is expected")
        return request

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> T:
        message = await self.receive()
        if message is None:
            raise StopAsyncIteration
        return message


class _Responses:
    """The response stream of a call."""

    def __init__(self, context: _Context) -> None:
        self._context = context

    async def send(self, message: Any) -> None:
        # Others run when enough has queued up for the writer: small messages then share its writes.
        await trio.lowlevel.checkpoint_if_cancelled()
        await self._context.send(message)


class Server:
    """Serves gRPC services on streams and listeners.

    Args:
        services: instances of the generated ``XServiceBase`` classes.
        reflection: whether grpc.reflection.v1 and v1alpha are served (for grpcurl and the like).
        health: whether grpc.health.v1 is served; see `Server.health`.
        strict: whether requests go through the strict wire check before they are parsed.
        max_message_size: the largest request taken, in bytes.
        max_connections: connections served at the same time by `serve`; more are closed at once.
        config: the limits of a connection; `max_message_size` is then taken from it.
        descriptor_sets: serialized FileDescriptorSets for reflection of services that are not taploom's contracts.
    """

    def __init__(
        self,
        services: Iterable[Service],
        *,
        reflection: bool = True,
        health: bool = True,
        strict: bool = True,
        max_message_size: int = 4 * 2**20,
        max_connections: int = 64,
        config: ConnectionConfig | None = None,
        descriptor_sets: Iterable[bytes] = (),
    ) -> None:
        self._config = config or replace(ConnectionConfig(), max_message_size=max_message_size)
        self._max_connections = max_connections
        self._routes: dict[str, _Route] = {}
        self._connections: set[Connection] = set()
        self._draining = False
        self._accept_scopes: set[trio.CancelScope] = set()
        self._live_calls = 0
        self._idle_lot = trio.lowlevel.ParkingLot()
        self._service_names: set[str] = set()
        services = list(services)
        self.health = Health(service.service_name for service in services)
        """The health of the services, as grpc.health.v1 tells it: all are serving at first."""
        if health:
            services.append(self.health)
        self._strict = strict
        self._descriptor_sets = tuple(descriptor_sets) if reflection else None
        self._add(services)

    def _add(self, services: Iterable[Service]) -> None:
        for service in services:
            self._service_names.add(service.service_name)
            for handler in service.handlers():
                parse = make_parser(handler.method.request_type, strict=self._strict)
                self._routes[handler.method.path] = _Route(handler, parse, service.infrastructure)

    def _route(self, path: str) -> _Route | None:
        if self._descriptor_sets is not None and path.startswith("/grpc.reflection."):
            # Imported when somebody asks for it, which a bridge never does: an agent's start is to be short.
            from .reflection import reflection_services

            self._add(reflection_services(sorted(self._service_names), self._descriptor_sets))
            self._descriptor_sets = None
        return self._routes.get(path)

    async def serve(
        self,
        listeners: trio.abc.Listener[Any] | Sequence[trio.abc.Listener[Any]],
        *,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accepts and serves connections until cancelled or drained; closes the listeners at the end.

        Whatever one connection does, the others and the accepting go on.
        """
        if isinstance(listeners, trio.abc.Listener):
            listeners = [listeners]
        async with trio.open_nursery() as nursery:
            for listener in listeners:
                nursery.start_soon(self._accept_loop, listener, nursery)
            task_status.started()

    async def _accept_loop(self, listener: trio.abc.Listener[Any], nursery: trio.Nursery) -> None:
        with trio.CancelScope() as scope:
            self._accept_scopes.add(scope)
            try:
                if not self._draining:
                    async with listener:
                        await self._accept(listener, nursery)
            finally:
                self._accept_scopes.discard(scope)

    async def _accept(self, listener: trio.abc.Listener[Any], nursery: trio.Nursery) -> None:
        while True:
            try:
                stream = await listener.accept()
            except OSError as error:  # no file descriptors or memory, or the connection died while it waited
                logger.warning("cannot accept a connection: %s; trying again", error)
                await trio.sleep(_ACCEPT_BACKOFF)
                continue
            except trio.ClosedResourceError:
                return
            if len(self._connections) >= self._max_connections:
                logger.warning("refusing a connection: %d are open, the limit", len(self._connections))
                await trio.aclose_forcefully(stream)
                continue
            nursery.start_soon(self.serve_stream, stream)

    async def serve_stream(self, stream: trio.abc.Stream) -> None:
        """Serves one connection until it is over, and closes the stream. Raises nothing but Cancelled."""
        peer = _describe(stream)
        async with trio.open_nursery() as nursery:

            def start(http2_stream: Http2Stream) -> None:
                nursery.start_soon(self._call, connection, http2_stream, peer)

            connection = Connection(stream, self._config, label=peer, on_request=start)
            self._connections.add(connection)
            if self._draining:
                connection.shut_down()
            try:
                await connection.run()
            finally:
                self._connections.discard(connection)
            # Calls whose connection is gone have been cancelled; their handlers may still have to clean up.

    async def drain(self, timeout: float) -> None:  # noqa: ASYNC109 - not the time-out of drain itself
        """Stops accepting, tells all clients, and waits until the calls under way have ended.

        What still runs after `timeout` seconds fails with UNAVAILABLE. All connections are closed when this returns.
        """
        self._draining = True
        self.health.shut_down()
        for scope in self._accept_scopes:
            scope.cancel()
        for connection in list(self._connections):
            connection.shut_down()
        with trio.move_on_after(timeout):
            while self._live_calls:
                await self._idle_lot.park()
            for connection in list(self._connections):
                await connection.wait_shut_down()
        for connection in list(self._connections):
            connection.finish("the server has shut down")
            await connection.wait_closed()

    async def _call(self, connection: Connection, stream: Http2Stream, peer: str) -> None:
        headers = dict(stream.headers or ())
        path = headers.get(b":path", b"").decode("ascii", "replace")
        route = self._route(path)
        counted = route is not None and not route.infrastructure
        self._live_calls += counted
        # A client that still sends may stop, and its status stands (RFC 9113, section 8.1).
        end = NO_ERROR
        try:
            refusal = _refusal(headers)
            if refusal is not None:
                connection.send_headers(stream, refusal, end_stream=True)
                return
            await self._serve_call(connection, stream, _Context(connection, stream, path, peer), headers, route)
        except RpcError as error:
            if stream.error is None:
                logger.info("%s from %s could not be answered: %s", path, peer, error)
        except Exception:  # such as metadata in a handler's error that cannot be sent
            logger.exception("%s from %s could not be answered", path, peer)
            end = INTERNAL_ERROR
        finally:
            connection.forget(stream, end)
            self._live_calls -= counted
            if not self._live_calls:
                self._idle_lot.unpark_all()

    async def _serve_call(
        self,
        connection: Connection,
        stream: Http2Stream,
        context: _Context,
        headers: dict[bytes, bytes],
        route: _Route | None,
    ) -> None:
        """Runs the handler under the caller's deadline and sends the status."""
        scope = trio.CancelScope()
        stream.on_reset = scope.cancel
        if stream.error is not None:
            return
        error: RpcError | None
        try:
            if b"grpc-timeout" in headers:
                context.deadline = trio.current_time() + decode_timeout(headers[b"grpc-timeout"])
                scope.deadline = context.deadline
        except ValueError as problem:
            context.send_status(RpcError(StatusCode.INTERNAL, str(problem)))
            return
        with scope:
            error = await self._run_handler(connection, stream, context, headers, route)
        if stream.error is not None:
            return  # there is nobody to tell
        if scope.cancelled_caught:
            error = RpcError(StatusCode.DEADLINE_EXCEEDED, "the deadline passed before the call ended")
        context.send_status(error)

    async def _run_handler(
        self,
        connection: Connection,
        stream: Http2Stream,
        context: _Context,
        headers: dict[bytes, bytes],
        route: _Route | None,
    ) -> RpcError | None:
        """The status of the call: None for OK."""
        if route is None:
            return self._unknown(context.method)
        encoding = headers.get(b"grpc-encoding", b"identity")
        if encoding != b"identity":
            text = encoding[:32].decode("ascii", "replace")
            return RpcError(StatusCode.UNIMPLEMENTED, f"compression {text!r} is not supported; use identity")
        method, function = route.handler.method, route.handler.function
        requests = _Requests[Any](connection, stream, route.parse)
        try:
            request = requests if method.client_streaming else await requests.single()
            if method.server_streaming:
                await function(request, _Responses(context), context)
            else:
                await context.send(await function(request, context))
        except Exception as problem:
            return self._status_of(problem, context)
        return None

    def _unknown(self, path: str) -> RpcError:
        service, _, method = path.removeprefix("/").partition("/")
        if service in self._service_names:
            return RpcError(StatusCode.UNIMPLEMENTED, f"the service {service} has no method {method[:200]!r}")
        return RpcError(StatusCode.UNIMPLEMENTED, f"no service {service[:200]!r} here")

    @staticmethod
    def _status_of(problem: Exception, context: _Context) -> RpcError:
        """The status for an exception of a handler: an RpcError as it is, also alone in groups; else INTERNAL."""
        cause: BaseException = problem
        while isinstance(cause, BaseExceptionGroup) and len(cause.exceptions) == 1:
            cause = cause.exceptions[0]
        if isinstance(cause, RpcError):
            return cause
        logger.error("%s from %s failed", context.method, context.peer, exc_info=problem)
        return RpcError(StatusCode.INTERNAL, "internal error; the server's log has the reason")


def _refusal(headers: dict[bytes, bytes]) -> list[tuple[bytes, bytes]] | None:
    """The response to what is HTTP/2 but not gRPC (PROTOCOL-HTTP2.md, "Requests"); None for gRPC."""
    if headers.get(b":method") != b"POST":
        return [(b":status", b"405"), (b"allow", b"POST")]
    content_type = headers.get(b"content-type", b"")
    if content_type not in (b"application/grpc", b"application/grpc+proto"):
        return [(b":status", b"415"), (b"accept-post", b"application/grpc")]
    return None


def _describe(stream: trio.abc.Stream) -> str:
    """The peer's address for log messages."""
    if isinstance(stream, trio.SocketStream):
        try:
            name = stream.socket.getpeername()
        except OSError:
            return "a client that is gone"
        return f"client {name}" if name else "a client on a Unix socket"
    return "a client"

"""The client: calls over one HTTP/2 connection."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Callable, Iterator
from types import TracebackType
from typing import Any, Generic, Self

import trio

from .codec import make_parser
from .connection import CANCEL, CallEndedError, Connection, ConnectionConfig, Http2Stream
from .metadata import Metadata, MetadataLike, decode_binary, decode_metadata, encode_metadata, encode_timeout
from .service import Method, RequestT, ResponseT
from .status import RpcError, StatusCode, code_from_http, decode_message, decode_status_details
from .wire import WireError

# How long a channel that is left waits for its last frames to go out, seconds.
_CLOSE_TIMEOUT = 1.0
# How often a call that the server refused to look at is tried again, and the first wait in seconds; it doubles.
_MAX_REFUSALS = 6
_REFUSAL_BACKOFF = 0.01


class Channel:
    """Calls over one connection; made by `open_channel`. Nothing reconnects: open another channel for that."""

    def __init__(self, connection: Connection, *, strict: bool) -> None:
        self._connection = connection
        self._strict = strict
        self._parsers: dict[type, Callable[[bytes], Any]] = {}

    @property
    def closed(self) -> bool:
        """True when no new calls can be started: the connection is over or the peer shuts it down."""
        return not self._connection.usable

    @property
    def timed_out(self) -> bool:
        """Whether the connection is lost because the peer gave no sign of life in time."""
        return self._connection.timed_out

    @property
    def close_reason(self) -> str | None:
        """Why the connection is over; None while it is not."""
        return self._connection.close_reason

    async def wait_closed(self) -> None:
        """Waits until the connection is over. While a shutdown by the peer lets calls finish, it is not."""
        await self._connection.wait_finishing()

    async def unary_unary(
        self,
        method: Method[RequestT, ResponseT],
        request: RequestT,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - the server is told it, too
        metadata: MetadataLike | None = None,
    ) -> ResponseT:
        """One request, one response. RpcError when the call fails."""
        async with Call(self, method, timeout, metadata, request) as call:
            return await call._single_response()

    def unary_stream(
        self,
        method: Method[RequestT, ResponseT],
        request: RequestT,
        *,
        timeout: float | None = None,
        metadata: MetadataLike | None = None,
    ) -> ServerStreamCall[RequestT, ResponseT]:
        """One request, a stream of responses."""
        return ServerStreamCall(self, method, timeout, metadata, request)

    def stream_unary(
        self,
        method: Method[RequestT, ResponseT],
        *,
        timeout: float | None = None,
        metadata: MetadataLike | None = None,
    ) -> ClientStreamCall[RequestT, ResponseT]:
        """A stream of requests, one response."""
        return ClientStreamCall(self, method, timeout, metadata)

    def stream_stream(
        self,
        method: Method[RequestT, ResponseT],
        *,
        timeout: float | None = None,
        metadata: MetadataLike | None = None,
    ) -> BidiCall[RequestT, ResponseT]:
        """Streams both ways."""
        return BidiCall(self, method, timeout, metadata)

    def _parser(self, message_type: type[ResponseT]) -> Callable[[bytes], ResponseT]:
        parser = self._parsers.get(message_type)
        if parser is None:
            parser = self._parsers[message_type] = make_parser(message_type, strict=self._strict)
        return parser


class Call(Generic[RequestT, ResponseT]):
    """A call under way. Leaving its ``async with`` block early cancels it at the server."""

    def __init__(
        self,
        channel: Channel,
        method: Method[RequestT, ResponseT],
        timeout: float | None,
        metadata: MetadataLike | None,
        request: RequestT | None = None,
    ) -> None:
        self._connection = channel._connection
        self._parse = channel._parser(method.response_type)
        self._method = method
        self._timeout = timeout
        self._headers = _request_headers(method.path, timeout, metadata)
        self._request = request
        self._deadline = math.inf
        self._opened: Http2Stream | None = None
        self._refusals = 0

    async def __aenter__(self) -> Self:
        if self._timeout is not None:
            self._deadline = trio.current_time() + self._timeout
        with self._within_deadline():
            await self._open()
        return self

    async def _open(self) -> None:
        message = None if self._request is None else bytes(self._request)
        self._opened = await self._connection.open_stream(self._headers, message)

    async def _try_again(self) -> bool:
        """Starts a refused call anew; False when it was not refused or too often.

        A server that counts streams otherwise than we do refuses some although it has announced room for them, and
        the call was not looked at (RFC 9113, section 8.7). Only a request that is known as a whole can be repeated.
        """
        stream = self._stream
        if not stream.refused or self._request is None or self._refusals >= _MAX_REFUSALS:
            return False
        self._connection.forget(stream)
        await trio.sleep(_REFUSAL_BACKOFF * 2**self._refusals)
        self._refusals += 1
        await self._open()
        return True

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._opened is not None:
            self._connection.forget(self._opened, CANCEL)

    @property
    def _stream(self) -> Http2Stream:
        if self._opened is None:
            raise RuntimeError("a call is started with `async with`")
        return self._opened

    @contextlib.contextmanager
    def _within_deadline(self) -> Iterator[None]:
        """Turns the end of the call's time-out into DEADLINE_EXCEEDED."""
        if self._deadline == math.inf:
            yield
            return
        with trio.CancelScope(deadline=self._deadline) as scope:
            yield
        if scope.cancelled_caught:
            if self._opened is not None:
                self._connection.forget(self._opened, CANCEL)
            raise RpcError(StatusCode.DEADLINE_EXCEEDED, f"{self._method.path} did not end within {self._timeout:g} s")

    async def initial_metadata(self) -> Metadata:
        """The metadata of the response's headers; waits for them. RpcError when the call fails before."""
        with self._within_deadline():
            while self._stream.headers is None:
                error = self._stream.error
                if error is None:
                    await self._stream.wait_changed()
                elif not await self._try_again():
                    raise error
        return decode_metadata(self._stream.headers or ())

    @property
    def trailing_metadata(self) -> Metadata:
        """The metadata that came with the status; empty before."""
        return decode_metadata(self._stream.trailers or ())

    async def _receive(self) -> ResponseT | None:
        """The next response; None after the last one of a call that ended with OK. RpcError otherwise."""
        await trio.lowlevel.checkpoint_if_cancelled()
        with self._within_deadline():
            data = await self._receive_bytes()
            stream = self._stream
            if data is None:
                _check_status(stream)
                return None
            _check_headers(stream)
            try:
                return self._parse(data)
            except WireError as error:
                self._connection.forget(stream, CANCEL)
                raise RpcError(StatusCode.INTERNAL, f"malformed response: {error}") from error
        raise AssertionError("unreachable: the block returns or raises")

    async def _receive_bytes(self) -> bytes | None:
        while True:
            try:
                return await self._connection.receive(self._stream)
            except RpcError:
                _check_headers(self._stream)  # another kind of server says more with its HTTP status
                if not await self._try_again():
                    raise

    async def _single_response(self) -> ResponseT:
        response = await self._receive()
        if response is None:
            raise RpcError(StatusCode.UNIMPLEMENTED, "the server ended the call with OK but without a response")
        if await self._receive() is not None:
            raise RpcError(StatusCode.UNIMPLEMENTED, "the server sent several responses where one is expected")
        return response

    async def _send(self, message: RequestT) -> None:
        stream = self._stream
        with self._within_deadline():
            # Others run when enough has queued up for the writer: small messages then share its writes.
            await trio.lowlevel.checkpoint_if_cancelled()
            try:
                await self._connection.send_message(stream, bytes(message))
            except CallEndedError:
                _check_status(stream)
                raise

    def _done_writing(self) -> None:
        stream = self._stream
        if not stream.local_closed and not stream.remote_closed:
            self._connection.end_stream(stream)


class ServerStreamCall(Call[RequestT, ResponseT]):
    """A call with a stream of responses: ``async with client.m(request) as stream: async for response in stream``."""

    async def receive(self) -> ResponseT | None:
        """The next response; None at the end. RpcError when the call fails."""
        return await self._receive()

    def __aiter__(self) -> Self:
        """The call itself."""
        return self

    async def __anext__(self) -> ResponseT:
        """The next response."""
        response = await self._receive()
        if response is None:
            raise StopAsyncIteration
        return response


class ClientStreamCall(Call[RequestT, ResponseT]):
    """A call with a stream of requests: `send` them, then `finish`."""

    async def send(self, message: RequestT) -> None:
        """Sends a request; waits while the server is slow. RpcError when the call is over."""
        await self._send(message)

    async def finish(self) -> ResponseT:
        """Says that there are no more requests, and returns the response. RpcError when the call fails."""
        self._done_writing()
        return await self._single_response()


class BidiCall(ServerStreamCall[RequestT, ResponseT]):
    """A call with streams both ways; sending and receiving may be done by different tasks."""

    async def send(self, message: RequestT) -> None:
        """Sends a request; waits while the server is slow. RpcError when the call is over."""
        await self._send(message)

    async def done_writing(self) -> None:
        """Says that there are no more requests."""
        await trio.lowlevel.checkpoint()
        self._done_writing()


@contextlib.asynccontextmanager
async def open_channel(
    stream: trio.abc.Stream,
    *,
    keepalive: float | None = 30.0,
    max_message_size: int = 4 * 2**20,
    strict: bool = True,
    config: ConnectionConfig | None = None,
) -> AsyncIterator[Channel]:
    """A gRPC channel on `stream`, which it owns from now on.

    Waits until the peer has answered in HTTP/2; RpcError UNAVAILABLE when it does not. When the block is left, calls
    under way are cancelled and the stream is closed. An exception in the block comes out as it is, never in a group.

    Args:
        stream: any trio stream; both directions carry HTTP/2 with prior knowledge, without TLS.
        keepalive: while calls are live, seconds without a byte before the peer is asked for a sign of life.
        max_message_size: the largest response taken, in bytes.
        strict: whether responses go through the strict wire check.
        config: all other limits; `keepalive` and `max_message_size` are then taken from it.
    """
    config = config or ConnectionConfig(keepalive=keepalive, max_message_size=max_message_size)
    connection = Connection(stream, config, label="the server")
    failure: BaseException | None = None
    # What the block raises is kept out of the nursery, which would wrap it in an ExceptionGroup.
    async with trio.open_nursery() as nursery:
        nursery.start_soon(connection.run)
        try:
            await connection.wait_ready()
            yield Channel(connection, strict=strict)
        except BaseException as error:
            failure = error
        with trio.CancelScope(shield=True, deadline=trio.current_time() + _CLOSE_TIMEOUT):
            connection.shut_down()
            connection.finish("the channel was closed on this side")
            await connection.wait_closed()
        nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure


def _request_headers(path: str, timeout: float | None, metadata: MetadataLike | None) -> list[tuple[bytes, bytes]]:
    headers = [
        (b":method", b"POST"),
        (b":scheme", b"http"),
        (b":path", path.encode()),
        (b":authority", b"localhost"),
        (b"te", b"trailers"),
        (b"content-type", b"application/grpc"),
        (b"grpc-accept-encoding", b"identity"),
        (b"user-agent", b"grpc-python-taploom"),
    ]
    if timeout is not None:
        headers.append((b"grpc-timeout", encode_timeout(timeout)))
    return headers + encode_metadata(metadata)


def _check_headers(stream: Http2Stream) -> None:
    """RpcError unless the response's headers are those of gRPC (HTTP 200 and its content type)."""
    for name, value in stream.headers or ():
        if name == b":status" and value != b"200":
            code = code_from_http(int(value)) if value.isdigit() else StatusCode.UNKNOWN
            raise RpcError(code, f"the peer answered with HTTP status {value.decode('ascii', 'replace')}")
        if name == b"content-type" and not value.startswith(b"application/grpc"):
            text = value[:64].decode("ascii", "replace")
            raise RpcError(StatusCode.UNKNOWN, f"the peer answered with content type {text!r}, not gRPC")


def _check_status(stream: Http2Stream) -> None:
    """Raises the RpcError of a call that has ended, unless its status is OK."""
    # A response of headers only has the status there (Trailers-Only).
    fields = stream.trailers if stream.trailers is not None else stream.headers
    values = dict(fields or ())
    raw = values.get(b"grpc-status")
    if raw is None:
        _check_headers(stream)
        raise RpcError(StatusCode.INTERNAL, "the server ended the call without a status")
    try:
        code = StatusCode(int(raw))
    except ValueError:
        code = StatusCode.UNKNOWN
    if code is StatusCode.OK:
        return
    details: tuple[bytes, ...] = ()
    if b"grpc-status-details-bin" in values:
        with contextlib.suppress(ValueError):
            details = decode_status_details(decode_binary(values[b"grpc-status-details-bin"]))
    message = decode_message(values.get(b"grpc-message", b"").decode("utf-8", "replace"))
    raise RpcError(code, message, details=details, metadata=decode_metadata(fields or ()))

"""HTTP/1.1 on a trio listener, with h11: a connection is read, answered, kept, or handed to a handler as it is.

An ASGI server cannot hand over the connection after `101`, which exec and attach need; h11 is a protocol without I/O,
so the connection stays ours.
"""

from __future__ import annotations

import contextlib
import http
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from email.utils import formatdate

import h11
import trio
from trio.abc import HalfCloseableStream, Listener

from host_bridge.docker_api.app import DockerApi
from host_bridge.docker_api.http import Answer, ClientGoneError, Hijack, Request, Response, parse_query, unquote_path

logger = logging.getLogger("taploom.bridge.docker")

# What Go's server allows a request line and headers to have.
_MAX_HEAD = 1 << 20
_RECEIVE = 1 << 16
# A request's head may take this long, and so long may the client say nothing between requests; in seconds.
_HEAD_TIMEOUT = 300.0
_BODY_TIMEOUT = 300.0
# What is left of a body that nobody read is read over up to this size, as Go does; beyond it the connection ends.
_MAX_LEFT_OVER = 256 << 10
# For how long what nobody wants is still read before a connection is closed, in seconds; as long as Go waits.
_LINGER = 0.5
# What a client may send ahead while it listens to an answer that does not end.
_MAX_AHEAD = 64 << 10

_Gone = (trio.BrokenResourceError, trio.ClosedResourceError)


async def serve_docker(
    listener: Listener[trio.SocketStream],
    api: DockerApi,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves the API to whoever the listener lets in, until cancelled or the listener is closed."""
    async with listener, trio.open_nursery() as nursery:
        task_status.started()
        while True:
            try:
                stream = await listener.accept()
            except trio.ClosedResourceError:
                break
            nursery.start_soon(serve_connection, stream, api)


async def serve_connection(stream: HalfCloseableStream, api: DockerApi) -> None:
    """Serves one connection until either side ends it; what fails on it stays on it."""
    connection = _Connection(stream, api)
    try:
        await connection.run()
    except (*_Gone, ClientGoneError):
        logger.debug("a Docker client went away")
    except Exception:
        logger.exception("a Docker client's connection failed")
    finally:
        await trio.aclose_forcefully(stream)


class _Connection:
    def __init__(self, stream: HalfCloseableStream, api: DockerApi) -> None:
        self._stream = stream
        self._api = api
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=_MAX_HEAD)
        self._body_done = False
        # Bytes of the body that Content-Length says are still to come.
        self._announced = 0

    async def run(self) -> None:
        """Request after request."""
        while True:
            request = await self._next_request()
            if request is None or not await self._exchange(request):
                return
            self._http.start_next_cycle()

    # Reading

    async def _next_request(self) -> h11.Request | None:
        event: object = None
        try:
            with trio.move_on_after(_HEAD_TIMEOUT):
                event = await self._next_event()
        except h11.RemoteProtocolError as error:
            await self._refuse(error)
            return None
        return event if isinstance(event, h11.Request) else None

    async def _next_event(self) -> object:
        while True:
            event = self._http.next_event()
            if event is not h11.NEED_DATA:
                return event
            if self._http.they_are_waiting_for_100_continue:
                await self._stream.send_all(self._send(h11.InformationalResponse(status_code=100, headers=[])))
            self._http.receive_data(bytes(await self._stream.receive_some(_RECEIVE)))

    async def _receive_body(self) -> bytes:
        """The next bytes of the body, b"" at its end."""
        if self._body_done:
            await trio.lowlevel.checkpoint()
            return b""
        try:
            with trio.fail_after(_BODY_TIMEOUT):
                event = await self._next_event()
        except (h11.RemoteProtocolError, trio.TooSlowError) as error:
            raise ClientGoneError(f"the request's body ended early: {error}") from error
        if isinstance(event, h11.Data):
            self._announced -= len(event.data)
            return bytes(event.data)
        self._body_done = True
        return b""

    async def _read_over(self) -> bool:
        """Reads what nobody read of the body; False: there is too much of it."""
        left = _MAX_LEFT_OVER
        if self._announced > left:
            return False
        while chunk := await self._receive_body():
            left -= len(chunk)
            if left < 0:
                return False
        return True

    # One exchange

    async def _exchange(self, head: h11.Request) -> bool:
        """Answers a request; False: the connection has ended."""
        headers = {name.decode("ascii"): value.decode("latin-1") for name, value in head.headers}
        has_body = "transfer-encoding" in headers or headers.get("content-length", "0").strip("0") != ""
        self._body_done = False
        self._announced = int(headers.get("content-length", "0"))
        if not has_body:
            # h11 tells of the end at once: the connection's bytes are the next request's, or a hijacker's.
            await self._receive_body()
        target, _, raw_query = head.target.decode("latin-1").partition("?")
        path = unquote_path(target)
        if path is None or not headers.get("host", "x"):
            await self._refuse(None)
            return False
        query, query_error = parse_query(raw_query)
        request = Request(
            method=head.method.decode("ascii"),
            path=path,
            version=(0, 0),
            query=query,
            query_error=query_error,
            headers=headers,
            has_body=has_body,
            receive=self._receive_body,
        )
        answer = await self._api.answer(request)
        if isinstance(answer, Hijack):
            await self._hand_over(answer, upgrade="upgrade" in headers)
            return False
        await self._respond(request, answer)
        if self._http.our_state is h11.DONE and await self._read_over():
            return self._http.their_state is h11.DONE
        await self._linger()
        return False

    async def _linger(self) -> None:
        """Reads what the client still sends for a moment: a socket closed before would make it lose the answer."""
        with trio.move_on_after(_LINGER):
            await self._stream.send_eof()
            while await self._stream.receive_some(_RECEIVE):
                pass

    async def _respond(self, request: Request, answer: Response) -> None:
        headers = self._headers(answer)
        if isinstance(answer.body, bytes):
            close = False
            if not self._body_done and not self._http.they_are_waiting_for_100_continue:
                close = not await self._read_over()
            elif not self._body_done:
                close = True  # told no before it sent the body
            if answer.status not in (204, 304) and answer.status >= 200:
                headers.append(("Content-Length", str(len(answer.body))))
            if close:
                headers.append(("Connection", "close"))
            data = self._send(h11.Response(status_code=answer.status, headers=headers, reason=_reason(answer.status)))
            if answer.body and request.method != "HEAD" and answer.status not in (204, 304):
                data += self._send(h11.Data(data=answer.body))
            data += self._send(h11.EndOfMessage())
            await self._stream.send_all(data)
            return
        await self._stream_out(answer.status, headers, answer.body)

    async def _stream_out(self, status: int, headers: list[tuple[str, str]], body: AsyncIterator[bytes]) -> None:
        """Sends chunks as they come until they end or the client closes its side."""
        ended = False
        try:
            async with trio.open_nursery() as nursery:
                if self._body_done:
                    nursery.start_soon(self._watch, nursery.cancel_scope)
                head = h11.Response(status_code=status, headers=headers, reason=_reason(status))
                await self._stream.send_all(self._send(head))
                async for chunk in body:
                    if chunk:
                        await self._stream.send_all(self._send(h11.Data(data=chunk)))
                await self._stream.send_all(self._send(h11.EndOfMessage()))
                ended = True
                nursery.cancel_scope.cancel()
        except* _Gone as group:
            raise ClientGoneError("the client closed the connection") from group
        finally:
            close: Callable[[], Awaitable[None]] | None = getattr(body, "aclose", None)
            if close is not None:
                with trio.CancelScope(shield=True):
                    await close()
        if not ended:
            raise ClientGoneError("the client closed its side")

    async def _watch(self, scope: trio.CancelScope) -> None:
        """Ends an answer when the client closes its side; what it sends ahead is the next request."""
        ahead = 0
        while ahead < _MAX_AHEAD:
            try:
                data = bytes(await self._stream.receive_some(_RECEIVE))
            except _Gone:
                data = b""
            try:
                self._http.receive_data(data)
            except RuntimeError:
                return
            if not data:
                scope.cancel()
                return
            ahead += len(data)

    async def _hand_over(self, answer: Hijack, *, upgrade: bool) -> None:
        if not await self._read_over():
            return
        lines = ["HTTP/1.1 101 UPGRADED" if upgrade else "HTTP/1.1 200 OK", f"Content-Type: {answer.content_type}"]
        if upgrade:
            lines += ["Connection: Upgrade", "Upgrade: tcp"]
        lines += [f"{name}: {value}" for name, value in self._api.headers]
        await self._stream.send_all("\r\n".join([*lines, "", ""]).encode("latin-1"))
        early, closed = self._http.trailing_data
        try:
            await answer.handler(_RawStream(self._stream, early, closed=closed))
        except _Gone:
            logger.debug("a Docker client went away from its stream")
        except ExceptionGroup as group:
            if group.split(_Gone)[1] is not None:
                raise

    # Writing

    def _headers(self, answer: Response) -> list[tuple[str, str]]:
        headers = [*self._api.headers, *answer.headers, ("Date", formatdate(usegmt=True))]
        if answer.content_type:
            headers.append(("Content-Type", answer.content_type))
        return headers

    def _send(self, event: h11.Response | h11.InformationalResponse | h11.Data | h11.EndOfMessage) -> bytes:
        data = self._http.send(event)
        assert data is not None, "only ConnectionClosed gives no bytes"
        return data

    async def _refuse(self, error: h11.RemoteProtocolError | None) -> None:
        """What is no HTTP: answered in plain text, as Go does, and closed."""
        status = 400 if error is None else error.error_status_hint
        text = f"{status} {_reason(status).decode()}"
        if error is not None and "Host" in str(error):
            text += ": missing required Host header"
        lines = [
            f"HTTP/1.1 {status} {_reason(status).decode()}",
            "Content-Type: text/plain; charset=utf-8",
            "Connection: close",
            "",
            text,
        ]
        await self._stream.send_all("\r\n".join(lines).encode("ascii"))
        with contextlib.suppress(*_Gone):
            await self._stream.send_eof()


class _RawStream(HalfCloseableStream):
    """The connection after HTTP; what came with the request is read first."""

    def __init__(self, stream: HalfCloseableStream, early: bytes, *, closed: bool) -> None:
        self._stream = stream
        self._early = early
        self._closed = closed

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray:
        if self._early:
            await trio.lowlevel.checkpoint()
            cut = len(self._early) if max_bytes is None else max_bytes
            data, self._early = self._early[:cut], self._early[cut:]
            return data
        if self._closed:
            await trio.lowlevel.checkpoint()
            return b""
        return await self._stream.receive_some(max_bytes)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        await self._stream.send_all(data)

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def aclose(self) -> None:
        await self._stream.aclose()


def _reason(status: int) -> bytes:
    try:
        return http.HTTPStatus(status).phrase.encode("ascii")
    except ValueError:
        return b"Unknown"


__all__ = ["Answer", "serve_connection", "serve_docker"]

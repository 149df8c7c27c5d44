"""One HTTP/2 connection on a trio stream: h2's state machine, one reader and one writer task.

Client (`channel`) and server (`server`) share it. All methods are called from one trio run; the state changes only
between checkpoints, so there are no locks.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings
import trio

from taploom.address import send_all

from .framing import (
    PREFIX_SIZE,
    CompressedMessageError,
    FramingError,
    MessageReader,
    MessageTooLargeError,
    frame_message,
)
from .gate import ENHANCE_YOUR_CALM, FloodLimits, FrameGate, GateError, GoAway, goaway_frame
from .status import RpcError, StatusCode, code_from_reset

logger = logging.getLogger("taploom.rpc")

Headers = Iterable[tuple[bytes, bytes]]

_READ_SIZE = 65_536
_MAX_STREAM_ID = 2**31 - 1
# DATA waits while this much is still to be written: the writer's buffer is not where messages queue up.
_OUTBOUND_HIGH_WATER = 65_536
# The largest DATA frame sent, also to peers that take larger ones and have opened their windows wide.
_MAX_DATA_FRAME = 65_536
# How long the last bytes (a GOAWAY, a status) may take on a connection that is being closed, seconds.
_FLUSH_TIMEOUT = 2.0
# Incomplete messages of all streams together; beyond it only the oldest one gets credit to complete.
_INCOMPLETE_LIMIT = 8 * 2**20
# HPACK dynamic table for what we send, whatever larger size the peer offers.
_ENCODER_TABLE_SIZE = 4096

NO_ERROR = int(h2.errors.ErrorCodes.NO_ERROR)
INTERNAL_ERROR = int(h2.errors.ErrorCodes.INTERNAL_ERROR)
CANCEL = int(h2.errors.ErrorCodes.CANCEL)
REFUSED_STREAM = int(h2.errors.ErrorCodes.REFUSED_STREAM)


@dataclass(frozen=True)
class ConnectionConfig:
    """The limits of a connection. Sizes are in bytes, times in seconds."""

    max_message_size: int = 4 * 2**20
    max_header_list_size: int = 32 * 2**10
    max_concurrent_streams: int = 100
    stream_window: int = 128 * 2**10
    connection_window: int = 512 * 2**10
    handshake_timeout: float = 10.0
    keepalive: float | None = 30.0
    """After so long without a byte from the peer while calls are live, a PING is sent; None: never."""
    max_backlog: int = 2**20
    """Unsent bytes that end the connection: so many are there only when the peer asks much and does not read."""
    keepalive_timeout: float = 10.0
    """The connection is lost when so long after the PING still nothing has come."""
    flood_limits: FloodLimits = field(default_factory=FloodLimits)


class CallEndedError(RpcError):
    """The server has ended the call, so nothing can be sent; its status says more."""


class _RoomySettings(h2.settings.Settings):
    """Settings that advertise a stream limit but let h2 accept more.

    h2 ends the whole connection over one stream too many; the server refuses that stream instead (RFC 9113, 5.1.2),
    which must happen after h2 has taken it.
    """

    @property  # type: ignore[misc]  # h2's has a setter, which nobody uses on the local settings
    def max_concurrent_streams(self) -> int:
        return 2 * int(self.get(h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS, 100)) + 100


class Http2Stream:
    """One call's HTTP/2 stream: what has arrived and why it failed, if it did."""

    __slots__ = (
        "_readable",
        "_sendable",
        "credit_deferred",
        "error",
        "headers",
        "inbox",
        "local_closed",
        "on_reset",
        "reader",
        "receive_error",
        "refused",
        "remote_closed",
        "stream_id",
        "trailers",
    )

    def __init__(self, stream_id: int, max_message_size: int) -> None:
        self.stream_id = stream_id
        self.reader = MessageReader(max_message_size)
        self.inbox: deque[tuple[bytes, int]] = deque()
        """Complete messages with the flow-control credit to hand back once they are consumed."""
        self.credit_deferred = 0
        """Credit of the stream's window (not the connection's) that its incomplete message has to wait for."""
        self.headers: list[tuple[bytes, bytes]] | None = None
        self.trailers: list[tuple[bytes, bytes]] | None = None
        self.remote_closed = False
        self.local_closed = False
        self.error: RpcError | None = None
        """Why the stream is lost: nothing can be sent or received."""
        self.receive_error: RpcError | None = None
        """Why no more messages come, although the stream is open: what came was not a legal message."""
        self.refused = False
        """Whether the server says that it has not looked at the call: it may be tried again."""
        self.on_reset: Callable[[], None] | None = None
        self._readable = trio.lowlevel.ParkingLot()
        self._sendable = trio.lowlevel.ParkingLot()

    def wake(self) -> None:
        """Wakes who waits for something to arrive."""
        self._readable.unpark_all()

    def wake_sender(self) -> None:
        """Wakes who waits for the flow-control window."""
        self._sendable.unpark_all()

    async def wait_changed(self) -> None:
        """Waits for something to arrive. The caller checks its condition again: wake-ups can be spurious."""
        await self._readable.park()

    async def wait_window(self) -> None:
        """Waits for the flow-control window or for the stream to fail."""
        await self._sendable.park()

    def lose(self, error: RpcError) -> None:
        """Nothing can be sent or received any more."""
        self.error = self.error or error
        self.remote_closed = True
        self.close_local()
        if self.on_reset is not None:
            self.on_reset()

    def close_local(self) -> None:
        """Nothing can be sent any more."""
        self.local_closed = True
        self.wake()
        self.wake_sender()


class Connection:
    """HTTP/2 on `transport`; `run` does the work until the connection is over.

    `on_request(stream)` is called on a server for every stream that the client opens and that is not refused.
    `label` names the peer in log messages.
    """

    def __init__(
        self,
        transport: trio.abc.Stream,
        config: ConnectionConfig,
        *,
        label: str,
        on_request: Callable[[Http2Stream], None] | None = None,
    ) -> None:
        self._transport = transport
        self._config = config
        self._on_request = on_request
        self._label = label
        self.is_client = on_request is None
        self._h2 = self._make_h2()
        self._gate = FrameGate(
            server=not self.is_client,
            max_header_block=2 * config.max_header_list_size,
            limits=config.flood_limits,
        )
        self._streams: dict[int, Http2Stream] = {}
        self._outbound = bytearray()
        self._writer_lot = trio.lowlevel.ParkingLot()
        self._drained_lot = trio.lowlevel.ParkingLot()
        self._slot_lot = trio.lowlevel.ParkingLot()
        self._state_lot = trio.lowlevel.ParkingLot()
        self._write_scope = trio.CancelScope()
        self._handshake_scope = trio.CancelScope()
        self._settings_received = False
        self._settings_acknowledged = False
        self._last_received = 0.0
        self._incomplete = 0
        self._goaway_received = False
        self._goaway_sent = False
        self._drain_ping: bytes | None = None
        self._last_accepted: int | None = None
        self.close_reason: str | None = None
        self.timed_out = False
        """Why the connection is over or about to be; None while it is good."""
        self.closed = False
        """True once the transport is closed."""

    def _make_h2(self) -> h2.connection.H2Connection:
        connection = h2.connection.H2Connection(
            h2.config.H2Configuration(
                client_side=self.is_client,
                header_encoding=None,
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        codes = h2.settings.SettingCodes
        values = {
            codes.INITIAL_WINDOW_SIZE: self._config.stream_window,
            codes.MAX_HEADER_LIST_SIZE: self._config.max_header_list_size,
            codes.MAX_CONCURRENT_STREAMS: self._config.max_concurrent_streams,
        }
        if self.is_client:
            values[codes.ENABLE_PUSH] = 0
        connection.local_settings = _RoomySettings(client=self.is_client, initial_values=values)
        connection.decoder.max_header_list_size = self._config.max_header_list_size
        return connection

    # Life cycle.

    @property
    def usable(self) -> bool:
        """Whether new calls can be started."""
        return self.close_reason is None and not self._goaway_received

    async def run(self) -> None:
        """Serves the connection until it is over and closes the transport. Raises nothing but Cancelled."""
        self._h2.initiate_connection()
        self._h2.increment_flow_control_window(max(self._config.connection_window - 65_535, 1))
        self._last_received = trio.current_time()
        self._flush()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._read_loop)
                if self._config.keepalive is not None:
                    nursery.start_soon(self._keepalive_loop, self._config.keepalive)
                with self._write_scope:
                    await self._write_loop()
                self.finish("the connection was given up: its last bytes could not be sent")
                nursery.cancel_scope.cancel()
        finally:
            self.finish("the connection was cancelled")
            self.closed = True
            self._state_lot.unpark_all()
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(self._transport)

    def finish(self, reason: str, error_code: int | None = None) -> None:
        """Ends the connection: fails what is under way with UNAVAILABLE, sends what is queued, then closes.

        With an `error_code` a GOAWAY with the reason goes out first. Only the first call has an effect.
        """
        if self.close_reason is not None:
            return
        self.close_reason = reason
        self._outbound += self._h2.data_to_send()
        if error_code is not None:
            self._outbound += goaway_frame(
                self._h2.highest_inbound_stream_id, error_code, reason.encode("utf-8", "replace")[:200]
            )
        for stream in list(self._streams.values()):
            self._lose(stream, RpcError(StatusCode.UNAVAILABLE, f"connection lost: {reason}"))
        self._write_scope.deadline = trio.current_time() + _FLUSH_TIMEOUT
        self._writer_lot.unpark_all()
        self._drained_lot.unpark_all()
        self._slot_lot.unpark_all()
        self._state_lot.unpark_all()

    async def wait_ready(self) -> None:
        """Waits for the peer's SETTINGS; RpcError UNAVAILABLE when the connection ends before."""
        while not self._settings_received:
            if self.close_reason is not None:
                raise RpcError(StatusCode.UNAVAILABLE, f"cannot open the channel: {self.close_reason}")
            await self._state_lot.park()

    async def wait_finishing(self) -> None:
        """Waits until no new calls can be started any more and none is under way, or the connection is over."""
        while self.close_reason is None and not (self._goaway_received and not self._streams):
            await self._state_lot.park()

    async def wait_shut_down(self) -> None:
        """Waits until the connection is over, as it is soon after `shut_down` and the end of the last call."""
        while self.close_reason is None:
            await self._state_lot.park()

    async def wait_closed(self) -> None:
        """Waits until the transport is closed."""
        while not self.closed:
            await self._state_lot.park()

    def shut_down(self) -> None:
        """Starts the graceful end (RFC 9113, section 6.8): calls under way go on, later ones are refused.

        A GOAWAY that names no stream is followed by a PING; when its answer is there, all streams that the peer
        opened without knowing have arrived, and the GOAWAY with the real last stream goes out.
        """
        if self._goaway_sent or self.close_reason is not None:
            return
        self._goaway_sent = True
        if self.is_client:
            self._write_raw(goaway_frame(0))
            return
        self._write_raw(goaway_frame(_MAX_STREAM_ID, NO_ERROR, b"draining"))
        self._drain_ping = b"taploom\x01"
        self._h2.ping(self._drain_ping)
        self._flush()

    def _finish_if_drained(self) -> None:
        if self._streams:
            return
        if self._goaway_received:
            self._state_lot.unpark_all()
            self.finish("the peer has shut the connection down", NO_ERROR if not self._goaway_sent else None)
        elif self._last_accepted is not None:
            self.finish("shut down")

    # Writing.

    def _flush(self) -> None:
        data = self._h2.data_to_send()
        if data:
            self._outbound += data
            self._writer_lot.unpark_all()

    def _write_raw(self, frame: bytes) -> None:
        self._flush()
        self._outbound += frame
        self._writer_lot.unpark_all()

    async def _write_loop(self) -> None:
        # The only task that sends: a send_all that is cancelled half-way leaves a stream that nobody can use.
        while True:
            if self._outbound:
                data, self._outbound = self._outbound, bytearray()
                try:
                    await send_all(self._transport, data)
                except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
                    self.finish("the peer closed the connection")
                    return
                self._drained_lot.unpark_all()
            elif self.close_reason is not None:
                return
            else:
                await self._writer_lot.park()

    def send_headers(self, stream: Http2Stream, headers: Headers, *, end_stream: bool = False) -> None:
        """Queues a HEADERS frame. RpcError when the stream is over."""
        self._check_open(stream)
        try:
            self._h2.send_headers(stream.stream_id, list(headers), end_stream=end_stream)
        except h2.exceptions.ProtocolError as error:
            raise self._cannot_send(stream, error) from error
        stream.local_closed = stream.local_closed or end_stream
        self._flush()

    def end_stream(self, stream: Http2Stream) -> None:
        """Half-closes the stream. RpcError when it is over."""
        self._check_open(stream)
        try:
            self._h2.end_stream(stream.stream_id)
        except h2.exceptions.ProtocolError as error:
            raise self._cannot_send(stream, error) from error
        stream.local_closed = True
        self._flush()

    async def send_message(self, stream: Http2Stream, message: bytes, *, end_stream: bool = False) -> None:
        """Queues a message as flow control allows. RpcError when the stream is over.

        Cancelled half-way, the stream is reset: the rest of the message could never follow.
        """
        data = memoryview(frame_message(message))
        started = False
        try:
            while True:
                self._check_open(stream)
                if len(self._outbound) >= _OUTBOUND_HIGH_WATER:
                    await self._drained_lot.park()
                    continue
                try:
                    window = self._h2.local_flow_control_window(stream.stream_id)
                    size = min(window, self._h2.max_outbound_frame_size, _MAX_DATA_FRAME, len(data))
                    if size <= 0:
                        await stream.wait_window()
                        continue
                    last = size == len(data)
                    self._h2.send_data(stream.stream_id, bytes(data[:size]), end_stream=last and end_stream)
                except h2.exceptions.ProtocolError as error:
                    raise self._cannot_send(stream, error) from error
                self._gate.data_sent(1)
                self._flush()
                started = True
                if last:
                    stream.local_closed = end_stream
                    return
                data = data[size:]
        except BaseException:
            if started:
                self.reset(stream, CANCEL)
                self._lose(stream, RpcError(StatusCode.CANCELLED, "the call was cancelled in the middle of a message"))
            raise

    def reset(self, stream: Http2Stream, error_code: int) -> None:
        """Resets the stream unless both sides have ended it."""
        if stream.local_closed and stream.remote_closed:
            return
        try:
            self._h2.reset_stream(stream.stream_id, error_code)
        except h2.exceptions.ProtocolError:
            return  # it is closed already
        stream.local_closed = True
        self._flush()

    def _check_open(self, stream: Http2Stream) -> None:
        if stream.error is not None:
            raise stream.error
        if self.is_client and stream.remote_closed:
            raise CallEndedError(
                StatusCode.FAILED_PRECONDITION, "the server has ended the call; it takes no more messages"
            )
        if stream.local_closed:
            raise RpcError(StatusCode.CANCELLED, "the call has ended on this side; nothing more can be sent")

    @staticmethod
    def _cannot_send(stream: Http2Stream, error: Exception) -> RpcError:
        if stream.error is not None:
            return stream.error
        return RpcError(StatusCode.UNAVAILABLE, f"the stream is closed: {error}")

    # Streams.

    async def open_stream(self, headers: Headers, first_message: bytes | None = None) -> Http2Stream:
        """A client's new stream; waits while the server allows no more. RpcError UNAVAILABLE without connection.

        With `first_message`, that message is the whole request and the stream is half-closed after it.
        """
        while True:
            if not self.usable:
                reason = self.close_reason or "the peer shuts it down"
                raise RpcError(StatusCode.UNAVAILABLE, f"the channel takes no more calls: {reason}")
            if self._h2.open_outbound_streams < self._h2.remote_settings.max_concurrent_streams:
                break
            await self._slot_lot.park()
        try:
            stream_id = self._h2.get_next_available_stream_id()
            self._h2.send_headers(stream_id, list(headers))
        except h2.exceptions.ProtocolError as error:
            raise RpcError(StatusCode.UNAVAILABLE, f"the channel takes no more calls: {error}") from error
        stream = Http2Stream(stream_id, self._config.max_message_size)
        self._streams[stream_id] = stream
        self._gate.stream_opened()
        self._state_lot.unpark_all()
        try:
            if first_message is not None:
                await self.send_message(stream, first_message, end_stream=True)
        except CallEndedError:
            pass  # whoever receives finds out why
        except BaseException:
            self.forget(stream, CANCEL)
            raise
        self._flush()
        return stream

    def forget(self, stream: Http2Stream, error_code: int = CANCEL) -> None:
        """The call is over: resets what is still open and hands back the credit of what nobody read."""
        if self._streams.pop(stream.stream_id, None) is None:
            return
        self._incomplete -= stream.reader.pending
        if self.close_reason is None:
            self.reset(stream, error_code)
            self._acknowledge(stream, sum(credit for _, credit in stream.inbox))
            self._release_deferred()
        stream.inbox.clear()
        self._slot_lot.unpark()
        if self._goaway_received or self._goaway_sent:
            self._finish_if_drained()

    async def receive(self, stream: Http2Stream) -> bytes | None:
        """The next message; None at the end of the peer's messages. RpcError when the stream failed."""
        while not stream.inbox:
            if stream.error is not None:
                raise stream.error
            if stream.receive_error is not None:
                raise stream.receive_error
            if stream.remote_closed:
                return None
            await stream.wait_changed()
        message, credit = stream.inbox.popleft()
        self._acknowledge(stream, credit)
        return message

    def _acknowledge(self, stream: Http2Stream, size: int) -> None:
        if size <= 0 or self.close_reason is not None:
            return
        self._h2.acknowledge_received_data(size, stream.stream_id)
        self._flush()

    # Reading.

    async def _read_loop(self) -> None:
        timeout = self._config.handshake_timeout
        self._handshake_scope.deadline = trio.current_time() + timeout
        reason = "the peer closed the connection"
        error_code: int | None = None
        with self._handshake_scope:
            try:
                await self._read_until_end()
            except (GateError, h2.exceptions.ProtocolError) as error:
                reason = f"protocol violation by the peer: {str(error) or type(error).__name__}"
                # h2 has queued a GOAWAY of its own.
                error_code = error.error_code if isinstance(error, GateError) else None
                logger.warning("closing the connection with %s: %s", self._label, reason)
            except (trio.BrokenResourceError, trio.ClosedResourceError, OSError):
                pass
            except Exception:  # whatever bytes do to h2 ends this connection and nothing else
                reason = "what the peer sent cannot be processed"
                error_code = INTERNAL_ERROR
                logger.exception("closing the connection with %s: %s", self._label, reason)
        if self._handshake_scope.cancelled_caught:
            reason = f"the peer did not send its HTTP/2 preface and SETTINGS within {timeout:g} s"
            error_code = int(h2.errors.ErrorCodes.SETTINGS_TIMEOUT)
            logger.warning("closing the connection with %s: %s", self._label, reason)
        self.finish(reason, error_code)

    async def _read_until_end(self) -> None:
        while self.close_reason is None:
            data = await self._transport.receive_some(_READ_SIZE)
            if not data:
                return
            now = self._last_received = trio.current_time()
            for item in self._gate.feed(bytes(data), now):
                if isinstance(item, GoAway):
                    self._goaway(item)
                    continue
                for event in self._h2.receive_data(item):
                    handler = self._HANDLERS.get(type(event))
                    if handler is not None:
                        handler(self, event)
            self._flush()
            if len(self._outbound) > self._config.max_backlog:
                raise GateError(ENHANCE_YOUR_CALM, "the peer sends but does not read")

    def _goaway(self, frame: GoAway) -> None:
        self._goaway_received = True
        debug = frame.debug_data[:200].decode("utf-8", "replace")
        if frame.error_code:
            logger.warning("%s shuts the connection down: error %d %s", self._label, frame.error_code, debug)
        if self.is_client:
            text = f"the server shut the connection down before it took the call (error {frame.error_code} {debug!r})"
            for stream_id, stream in list(self._streams.items()):
                if stream_id > frame.last_stream_id:
                    self._lose(stream, RpcError(StatusCode.UNAVAILABLE, text))
        self._slot_lot.unpark_all()
        self._state_lot.unpark_all()
        self._finish_if_drained()

    def _request(self, event: h2.events.RequestReceived) -> None:
        assert self._on_request is not None
        stream = Http2Stream(event.stream_id, self._config.max_message_size)
        draining = self._last_accepted is not None and event.stream_id > self._last_accepted
        if draining or self.close_reason is not None or self._is_full():
            self.reset(stream, REFUSED_STREAM)
            self._gate.stream_refused(self._last_received)
            return
        stream.headers = list(event.headers)
        self._streams[event.stream_id] = stream
        self._state_lot.unpark_all()
        self._on_request(stream)

    def _is_full(self) -> bool:
        """Whether a server takes no more calls; handlers of reset calls that still clean up count less."""
        limit = self._config.max_concurrent_streams
        if len(self._streams) < limit:
            return False
        return len(self._streams) >= 2 * limit or sum(s.error is None for s in self._streams.values()) >= limit

    def _response(self, event: h2.events.ResponseReceived) -> None:
        stream = self._streams.get(event.stream_id)
        if stream is not None:
            stream.headers = list(event.headers)
            stream.wake()

    def _informational(self, event: h2.events.InformationalResponseReceived) -> None:
        self._gate.informational_response(self._last_received)

    def _trailers(self, event: h2.events.TrailersReceived) -> None:
        stream = self._streams.get(event.stream_id)
        if stream is not None:
            stream.trailers = list(event.headers)
            stream.wake()

    def _data(self, event: h2.events.DataReceived) -> None:
        stream = self._streams.get(event.stream_id)
        total = event.flow_controlled_length
        if stream is None or stream.error is not None or stream.receive_error is not None:
            self._h2.acknowledge_received_data(total, event.stream_id)
            return
        before = stream.reader.pending
        try:
            messages = stream.reader.feed(event.data)
        except FramingError as error:
            self._incomplete -= before
            stream.reader = MessageReader(self._config.max_message_size)
            stream.credit_deferred = 0
            self._h2.acknowledge_received_data(total, event.stream_id)
            self._framing_failed(stream, error)
            return
        pending = stream.reader.pending
        self._incomplete += pending - before
        # What completes a message is handed back when the message is consumed; the part of an incomplete message
        # at once, or a message larger than the window could never complete.
        at_once = total - len(event.data)
        if messages:
            credit = -before
            for message in messages:
                stream.inbox.append((message, credit + len(message) + PREFIX_SIZE))
                credit = 0
            at_once += pending
        else:
            at_once += len(event.data)
        if pending and self._incomplete > _INCOMPLETE_LIMIT and not self._is_oldest_incomplete(stream):
            # Only this stream has to wait; the connection's window is everybody's.
            self._h2.increment_flow_control_window(at_once)
            stream.credit_deferred += at_once
        elif at_once:
            self._h2.acknowledge_received_data(at_once, event.stream_id)
        if messages:
            self._release_deferred()
            stream.wake()

    def _is_oldest_incomplete(self, stream: Http2Stream) -> bool:
        return next((other for other in self._streams.values() if other.reader.pending), None) is stream

    def _release_deferred(self) -> None:
        """Gives credit to incomplete messages that were held back, as far as memory allows: at least to the oldest."""
        for stream in self._streams.values():
            if not stream.credit_deferred:
                continue
            if self._incomplete <= _INCOMPLETE_LIMIT or not stream.reader.pending or self._is_oldest_incomplete(stream):
                credit, stream.credit_deferred = stream.credit_deferred, 0
                # h2 is ahead of us: what has come since in the same packet may have ended the stream.
                if not stream.remote_closed:
                    with contextlib.suppress(h2.exceptions.StreamClosedError):
                        self._h2.increment_flow_control_window(credit, stream.stream_id)
        self._flush()

    def _framing_failed(self, stream: Http2Stream, error: FramingError) -> None:
        if isinstance(error, MessageTooLargeError):
            code = StatusCode.RESOURCE_EXHAUSTED
        elif isinstance(error, CompressedMessageError) and not self.is_client:
            code = StatusCode.UNIMPLEMENTED
        else:
            code = StatusCode.INTERNAL
        stream.receive_error = stream.receive_error or RpcError(code, str(error))
        stream.wake()

    def _ended(self, event: h2.events.StreamEnded) -> None:
        stream = self._streams.get(event.stream_id)
        if stream is None:
            return
        if stream.reader.pending and stream.trailers is None:
            self._framing_failed(stream, FramingError("the peer ended the call in the middle of a message"))
        stream.remote_closed = True
        stream.wake()
        stream.wake_sender()

    def _reset(self, event: h2.events.StreamReset) -> None:
        stream = self._streams.get(event.stream_id)
        if not event.remote_reset:
            # h2 reset the stream because of what the peer sent on it.
            self._gate.stream_refused(self._last_received)
        if stream is None:
            return
        code = int(event.error_code or 0)
        stream.refused = code == REFUSED_STREAM
        self._lose(stream, RpcError(code_from_reset(code), f"the peer reset the call (HTTP/2 error {code})"))

    def _lose(self, stream: Http2Stream, error: RpcError) -> None:
        if self.is_client and stream.remote_closed:
            # The status is there and stands, such as when the server needs no more of the request and resets the
            # stream with NO_ERROR after its trailers (RFC 9113, section 8.1).
            stream.close_local()
        else:
            stream.lose(error)

    def _window(self, event: h2.events.WindowUpdated) -> None:
        if event.stream_id:
            stream = self._streams.get(event.stream_id)
            if stream is not None:
                stream.wake_sender()
            return
        for stream in self._streams.values():
            stream.wake_sender()

    def _settings(self, event: h2.events.RemoteSettingsChanged) -> None:
        self._h2.encoder.header_table_size = min(self._h2.encoder.header_table_size, _ENCODER_TABLE_SIZE)
        self._settings_received = True
        self._handshake_progress()
        for stream in self._streams.values():
            stream.wake_sender()
        self._slot_lot.unpark_all()
        self._state_lot.unpark_all()

    def _settings_ack(self, event: h2.events.SettingsAcknowledged) -> None:
        self._settings_acknowledged = True
        self._handshake_progress()

    def _handshake_progress(self) -> None:
        if self._settings_received and self._settings_acknowledged:
            self._handshake_scope.deadline = float("inf")

    def _ping_ack(self, event: h2.events.PingAckReceived) -> None:
        if self._drain_ping is not None and event.ping_data == self._drain_ping:
            self._drain_ping = None
            self._last_accepted = self._h2.highest_inbound_stream_id
            self._write_raw(goaway_frame(self._last_accepted, NO_ERROR, b"draining"))
            self._finish_if_drained()

    _HANDLERS: dict[type, Callable[..., None]] = {  # noqa: RUF012 - a constant
        h2.events.RequestReceived: _request,
        h2.events.ResponseReceived: _response,
        h2.events.InformationalResponseReceived: _informational,
        h2.events.TrailersReceived: _trailers,
        h2.events.DataReceived: _data,
        h2.events.StreamEnded: _ended,
        h2.events.StreamReset: _reset,
        h2.events.WindowUpdated: _window,
        h2.events.RemoteSettingsChanged: _settings,
        h2.events.SettingsAcknowledged: _settings_ack,
        h2.events.PingAckReceived: _ping_ack,
    }

    # Keepalive.

    async def _keepalive_loop(self, interval: float) -> None:
        busy_since = 0.0
        while True:
            if not self._streams:
                while not self._streams:  # an idle connection is left in peace
                    await self._state_lot.park()
                busy_since = trio.current_time()
            await trio.sleep_until(max(self._last_received, busy_since) + interval)
            if not self._streams or trio.current_time() < max(self._last_received, busy_since) + interval:
                continue
            if self.close_reason is not None:
                return
            asked = trio.current_time()
            self._h2.ping(b"taploom\x02")
            self._flush()
            await trio.sleep(self._config.keepalive_timeout)
            if self._last_received < asked:
                self.timed_out = True
                self.finish(f"the peer did not answer a PING within {self._config.keepalive_timeout:g} s")
                return

"""What stands between the socket and h2: frame limits, flood limits and GOAWAY, sans-IO.

h2 buffers a frame of up to 16 MiB before it looks at its length, counts no floods, and closes the connection when a
GOAWAY arrives although the calls in flight must finish (RFC 9113, section 6.8). So the frame headers are read here
first, and GOAWAY frames never reach h2.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAME_HEADER_SIZE = 9

_DATA = 0x0
_HEADERS = 0x1
_RST_STREAM = 0x3
_SETTINGS = 0x4
_PUSH_PROMISE = 0x5
_GOAWAY = 0x7
_WINDOW_UPDATE = 0x8
_CONTINUATION = 0x9
_FLAG_ACK = 0x1
_FLAG_END_STREAM = 0x1
_FLAG_PADDED = 0x8

# RFC 9113, section 7.
PROTOCOL_ERROR = 0x1
FRAME_SIZE_ERROR = 0x6
ENHANCE_YOUR_CALM = 0xB

_GOAWAY_FIXED = struct.Struct(">II")


class GateError(Exception):
    """The peer broke a limit or the protocol: the connection ends with this HTTP/2 error code."""

    def __init__(self, error_code: int, message: str) -> None:
        super().__init__(message)
        self.error_code = error_code


class TokenBucket:
    """`burst` events at once, `rate` events per second after that."""

    def __init__(self, burst: float, rate: float) -> None:
        self._burst = burst
        self._rate = rate
        self._tokens = burst
        self._last = 0.0

    def take(self, now: float, count: float = 1.0) -> bool:
        """Whether `count` more events are allowed at `now` (seconds of a monotonic clock)."""
        if now > self._last:
            self._tokens = min(self._burst, self._tokens + (now - self._last) * self._rate)
            self._last = now
        if self._tokens < count:
            return False
        self._tokens -= count
        return True

    def give(self, count: float) -> None:
        """Allows `count` more events."""
        self._tokens = min(self._burst, self._tokens + count)


@dataclass(frozen=True)
class GoAway:
    """A GOAWAY frame."""

    last_stream_id: int
    error_code: int
    debug_data: bytes


@dataclass(frozen=True)
class FloodLimits:
    """How much of what costs us more than the peer is allowed: bursts, and events per second."""

    control_burst: int = 200
    """PING, SETTINGS, PRIORITY, unknown, empty and padded DATA frames."""
    control_rate: float = 50.0
    reset_burst: int = 200
    """Streams reset by the peer (the "rapid reset" attack, CVE-2023-44487) or by us because of the peer."""
    reset_rate: float = 50.0
    window_burst: int = 2000
    """WINDOW_UPDATE frames; each DATA frame sent allows four more."""
    window_rate: float = 200.0


class FrameGate:
    """Checks frame headers as their bytes arrive and takes GOAWAY frames out."""

    def __init__(
        self,
        *,
        server: bool,
        max_frame_size: int = 16_384,
        max_header_block: int = 65_536,
        limits: FloodLimits | None = None,
    ) -> None:
        limits = limits or FloodLimits()
        self._preface_left = PREFACE if server else b""
        self._max_frame_size = max_frame_size
        self._max_header_block = max_header_block
        self._control = TokenBucket(limits.control_burst, limits.control_rate)
        self._resets = TokenBucket(limits.reset_burst, limits.reset_rate)
        self._windows = TokenBucket(limits.window_burst, limits.window_rate)
        self._partial = b""
        self._remaining = 0
        self._goaway: bytearray | None = None
        self._settings_seen = False
        self._header_block = 0

    def feed(self, data: bytes, now: float) -> Iterator[bytes | GoAway]:
        """Bytes for h2 and GOAWAY frames, in order. GateError ends the connection.

        `now` is in seconds of a monotonic clock. The iterator must be exhausted before the next call.
        """
        if self._preface_left:
            size = min(len(self._preface_left), len(data))
            if data[:size] != self._preface_left[:size]:
                raise GateError(PROTOCOL_ERROR, "the peer does not speak HTTP/2: wrong connection preface")
            self._preface_left = self._preface_left[size:]
            yield data[:size]
            data = data[size:]
        if self._partial:
            data = self._partial + data
        position = run = 0
        end = len(data)
        while True:
            if self._remaining:
                size = min(self._remaining, end - position)
                if self._goaway is not None:
                    self._goaway += data[position : position + size]
                    run = position + size
                position += size
                self._remaining -= size
                if self._remaining:
                    break
                if self._goaway is not None:
                    yield self._parse_goaway(bytes(self._goaway))
                    self._goaway = None
            if end - position < FRAME_HEADER_SIZE:
                break
            length = int.from_bytes(data[position : position + 3], "big")
            kind = data[position + 3]
            self._check(kind, data[position + 4], length, now)
            if kind == _GOAWAY:
                if run < position:
                    yield data[run:position]
                self._goaway = bytearray()
                run = position + FRAME_HEADER_SIZE
            position += FRAME_HEADER_SIZE
            self._remaining = length
        self._partial = data[position:]
        if run < position:
            yield data[run:position]

    def data_sent(self, frames: int) -> None:
        """Notes that we sent DATA frames: the peer will answer with WINDOW_UPDATE frames."""
        self._windows.give(4.0 * frames)

    def stream_opened(self) -> None:
        """Notes that we, a client, opened a stream: the server may reset it."""
        self._resets.give(1.0)

    def stream_refused(self, now: float) -> None:
        """Notes that a stream was reset by us because of what the peer did; GateError when it does so too often."""
        if not self._resets.take(now):
            raise GateError(ENHANCE_YOUR_CALM, "too many streams were reset")

    def informational_response(self, now: float) -> None:
        """Notes a 1xx response; GateError when there are too many."""
        if not self._control.take(now):
            raise GateError(ENHANCE_YOUR_CALM, "too many informational responses")

    def _check(self, kind: int, flags: int, length: int, now: float) -> None:
        if length > self._max_frame_size:
            raise GateError(FRAME_SIZE_ERROR, f"a frame of {length} bytes; at most {self._max_frame_size} are allowed")
        if not self._settings_seen:
            if kind != _SETTINGS or flags & _FLAG_ACK:
                raise GateError(PROTOCOL_ERROR, "the peer does not speak HTTP/2: its first frame is not SETTINGS")
            self._settings_seen = True
        if kind == _DATA:
            if (length or flags & _FLAG_END_STREAM) and not flags & _FLAG_PADDED:
                self._control.give(1.0)
                return
        elif kind in (_HEADERS, _PUSH_PROMISE):
            self._header_block = length
            return
        elif kind == _CONTINUATION:
            self._header_block += length
            if self._header_block > self._max_header_block:
                raise GateError(ENHANCE_YOUR_CALM, f"a header block of more than {self._max_header_block} bytes")
            return
        elif kind == _RST_STREAM:
            if not self._resets.take(now):
                raise GateError(ENHANCE_YOUR_CALM, "too many streams were reset")
            return
        elif kind == _WINDOW_UPDATE:
            if not self._windows.take(now):
                raise GateError(ENHANCE_YOUR_CALM, "too many WINDOW_UPDATE frames")
            return
        elif kind == _GOAWAY and length < _GOAWAY_FIXED.size:
            raise GateError(FRAME_SIZE_ERROR, "a GOAWAY frame of fewer than 8 bytes")
        if not self._control.take(now):
            raise GateError(ENHANCE_YOUR_CALM, "too many control frames (such as PING and SETTINGS)")

    @staticmethod
    def _parse_goaway(payload: bytes) -> GoAway:
        last_stream_id, error_code = _GOAWAY_FIXED.unpack_from(payload)
        return GoAway(last_stream_id & 0x7FFF_FFFF, error_code, payload[_GOAWAY_FIXED.size :])


def goaway_frame(last_stream_id: int, error_code: int = 0, debug_data: bytes = b"") -> bytes:
    """A GOAWAY frame; written past h2, which would close the connection's state machine with it."""
    payload = _GOAWAY_FIXED.pack(last_stream_id, error_code) + debug_data
    return len(payload).to_bytes(3, "big") + bytes((_GOAWAY, 0)) + bytes(4) + payload

"""One unary gRPC call on a Unix socket, blocking, with h2 and nothing else.

`taploom network connect` is one call in a process of its own. Importing trio and the full client would cost more than
the call: this keeps the command within reach of what `docker network connect` takes. Streams, other kinds of address
and large requests go through `taploom.rpc`.

Source: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md.
"""

from __future__ import annotations

import socket
import time
from urllib.parse import unquote

import h2.config
import h2.connection
import h2.events
import h2.exceptions

# Goes out in one frame and within every peer's first window (RFC 9113 sections 4.2 and 6.9.2).
MAX_REQUEST = 16_000
# As `taploom.rpc` has it.
MAX_RESPONSE = 4 << 20
_PREFIX = 5
_CHUNK = 65_536


class CallError(Exception):
    """The call ended with a status other than OK. `code` is gRPC's number; the message is the server's, for people."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def call_unary(path: str, method: str, request: bytes, seconds: float) -> bytes:
    """Calls a method on the server at a Unix socket and returns the serialized response.

    Args:
        path: the socket.
        method: `/package.Service/Method`.
        request: the serialized request, at most `MAX_REQUEST` bytes.
        seconds: how long all of it may take.

    Raises:
        OSError: nobody answers there, or not in time (TimeoutError).
        CallError: the server ended the call with an error, or what it sent is not gRPC.
    """
    deadline = time.monotonic() + seconds
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(seconds)
        sock.connect(path)
        http = h2.connection.H2Connection(h2.config.H2Configuration(header_encoding="utf-8"))
        http.initiate_connection()
        http.send_headers(1, _headers(method, seconds))
        http.send_data(1, b"\0" + len(request).to_bytes(4, "big") + request, end_stream=True)
        sock.sendall(http.data_to_send())
        call = _Call()
        while not call.ended:
            sock.settimeout(max(0.001, deadline - time.monotonic()))
            data = sock.recv(_CHUNK)
            if not data:
                raise CallError(14, "")
            try:
                for event in http.receive_data(data):
                    call.happened(event, http)
            except h2.exceptions.ProtocolError as error:
                raise CallError(13, f"the server does not speak HTTP/2: {error}") from error
            if not call.ended:
                sock.sendall(http.data_to_send())
        return call.result()


def _headers(method: str, seconds: float) -> list[tuple[str, str]]:
    return [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", method),
        (":authority", "localhost"),
        ("te", "trailers"),
        ("content-type", "application/grpc"),
        ("grpc-timeout", f"{int(seconds * 1000)}m"),
    ]


class _Call:
    """What has come of the call so far."""

    def __init__(self) -> None:
        self.ended = False
        self._body = bytearray()
        self._headers: dict[str, str] = {}
        self._reset: int | None = None

    def happened(self, event: h2.events.Event, http: h2.connection.H2Connection) -> None:
        match event:
            case h2.events.ResponseReceived() | h2.events.TrailersReceived():
                self._headers.update({str(name): str(value) for name, value in event.headers or ()})
            case h2.events.DataReceived():
                self._body += event.data or b""
                if len(self._body) > MAX_RESPONSE + _PREFIX:
                    raise CallError(8, f"the response has more than {MAX_RESPONSE} bytes")
                http.acknowledge_received_data(event.flow_controlled_length or 0, 1)
            case h2.events.StreamReset():
                # Trailers followed by RST_STREAM(NO_ERROR) are a complete answer (RFC 9113 section 8.1).
                self.ended = True
                self._reset = int(event.error_code or 0)
            case h2.events.StreamEnded() | h2.events.ConnectionTerminated():
                self.ended = True

    def result(self) -> bytes:
        status = self._headers.get("grpc-status")
        if status is None:
            http = self._headers.get(":status", "none")
            how = f"reset the call (HTTP/2 error {self._reset})" if self._reset else f"answered with HTTP status {http}"
            raise CallError(14, f"the server {how}")
        if status != "0":
            code = int(status) if status.isdecimal() else 2
            raise CallError(code, unquote(self._headers.get("grpc-message", "")))
        size = int.from_bytes(self._body[1:_PREFIX], "big")
        if len(self._body) != _PREFIX + size or self._body[0] != 0:
            raise CallError(13, "the response is not one uncompressed message")
        return bytes(self._body[_PREFIX:])

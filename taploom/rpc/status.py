"""gRPC status: codes, the error that carries them, and their form on the wire.

Sources: https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md (trailers, percent-encoding, mapping of HTTP/2
error codes), doc/http-grpc-status-mapping.md, and google/rpc/status.proto for ``grpc-status-details-bin``.
"""

from __future__ import annotations

import enum
import re

from .wire import LENGTH_DELIMITED, WireError, encode_bytes, encode_varint_field, fields

_ESCAPE = re.compile(rb"%([0-9A-Fa-f]{2})")


class StatusCode(enum.IntEnum):
    """How a call ended (https://github.com/grpc/grpc/blob/master/doc/statuscodes.md)."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class RpcError(Exception):
    """A call that did not end with OK.

    Raised in a handler it becomes the call's status; a client's call raises it.

    Attributes:
        code: the status code, never OK.
        message: a text for people that says what to do.
        details: serialized google.protobuf.Any messages (see `pack_any`), the details of google.rpc.Status.
        metadata: trailing metadata as (key, value) pairs; values of ``-bin`` keys are bytes.
    """

    def __init__(
        self,
        code: StatusCode,
        message: str = "",
        *,
        details: tuple[bytes, ...] = (),
        metadata: tuple[tuple[str, str | bytes], ...] = (),
    ) -> None:
        if code is StatusCode.OK:
            raise ValueError("an RpcError cannot have the status OK")
        super().__init__(code, message)
        self.code = code
        self.message = message
        self.details = details
        self.metadata = metadata

    def __str__(self) -> str:
        return f"{self.code.name}: {self.message}" if self.message else self.code.name


def pack_any(type_url: str, value: bytes) -> bytes:
    """A serialized google.protobuf.Any, as `RpcError.details` has them.

    `type_url` is such as ``type.googleapis.com/google.rpc.BadRequest``, `value` that message, serialized.
    """
    return encode_bytes(1, type_url.encode()) + encode_bytes(2, value)


def unpack_any(data: bytes) -> tuple[str, bytes]:
    """The type URL and the value of a serialized google.protobuf.Any; WireError when it is not one."""
    type_url, value = "", b""
    for number, wire_type, content in fields(data):
        if wire_type == LENGTH_DELIMITED and isinstance(content, bytes):
            if number == 1:
                try:
                    type_url = content.decode()
                except UnicodeDecodeError:
                    raise WireError("the type URL of an Any is not UTF-8") from None
            elif number == 2:
                value = content
    return type_url, value


def encode_status(code: StatusCode, message: str, details: tuple[bytes, ...]) -> bytes:
    """A serialized google.rpc.Status."""
    head = encode_varint_field(1, code) + encode_bytes(2, message.encode())
    return head + b"".join(encode_bytes(3, detail) for detail in details)


def decode_status_details(data: bytes) -> tuple[bytes, ...]:
    """The details of a serialized google.rpc.Status; none when it is malformed (the status itself still counts)."""
    try:
        return tuple(content for number, _, content in fields(data) if number == 3 and isinstance(content, bytes))
    except WireError:
        return ()


def encode_message(message: str) -> str:
    """`message` percent-encoded for ``grpc-message``: all but the printable ASCII characters without ``%``."""
    data = message.encode("utf-8", "replace")
    return "".join(chr(byte) if 0x20 <= byte <= 0x7E and byte != 0x25 else f"%{byte:02X}" for byte in data)


def decode_message(value: str) -> str:
    """The text of a ``grpc-message``; what is not well encoded stays as it is (the protocol forbids to fail on it)."""
    data = _ESCAPE.sub(lambda match: bytes((int(match[1], 16),)), value.encode("utf-8", "replace"))
    return data.decode("utf-8", "replace")


_HTTP_STATUS = {
    400: StatusCode.INTERNAL,
    401: StatusCode.UNAUTHENTICATED,
    403: StatusCode.PERMISSION_DENIED,
    404: StatusCode.UNIMPLEMENTED,
    429: StatusCode.UNAVAILABLE,
    502: StatusCode.UNAVAILABLE,
    503: StatusCode.UNAVAILABLE,
    504: StatusCode.UNAVAILABLE,
}

_RESET = {
    0x7: StatusCode.UNAVAILABLE,  # REFUSED_STREAM
    0x8: StatusCode.CANCELLED,  # CANCEL
    0xB: StatusCode.RESOURCE_EXHAUSTED,  # ENHANCE_YOUR_CALM
    0xC: StatusCode.PERMISSION_DENIED,  # INADEQUATE_SECURITY
}


def code_from_http(status: int) -> StatusCode:
    """The code for an HTTP response without ``grpc-status`` (doc/http-grpc-status-mapping.md)."""
    return _HTTP_STATUS.get(status, StatusCode.UNKNOWN)


def code_from_reset(error_code: int) -> StatusCode:
    """The code for a stream that the peer reset (PROTOCOL-HTTP2.md, "Errors")."""
    return _RESET.get(error_code, StatusCode.INTERNAL)

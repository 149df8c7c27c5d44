"""Requests and answers as the routes see them; nothing here knows sockets."""

from __future__ import annotations

import json
import re
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import trio

from host_bridge.docker_api import gojson
from host_bridge.docker_api.errors import DockerError, bad_request

MAX_BODY = 16 << 20
RAW_STREAM = "application/vnd.docker.raw-stream"
MULTIPLEXED_STREAM = "application/vnd.docker.multiplexed-stream"

Version = tuple[int, ...]
Headers = Sequence[tuple[str, str]]
# What Docker takes for false in a query (its httputils.BoolValue); anything else is true.
_FALSE = frozenset({"", "0", "no", "false", "none"})


class ClientGoneError(Exception):
    """The client closed the connection, or spoke no HTTP, before its request was whole."""


async def _no_body() -> bytes:
    await trio.lowlevel.checkpoint()
    return b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A request.

    Attributes:
        method: upper case.
        path: decoded, without the version prefix.
        version: the API version that the client speaks, such as (1, 41); compare it with `>=`.
        query: every value of every key.
        query_error: why the query is none, in Go's words; the route says so.
        headers: by lower-case name; the last one of a repeated header.
        params: the path's parts that the route names.
        has_body: False: `Content-Length: 0`, or neither it nor chunks.
        receive: the next bytes of the body, b"" at its end; raises ClientGoneError.
    """

    method: str
    path: str
    version: Version
    query: Mapping[str, Sequence[str]] = field(default_factory=dict)
    query_error: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str] = field(default_factory=dict)
    has_body: bool = False
    receive: Callable[[], Awaitable[bytes]] = _no_body

    def with_route(self, path: str, version: Version, params: Mapping[str, str]) -> Request:
        """The same request once it is known whose it is."""
        return replace(self, path=path, version=version, params=params)

    def first(self, name: str, default: str = "") -> str:
        """The first value of a query key."""
        values = self.query.get(name)
        return values[0] if values else default

    def flag(self, name: str, default: bool = False) -> bool:
        """A query key as Docker reads booleans; `default` when the key is not there."""
        values = self.query.get(name)
        return default if not values else values[0].strip().lower() not in _FALSE

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body as it comes, of any size."""
        while chunk := await self.receive():
            yield chunk

    async def read(self, limit: int = MAX_BODY) -> bytes:
        """The whole body; raises DockerError 413 beyond `limit` bytes."""
        data = bytearray()
        while chunk := await self.receive():
            data += chunk
            if len(data) > limit:
                raise DockerError(413, f"request body is larger than {limit} bytes")
        return bytes(data)

    async def json(self, shape: gojson.Struct) -> dict[str, Any]:
        """The body as `shape` has it; every field is there, with Go's zero value when the client did not send it.

        Raises:
            DockerError: 400 with Docker's words: another content type, not JSON, a value of another type, something
                after the JSON.
        """
        self.check_json()
        if not self.has_body:
            return gojson.zero(shape)
        data = await self.read()
        if not data:
            # A chunked body of no chunk: Docker sees it only when it decodes.
            raise bad_request("invalid JSON: got EOF while reading request body")
        return gojson.decode_body(data, shape)

    def check_json(self) -> None:
        """Raises DockerError 400 when there is a body of another content type than JSON."""
        text = self.headers.get("content-type", "")
        if not text and not self.has_body:
            return
        kind = text.partition(";")[0].strip().lower()
        if not kind:
            raise bad_request(f"malformed Content-Type header ({text}): mime: no media type")
        if kind != "application/json":
            raise bad_request(f"unsupported Content-Type header ({text}): must be 'application/json'")


@dataclass(frozen=True, slots=True)
class Response:
    """An answer.

    Attributes:
        status: HTTP status code.
        body: what to send. An async iterator is sent in chunks as it yields, with the headers at once; it is
            cancelled when the client goes.
        headers: further headers.
        content_type: empty: no such header.
    """

    status: int = 200
    body: bytes | AsyncIterator[bytes] = b""
    headers: Headers = ()
    content_type: str = ""


def json_line(value: object) -> bytes:
    """A value as Go's encoder writes it: no spaces, UTF-8, a line end."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    # Go escapes these two in all cases, because JavaScript took them for line ends.
    text = text.replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    return text.encode("utf-8", "replace") + b"\n"


def json_response(value: object, status: int = 200, headers: Headers = ()) -> Response:
    """A JSON answer."""
    return Response(status, json_line(value), headers, "application/json")


def error_response(error: DockerError) -> Response:
    """An error as Docker's clients expect it."""
    return json_response({"message": error.message}, error.status)


@dataclass(frozen=True, slots=True)
class Hijack:
    """The connection itself, after `101 UPGRADED` when the client asked for an upgrade and after `200 OK` otherwise.

    Attributes:
        handler: called with the raw connection; what the client sent early is read first. The connection is closed
            when it returns.
        content_type: what the client will read: RAW_STREAM or MULTIPLEXED_STREAM.
    """

    handler: Callable[[trio.abc.HalfCloseableStream], Awaitable[None]]
    content_type: str = RAW_STREAM


_ESCAPE = re.compile(r"%(?:[0-9a-fA-F]{2})?")


def unquote_path(text: str) -> str | None:
    """A request's path without escapes; None: it has a broken one."""
    if not _escaped_well(text):
        return None
    return urllib.parse.unquote(text.encode("latin-1").decode("utf-8", "replace"))


def parse_query(text: str) -> tuple[dict[str, list[str]], str]:
    """A query's values by key, and what Go finds wrong with it (the rest is read all the same)."""
    values: dict[str, list[str]] = {}
    problem = ""
    for part in text.split("&"):
        if not part:
            continue
        if ";" in part:
            problem = problem or "invalid semicolon separator in query"
            continue
        broken = next((found for found in _ESCAPE.finditer(part) if len(found[0]) == 1), None)
        if broken is not None:
            escape = part[broken.start() : broken.start() + 3]
            problem = problem or f'invalid URL escape "{escape}"'
            continue
        key, _, value = part.partition("=")
        values.setdefault(_unquote(key), []).append(_unquote(value))
    return values, problem


def _unquote(text: str) -> str:
    return urllib.parse.unquote_plus(text.encode("latin-1").decode("utf-8", "replace"))


def _escaped_well(text: str) -> bool:
    return all(len(found[0]) == 3 for found in _ESCAPE.finditer(text))


Answer = Response | Hijack
Handler = Callable[[Request], Awaitable[Answer]]

"""Health checking: grpc.health.v1 (https://github.com/grpc/grpc/blob/master/doc/health-checking.md)."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

import trio

from .service import Handler, Method, SendStream, ServerContext, Service
from .status import RpcError, StatusCode
from .wire import LENGTH_DELIMITED, VARINT, WireError, encode_bytes, encode_varint_field, fields

SERVICE_NAME = "grpc.health.v1.Health"


class ServingStatus(enum.IntEnum):
    """grpc.health.v1.HealthCheckResponse.ServingStatus."""

    UNKNOWN = 0
    SERVING = 1
    NOT_SERVING = 2
    SERVICE_UNKNOWN = 3


@dataclass(frozen=True)
class HealthCheckRequest:
    """grpc.health.v1.HealthCheckRequest."""

    service: str = ""
    """The service asked for; empty: the server as a whole."""

    def __bytes__(self) -> bytes:
        return encode_bytes(1, self.service.encode()) if self.service else b""

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The request from its bytes; WireError when they are not one."""
        service = ""
        for number, wire_type, value in fields(data):
            if number == 1:
                if wire_type != LENGTH_DELIMITED or not isinstance(value, bytes):
                    raise WireError("HealthCheckRequest.service is not a string")
                try:
                    service = value.decode()
                except UnicodeDecodeError:
                    raise WireError("HealthCheckRequest.service is not UTF-8") from None
        return cls(service)


@dataclass(frozen=True)
class HealthCheckResponse:
    """grpc.health.v1.HealthCheckResponse."""

    status: ServingStatus = ServingStatus.UNKNOWN

    def __bytes__(self) -> bytes:
        return encode_varint_field(1, self.status)

    @classmethod
    def parse(cls, data: bytes) -> Self:
        """The response from its bytes; WireError when they are not one."""
        status = ServingStatus.UNKNOWN
        for number, wire_type, value in fields(data):
            if number == 1:
                if wire_type != VARINT or not isinstance(value, int):
                    raise WireError("HealthCheckResponse.status is not an enum value")
                status = ServingStatus(value) if 0 <= value <= 3 else ServingStatus.UNKNOWN
        return cls(status)


CHECK = Method(
    f"/{SERVICE_NAME}/Check",
    HealthCheckRequest,
    HealthCheckResponse,
    client_streaming=False,
    server_streaming=False,
)
WATCH = Method(
    f"/{SERVICE_NAME}/Watch",
    HealthCheckRequest,
    HealthCheckResponse,
    client_streaming=False,
    server_streaming=True,
)


class Health(Service):
    """The health of a server's services; all are serving at first."""

    service_name = SERVICE_NAME
    infrastructure = True

    def __init__(self, services: Iterable[str]) -> None:
        self._status = dict.fromkeys(("", *services), ServingStatus.SERVING)
        self._changed = trio.lowlevel.ParkingLot()
        self._shut_down = False

    def set(self, service: str, serving: bool) -> None:
        """Says whether `service` (``package.Service``; empty: the whole server) can do its work."""
        if self._shut_down:
            return
        self._status[service] = ServingStatus.SERVING if serving else ServingStatus.NOT_SERVING
        self._changed.unpark_all()

    def shut_down(self) -> None:
        """Nothing is serving any more, whatever `set` says later: the server drains."""
        self._shut_down = True
        self._status = dict.fromkeys(self._status, ServingStatus.NOT_SERVING)
        self._changed.unpark_all()

    async def check(self, request: HealthCheckRequest, context: ServerContext) -> HealthCheckResponse:
        """The status now; NOT_FOUND for an unknown service."""
        status = self._status.get(request.service)
        if status is None:
            raise RpcError(StatusCode.NOT_FOUND, f"no service {request.service[:200]!r} here")
        return HealthCheckResponse(status)

    async def watch(
        self, request: HealthCheckRequest, stream: SendStream[HealthCheckResponse], context: ServerContext
    ) -> None:
        """The status now and whenever it changes; SERVICE_UNKNOWN for an unknown service."""
        last: ServingStatus | None = None
        while True:
            status = self._status.get(request.service, ServingStatus.SERVICE_UNKNOWN)
            if status is not last:
                await stream.send(HealthCheckResponse(status))
                last = status
            elif self._shut_down:
                raise RpcError(StatusCode.UNAVAILABLE, "the server shuts down")
            else:
                await self._changed.park()

    def handlers(self) -> tuple[Handler, ...]:
        """The service's methods, for the server."""
        return (Handler(CHECK, self.check), Handler(WATCH, self.watch))

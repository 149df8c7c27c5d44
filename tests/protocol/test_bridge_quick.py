"""The command's blocking call: against our server, grpcio's server, and what is no server at all."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent import futures
from pathlib import Path

import grpc
import pytest
import trio

from host_bridge.client import CommandError, unary
from host_bridge.quick import CallError, call_unary
from taploom.address import UnixAddress, open_listener
from taploom.contracts.taploom.bridge.v1 import (
    GetStatusRequest,
    GetStatusResponse,
    Pending,
    Status,
    WatchStatusRequest,
    WatchStatusResponse,
)
from taploom.contracts.taploom.bridge.v1.rpc import StatusServiceBase
from taploom.rpc import RpcError, SendStream, Server, ServerContext, StatusCode

METHOD = "/taploom.bridge.v1.StatusService/GetStatus"


class StatusService(StatusServiceBase):
    """Answers with `answer`, fails with `error`, or never answers."""

    answer: Status | None = None
    error: RpcError | None = None

    async def get_status(self, request: GetStatusRequest, context: ServerContext) -> GetStatusResponse:
        if self.error is not None:
            raise self.error
        if self.answer is None:
            await trio.sleep_forever()
        return GetStatusResponse(status=self.answer)

    async def watch_status(
        self, request: WatchStatusRequest, stream: SendStream[WatchStatusResponse], context: ServerContext
    ) -> None:
        """Not called."""


@pytest.fixture
async def service(tmp_path: Path, nursery: trio.Nursery) -> StatusService:
    service = StatusService()
    await nursery.start(Server([service]).serve, await open_listener(UnixAddress(f"{tmp_path}/s.sock")))
    return service


async def call(tmp_path: Path, seconds: float = 20.0) -> GetStatusResponse:
    data = await trio.to_thread.run_sync(call_unary, f"{tmp_path}/s.sock", METHOD, b"", seconds)
    return GetStatusResponse.parse(data)


async def test_small_and_large_answers(tmp_path: Path, service: StatusService) -> None:
    for count in (0, 1, 40_000):
        # The largest is beyond every window: it needs flow control.
        service.answer = Status(pending=[Pending(subject=f"network n{n}", reason="x" * 40) for n in range(count)])
        response = await call(tmp_path)
        assert response.status == service.answer


async def test_errors_carry_the_servers_words(tmp_path: Path, service: StatusService) -> None:
    service.error = RpcError(StatusCode.FAILED_PRECONDITION, "in use by »web« 100 %")
    with pytest.raises(CallError, match="in use by »web« 100 %") as caught:
        await call(tmp_path)
    assert caught.value.code == StatusCode.FAILED_PRECONDITION


async def test_a_server_that_never_answers(tmp_path: Path, service: StatusService) -> None:
    with pytest.raises((TimeoutError, CallError)):
        await call(tmp_path, 0.3)


async def test_large_requests_and_other_addresses_take_the_full_client(tmp_path: Path, service: StatusService) -> None:
    service.answer = Status(converged=True)
    request = GetStatusRequest.parse(b"\xca\x3e\x80\xfa\x01" + bytes(32_000))
    assert len(bytes(request)) > 30_000
    address = f"unix:{tmp_path}/s.sock"
    response = await trio.to_thread.run_sync(unary, address, "StatusService/GetStatus", request, GetStatusResponse)
    assert response.status == service.answer
    with pytest.raises(CommandError, match="is not one of"):
        await trio.to_thread.run_sync(unary, "tcp:1", "StatusService/GetStatus", GetStatusRequest(), GetStatusResponse)


async def test_against_grpcio(tmp_path: Path) -> None:
    answer = bytes(GetStatusResponse(status=Status(converged=True)))

    def handler(request: bytes, context: grpc.ServicerContext) -> bytes:
        return answer

    class Generic(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
            return grpc.unary_unary_rpc_method_handler(handler) if details.method == METHOD else None

    server = grpc.server(futures.ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers([Generic()])
    server.add_insecure_port(f"unix:{tmp_path}/s.sock")
    server.start()
    try:
        response = await call(tmp_path)
        assert response.status == Status(converged=True)
        with pytest.raises(CallError) as caught:
            await trio.to_thread.run_sync(call_unary, f"{tmp_path}/s.sock", "/no.Such/Method", b"", 20.0)
        assert caught.value.code == StatusCode.UNIMPLEMENTED
    finally:
        server.stop(None).wait()


SETTINGS = b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
STATUS_200_ENDED = b"\x00\x00\x01\x01\x05\x00\x00\x00\x01\x88"
RESET = b"\x00\x00\x04\x03\x00\x00\x00\x00\x01\x00\x00\x00\x07"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"\xff" * 1000,
        SETTINGS,
        SETTINGS + STATUS_200_ENDED,
        SETTINGS + RESET,
        SETTINGS + b"\x00\x40\x00\x00\x00\x00\x00\x00\x01" + bytes(0x4000),
    ],
    ids=range(7),
)
async def test_what_is_no_grpc_server(tmp_path: Path, nursery: trio.Nursery, answer: bytes) -> None:
    async def serve(stream: trio.SocketStream) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await stream.receive_some(65536)
            await stream.send_all(answer)
        await stream.aclose()

    listener = await open_listener(UnixAddress(f"{tmp_path}/s.sock"))
    nursery.start_soon(trio.serve_listeners, serve, [listener])
    with pytest.raises((CallError, ConnectionError)) as caught:
        await call(tmp_path)
    assert "\n" not in str(caught.value)


def test_nobody_there(tmp_path: Path) -> None:
    ask: Callable[[], object] = lambda: call_unary(f"{tmp_path}/s.sock", METHOD, b"", 1.0)  # noqa: E731
    with pytest.raises(FileNotFoundError):
        ask()

"""Standard streams over a hijacked connection: `docker attach`, and what `docker exec` shares with it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import trio

from host_bridge.containers.errors import ContainerError, conflict
from host_bridge.containers.manager import ContainerManager
from host_bridge.docker_api.http import (
    MULTIPLEXED_STREAM,
    RAW_STREAM,
    Answer,
    Handler,
    Hijack,
    Request,
    Response,
    Version,
)
from taploom.contracts.taploom.runtime import v1 as runtime
from taploom.rpc import RpcError

if TYPE_CHECKING:
    from taploom.rpc.channel import BidiCall

STDOUT, STDERR = 1, 2
_CHUNK = 32 << 10
# For how long a client that does not close its side is still listened to, in seconds.
_LINGER = 2.0
_MULTIPLEXED = (1, 42)

Streams = "BidiCall[runtime.AttachProcessRequest, runtime.AttachProcessResponse]"
Add = Callable[[str, str, Handler], None]


def register(add: Add, manager: ContainerManager) -> None:
    """Adds the routes."""
    routes = _Attach(manager)
    add("POST", "/containers/{id:.+?}/attach", routes.attach)
    add("GET", "/containers/{id:.+?}/attach/ws", routes.websocket)


def frame(stream: int, data: bytes) -> bytes:
    """Bytes as Docker multiplexes two streams over one connection: stream, three zeros, length, data."""
    return bytes((stream, 0, 0, 0)) + len(data).to_bytes(4, "big") + data


def content_type(version: Version, *, terminal: bool) -> str:
    """What a client will read."""
    return MULTIPLEXED_STREAM if version >= _MULTIPLEXED and not terminal else RAW_STREAM


async def open_streams(
    call: BidiCall[runtime.AttachProcessRequest, runtime.AttachProcessResponse],
    container_id: str,
    process_id: str,
    *,
    stdout: bool,
    stderr: bool,
    stdin: bool,
) -> None:
    """Says what to attach to and waits until the attachment stands; raises RpcError."""
    wanted = runtime.AttachProcess(
        container_id=container_id, process_id=process_id, stdout=stdout, stderr=stderr, stdin=stdin
    )
    await call.send(runtime.AttachProcessRequest(attach=wanted))
    first = await call.receive()
    if first is None or first.attached is None:
        raise ContainerError(500, "the container runtime does not carry the streams of the process")


async def carry(
    stream: trio.abc.HalfCloseableStream,
    call: BidiCall[runtime.AttachProcessRequest, runtime.AttachProcessResponse],
    *,
    terminal: bool,
    stdin: bool,
) -> runtime.ProcessExited | None:
    """Carries output to the client and its input to the process until the process or the client ends.

    Returns:
        The process's end; None when the client went first.
    """
    ended: runtime.ProcessExited | None = None
    async with trio.open_nursery() as nursery:
        if stdin:
            nursery.start_soon(_carry_input, stream, call, terminal)
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, RpcError):
            async for response in call:
                if response.exited is not None:
                    ended = response.exited
                    break
                for number, data in ((STDOUT, response.stdout), (STDERR, response.stderr)):
                    if data:
                        await stream.send_all(data if terminal else frame(number, data))
        nursery.cancel_scope.cancel()
    await end(stream)
    return ended


async def end(stream: trio.abc.HalfCloseableStream) -> None:
    """Ends the output and reads what the client still sends: a socket closed before resets the client's connection."""
    with trio.move_on_after(_LINGER), contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.send_eof()
        while await stream.receive_some(_CHUNK):
            pass


async def _carry_input(
    stream: trio.abc.HalfCloseableStream,
    call: BidiCall[runtime.AttachProcessRequest, runtime.AttachProcessResponse],
    terminal: bool,
) -> None:
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError, RpcError):
        while data := await stream.receive_some(_CHUNK):
            await call.send(runtime.AttachProcessRequest(stdin=bytes(data)))
        if not terminal:
            # A terminal's user who detaches leaves the process its input.
            await call.done_writing()


class _Attach:
    def __init__(self, manager: ContainerManager) -> None:
        self._manager = manager

    async def attach(self, request: Request) -> Answer:
        try:
            container = self._manager.container(request.params["id"])
            if container.restarting:
                raise conflict(f"Container {container.id} is restarting, wait until the container is running")
            client = await self._manager.runtime_client()
        except ContainerError as error:
            # dockerd has hijacked the connection by then, and answers on it in plain text.
            return Response(error.status, f"{error}\r\n".encode(), content_type=RAW_STREAM)
        terminal = container.docker["Tty"]
        stdout, stderr = request.flag("stdout"), request.flag("stderr")
        stdin = request.flag("stdin") and container.docker["OpenStdin"]
        follow, history = request.flag("stream"), request.flag("logs")
        if not follow:
            self._manager.tell(container, "attach")

        async def streams(stream: trio.abc.HalfCloseableStream) -> None:
            if history:
                await self._replay(stream, container.id, terminal=terminal, stdout=stdout, stderr=stderr)
            if not follow:
                await end(stream)
            else:
                await carry(stream, call, terminal=terminal, stdin=stdin)

        if not follow:
            return Hijack(streams, content_type(request.version, terminal=terminal))
        # Before the answer: whoever starts the container after it misses nothing.
        call = client.attach_process()
        stack = contextlib.AsyncExitStack()
        await stack.enter_async_context(call)
        try:
            await open_streams(call, container.id, "", stdout=stdout, stderr=stderr, stdin=stdin)
        except BaseException:
            with trio.CancelScope(shield=True):
                await stack.aclose()
            raise
        self._manager.tell(container, "attach")

        async def attached(stream: trio.abc.HalfCloseableStream) -> None:
            async with stack:
                await streams(stream)

        return Hijack(attached, content_type(request.version, terminal=terminal))

    async def _replay(
        self, stream: trio.abc.HalfCloseableStream, container_id: str, *, terminal: bool, stdout: bool, stderr: bool
    ) -> None:
        client = await self._manager.runtime_client()
        async with client.read_log(runtime.ReadLogRequest(container_id=container_id)) as entries:
            with contextlib.suppress(RpcError, trio.BrokenResourceError):
                async for entry in entries:
                    error = entry.stream is runtime.StandardStream.STDERR
                    if not (stderr if error else stdout):
                        continue
                    await stream.send_all(entry.data if terminal else frame(STDERR if error else STDOUT, entry.data))

    async def websocket(self, request: Request) -> Answer:
        self._manager.container(request.params["id"])
        await trio.lowlevel.checkpoint()
        raise ContainerError(501, "attaching over a WebSocket is not supported: use POST /containers/ID/attach")

"""Further processes in containers: /containers/ID/exec and the /exec family."""

from __future__ import annotations

import contextlib
import logging

import trio

from host_bridge.containers.errors import ContainerError, invalid
from host_bridge.containers.execs import Exec
from host_bridge.containers.manager import ContainerManager
from host_bridge.docker_api import attach, container_shapes
from host_bridge.docker_api.errors import bad_request
from host_bridge.docker_api.http import Answer, Hijack, Request, Response, json_response
from host_bridge.errors import BridgeError
from taploom.rpc import RpcError

logger = logging.getLogger("taploom.bridge.containers")


def register(add: attach.Add, manager: ContainerManager) -> None:
    """Adds the routes."""
    routes = _Execs(manager)
    add("POST", "/containers/{id:.+?}/exec", routes.create)
    add("POST", "/exec/{id:.+?}/start", routes.start)
    add("POST", "/exec/{id:.+?}/resize", routes.resize)
    add("GET", "/exec/{id:.+?}/json", routes.inspect)


class _Execs:
    def __init__(self, manager: ContainerManager) -> None:
        self._manager = manager

    async def create(self, request: Request) -> Answer:
        if not request.has_body:
            request.check_json()
            raise bad_request("invalid JSON: got EOF while reading request body")
        config = await request.json(container_shapes.EXEC_CREATE)
        config["Cmd"] = container_shapes.arguments(config["Cmd"], "ExecConfig.Cmd")
        if not config["Cmd"]:
            raise invalid("No exec command specified")
        one = self._manager.exec_create(request.params["id"], config)
        size = config["ConsoleSize"]
        if size and len(size) == 2:
            one.rows, one.columns = (min(max(value, 0), 65535) for value in size)
        return json_response({"Id": one.id}, 201)

    async def inspect(self, request: Request) -> Answer:
        await trio.lowlevel.checkpoint()
        return json_response(self._manager.execs.get(request.params["id"]).inspect())

    async def resize(self, request: Request) -> Answer:
        rows, columns = (min(max(container_shapes.number(request, name), 0), 65535) for name in ("h", "w"))
        await self._manager.exec_resize(request.params["id"], columns, rows)
        return Response(200)

    async def start(self, request: Request) -> Answer:
        if not request.has_body:
            request.check_json()
            raise bad_request("invalid JSON: got EOF while reading request body")
        options = await request.json(container_shapes.EXEC_START)
        exec_id = request.params["id"]
        self._manager.execs.get(exec_id)
        # Which of the two says that there is a terminal depends on the client; the process has one if either does.
        size = options["ConsoleSize"]
        if options["Detach"]:
            one = self._manager.exec_claim(exec_id)
            terminal = one.config["Tty"]
            self._size(one, size)
            await self._manager.exec_start(one, terminal=terminal)
            return Response(200)
        one = self._manager.execs.get(exec_id)
        self._size(one, size)
        raw = bool(options["Tty"])

        async def streams(stream: trio.abc.HalfCloseableStream) -> None:
            try:
                await self._run(exec_id, stream, raw=raw)
            except (BridgeError, RpcError) as error:
                logger.info("exec %s: %s", exec_id[:12], error)
                text = f"{error if isinstance(error, BridgeError) else error.message}\r\n".encode()
                with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                    await stream.send_all(text if raw else attach.frame(attach.STDOUT, text))
                await attach.end(stream)

        return Hijack(streams, attach.content_type(request.version, terminal=raw))

    @staticmethod
    def _size(one: Exec, size: list[int] | None) -> None:
        if size and len(size) == 2:
            one.rows, one.columns = (min(max(value, 0), 65535) for value in size)

    async def _run(self, exec_id: str, stream: trio.abc.HalfCloseableStream, *, raw: bool) -> None:
        one = self._manager.exec_claim(exec_id)
        config, container = one.config, one.container
        try:
            client = await self._manager.runtime_client()
        except ContainerError:
            one.ended(126)
            raise
        async with client.attach_process() as call:
            try:
                await attach.open_streams(
                    call,
                    container.id,
                    one.id,
                    stdout=config["AttachStdout"] or config["Tty"],
                    stderr=config["AttachStderr"],
                    stdin=config["AttachStdin"],
                )
            except BaseException:
                one.ended(126)
                raise
            await self._manager.exec_start(one, terminal=config["Tty"])
            ended = await attach.carry(stream, call, terminal=raw, stdin=config["AttachStdin"])
        if ended is not None:
            # The client asks for the exit code next; the runtime's event may come a moment later.
            self._manager.exec_ended(one.id, ended.exit_code)

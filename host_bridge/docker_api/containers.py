"""The /containers family: create, list, inspect, start, stop and what else happens to a container."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

import trio

from host_bridge.containers.errors import ContainerError, not_running
from host_bridge.containers.execs import Exec
from host_bridge.containers.manager import ContainerManager
from host_bridge.containers.model import Container
from host_bridge.docker_api import (
    attach,
    container_lists,
    container_shapes,
    container_views,
    endpoints,
    exec,
    images,
    logs,
)
from host_bridge.docker_api.container_errors import explain, guarded
from host_bridge.docker_api.errors import DockerError, bad_request, not_implemented
from host_bridge.docker_api.filters import Filters
from host_bridge.docker_api.http import Answer, Handler, Request, Response, json_line, json_response
from host_bridge.model import GuestRecord

if TYPE_CHECKING:
    from host_bridge.docker_api.app import DockerApi

_ID = "{id:.+?}"
_MAX_PS = 4 << 20


def register(api: DockerApi, manager: ContainerManager) -> None:
    """Adds the routes of containers, of processes in them and of images."""
    manager.explain = explain
    manager.on_event = api.events.log
    routes = _Containers(manager)

    def add(method: str, pattern: str, handler: Handler) -> None:
        api.router.add(method, pattern, guarded(handler))

    add("POST", "/containers/create", routes.create)
    add("POST", "/containers/prune", routes.prune)
    add("GET", "/containers/json", routes.list)
    add("GET", f"/containers/{_ID}/json", routes.inspect)
    add("POST", f"/containers/{_ID}/start", routes.start)
    add("POST", f"/containers/{_ID}/stop", routes.stop)
    add("POST", f"/containers/{_ID}/restart", routes.restart)
    add("POST", f"/containers/{_ID}/kill", routes.kill)
    add("POST", f"/containers/{_ID}/wait", routes.wait)
    add("POST", f"/containers/{_ID}/rename", routes.rename)
    add("POST", f"/containers/{_ID}/resize", routes.resize)
    add("POST", f"/containers/{_ID}/update", routes.update)
    add("GET", f"/containers/{_ID}/top", routes.top)
    for method, what in (
        ("POST", "pause"),
        ("POST", "unpause"),
        ("GET", "stats"),
        ("GET", "changes"),
        ("GET", "export"),
        ("GET", "archive"),
        ("PUT", "archive"),
        ("HEAD", "archive"),
    ):
        add(method, f"/containers/{_ID}/{what}", routes.not_served(what))
    logs.register(add, manager)
    attach.register(add, manager)
    exec.register(add, manager)
    images.register(add, manager, api.events.log)
    # Last, so that it does not take the others' paths.
    add("DELETE", f"/containers/{_ID}", routes.remove)
    add("DELETE", "/containers/", routes.nameless)


class _Containers:
    def __init__(self, manager: ContainerManager) -> None:
        self._manager = manager

    async def create(self, request: Request) -> Answer:
        config, host, networking = await container_shapes.create_body(request)
        for name, endpoint in (networking["EndpointsConfig"] or {}).items():
            self._check_endpoint(name, endpoint)
        if request.version < (1, 44):
            # Before this version an endpoint's MAC address was not a client's to choose.
            for endpoint in (networking["EndpointsConfig"] or {}).values():
                if endpoint is not None:
                    endpoint["MacAddress"] = ""
        container, warnings = await self._manager.create(
            request.first("name") or None, config, host, networking, tuple(request.version)
        )
        return json_response({"Id": container.id, "Warnings": warnings}, 201)

    def _check_endpoint(self, name: str, settings: Mapping[str, Any] | None) -> None:
        if settings is None:
            raise bad_request(f"no EndpointSettings for {name}")
        try:
            endpoints.check(settings, self._manager.networks.network(name))
        except DockerError as error:
            if error.message.startswith("invalid MAC"):
                raise
            raise bad_request(f"invalid config for network {name}: {error.message}") from error

    async def list(self, request: Request) -> Answer:
        limit = container_shapes.number(request, "limit", 500) if request.first("limit") else 0
        filters = Filters.parse(request.first("filters"))
        found = await container_lists.chosen(
            self._manager, everything=request.flag("all"), limit=limit, filters=filters
        )
        linked, size = self._manager.linked_names(), request.flag("size")
        await trio.lowlevel.checkpoint()
        return json_response(
            [container_views.summary(self._manager, one, request.version, linked, size=size) for one in found]
        )

    async def inspect(self, request: Request) -> Answer:
        await trio.lowlevel.checkpoint()
        found = self._manager.find(request.params["id"])
        return json_response(container_views.inspect(self._manager, found, request.version, size=request.flag("size")))

    async def start(self, request: Request) -> Answer:
        await self._manager.start(request.params["id"])
        return Response(204)

    async def stop(self, request: Request) -> Answer:
        await self._manager.stop(request.params["id"], seconds=_seconds(request), signal=_signal(request))
        return Response(204)

    async def restart(self, request: Request) -> Answer:
        await self._manager.restart(request.params["id"], seconds=_seconds(request), signal=_signal(request))
        return Response(204)

    async def kill(self, request: Request) -> Answer:
        await self._manager.kill(request.params["id"], request.first("signal"))
        return Response(204)

    async def remove(self, request: Request) -> Answer:
        if request.flag("link"):
            await self._remove_link(request.params["id"])
            return Response(204)
        await self._manager.remove(request.params["id"], force=request.flag("force"))
        return Response(204)

    async def nameless(self, request: Request) -> Answer:
        """What dockerd says when the name is forgotten."""
        await trio.lowlevel.checkpoint()
        raise bad_request('invalid name or ID supplied: ""')

    async def _remove_link(self, path: str) -> None:
        await trio.lowlevel.checkpoint()
        holder, slash, alias = path.removeprefix("/").partition("/")
        if not slash:
            raise bad_request("Conflict, cannot remove the default name of the container")
        raise not_implemented(f"link {alias} of container {holder} cannot be removed alone: remove the container")

    async def rename(self, request: Request) -> Answer:
        await self._manager.rename(request.params["id"], request.first("name"))
        return Response(204)

    async def wait(self, request: Request) -> Answer:
        condition = request.first("condition") or "not-running"
        waiter = self._manager.waiter(request.params["id"], condition)
        await trio.lowlevel.checkpoint()

        async def body() -> AsyncIterator[bytes]:
            # The headers go out at once: a client starts the container when it has them.
            code = await waiter()
            yield json_line({"StatusCode": code} if request.version >= (1, 42) else {"Error": None, "StatusCode": code})

        return Response(200, body(), content_type="application/json")

    async def resize(self, request: Request) -> Answer:
        rows, columns = _size(request)
        await self._manager.resize(request.params["id"], columns, rows)
        return Response(200)

    async def update(self, request: Request) -> Answer:
        body = await request.json(container_shapes.UPDATE)
        if body["RestartPolicy"]["Name"]:
            await self._manager.update_restart_policy(request.params["id"], body["RestartPolicy"])
        else:
            self._manager.container(request.params["id"])
        return json_response({"Warnings": None})

    async def prune(self, request: Request) -> Answer:
        filters = Filters.parse(request.first("filters"))
        filters.check_keys({"label", "label!", "until"})
        if filters.get("until"):
            raise not_implemented("pruning by age is not supported")

        def wanted(container: Container) -> bool:
            return filters.prunes(container.docker["Labels"] or {})

        removed = await self._manager.prune(wanted)
        return json_response({"ContainersDeleted": removed or None, "SpaceReclaimed": 0})

    async def top(self, request: Request) -> Answer:
        container = self._manager.container(request.params["id"])
        if not container.alive:
            raise not_running(container.id)
        arguments = (request.first("ps_args") or "-ef").split()
        one = self._manager.execs.add(
            container,
            {
                "Cmd": ["ps", *arguments],
                "Env": None,
                "User": "0",
                "WorkingDir": "/",
                "Privileged": False,
                "Tty": False,
                "AttachStdin": False,
                "AttachStdout": True,
                "AttachStderr": True,
                "DetachKeys": "",
            },
            container.config.get("Environment") or [],
        )
        output, errors = await self._output(one)
        if one.exit_code != 0:
            # A ps that knows no options says so; it then lists everything without.
            raise ContainerError(500, f"ps: {errors.strip() or output.strip() or 'failed'}")
        lines = output.splitlines()
        self._manager.tell(container, "top")
        if not lines:
            raise ContainerError(500, f"container {container.name} has no ps that lists processes")
        titles = lines[0].split()
        rows = [line.split(None, len(titles) - 1) for line in lines[1:]]
        own = [row for row in rows if not (row and row[-1].startswith("ps "))]
        return json_response({"Processes": own, "Titles": titles})

    async def _output(self, one: Exec) -> tuple[str, str]:
        one.quiet = True
        self._manager.execs.use(one)
        client = await self._manager.runtime_client()
        output, errors = bytearray(), bytearray()
        async with client.attach_process() as call:
            await attach.open_streams(call, one.container.id, one.id, stdout=True, stderr=True, stdin=False)
            await self._manager.exec_start(one, terminal=False)
            async for response in call:
                output += response.stdout or b""
                errors += response.stderr or b""
                if response.exited is not None:
                    one.ended(response.exited.exit_code)
                    break
                if len(output) > _MAX_PS:
                    raise ContainerError(500, "ps says too much")
        return output.decode(errors="replace"), errors.decode(errors="replace")

    def not_served(self, what: str) -> Handler:
        """A route that is there to say clearly what is not."""

        async def answer(request: Request) -> Answer:
            await trio.lowlevel.checkpoint()
            found = self._manager.find(request.params["id"])
            if what in ("pause", "unpause") and isinstance(found, Container):
                if not found.running:
                    raise not_running(found.id) if what == "pause" else _not_paused(found)
                if what == "unpause":
                    raise _not_paused(found)
            if isinstance(found, GuestRecord) or what:
                raise not_implemented(f"{what} of container {found.name} is not supported")
            return Response(204)

        return answer


def _not_paused(container: Container) -> DockerError:
    return DockerError(500, f"Container {container.id} is not paused")


def _seconds(request: Request) -> int | None:
    return container_shapes.number(request, "t", 500) if request.first("t") else None


def _signal(request: Request) -> str:
    return request.first("signal") if request.version >= (1, 42) else ""


def _size(request: Request) -> tuple[int, int]:
    """Rows and columns of a resize request."""
    sizes = []
    for name in ("h", "w"):
        value = container_shapes.number(request, name)
        sizes.append(min(max(value, 0), 65535))
    return sizes[0], sizes[1]

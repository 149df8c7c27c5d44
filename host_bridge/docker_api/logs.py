"""GET /containers/ID/logs."""

from __future__ import annotations

import datetime
import re
from collections.abc import AsyncIterator

from host_bridge.containers import times
from host_bridge.containers.manager import ContainerManager
from host_bridge.docker_api import attach
from host_bridge.docker_api.errors import DockerError, bad_request
from host_bridge.docker_api.http import Answer, Request, Response
from taploom.contracts.taploom.runtime import v1 as runtime
from taploom.rpc import RpcError

_TIME = re.compile(r"([+-]?[0-9]{1,18})(?:\.([0-9]+))?")
_OCTETS = "application/octet-stream"


def register(add: attach.Add, manager: ContainerManager) -> None:
    """Adds the route."""

    async def logs(request: Request) -> Answer:
        stdout, stderr = request.flag("stdout"), request.flag("stderr")
        if not stdout and not stderr:
            raise bad_request("Bad parameters: you must choose at least one stream")
        container = manager.container(request.params["id"])
        terminal = container.docker["Tty"]
        wanted = runtime.ReadLogRequest(
            container_id=container.id,
            follow=request.flag("follow") and container.alive,
            since=_moment(request, "since"),
            until=_moment(request, "until"),
            tail=_tail(request.first("tail")),
        )
        stamped = request.flag("timestamps")
        client = await manager.runtime_client()

        async def body() -> AsyncIterator[bytes]:
            async with client.read_log(wanted) as entries:
                try:
                    async for entry in entries:
                        number = attach.STDERR if entry.stream is runtime.StandardStream.STDERR else attach.STDOUT
                        if not (stderr if number == attach.STDERR else stdout):
                            continue
                        data = entry.data
                        if stamped and entry.time is not None:
                            data = times.fixed(entry.time).encode() + b" " + data
                        yield data if terminal else attach.frame(number, data)
                except RpcError:
                    # A container that never ran has no log; one that is removed meanwhile has none any more.
                    return

        kind = attach.content_type(request.version, terminal=terminal) if request.version >= (1, 42) else _OCTETS
        return Response(200, body(), content_type=kind)

    add("GET", "/containers/{id:.+?}/logs", logs)


def _tail(text: str) -> int | None:
    """How many entries; None: all, also for what is no number, as with dockerd."""
    if not re.fullmatch(r"[0-9]{1,9}", text):
        return None
    return int(text)


def _moment(request: Request, name: str) -> datetime.datetime | None:
    text = request.first(name)
    if not text:
        return None
    found = _TIME.fullmatch(text)
    if found is None:
        raise DockerError(500, f'strconv.ParseInt: parsing "{text.partition(".")[0]}": invalid syntax')
    seconds, fraction = int(found[1]), (found[2] or "0")[:6].ljust(6, "0")
    if seconds == 0 and not int(fraction):
        return None
    try:
        return datetime.datetime.fromtimestamp(seconds, datetime.UTC) + datetime.timedelta(microseconds=int(fraction))
    except (OverflowError, ValueError, OSError):
        raise bad_request(f"{name}: {text} is no time that there is") from None

"""What this engine has none of: volumes, plugins, build caches, a swarm. Who asks is told so in Docker's words.

Compose and `docker system prune` ask for some of it whatever they are used for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

from host_bridge.docker_api.errors import DockerError, not_found, not_implemented
from host_bridge.docker_api.filters import Filters
from host_bridge.docker_api.http import Handler, Request, Response, json_response

if TYPE_CHECKING:
    from host_bridge.docker_api.app import DockerApi

NO_SWARM = (
    'This node is not a swarm manager. Use "docker swarm init" or "docker swarm join" to connect this node to swarm '
    "and try again."
)


def register(api: DockerApi) -> None:
    """Adds the routes."""
    add = api.router.add
    add("GET", "/volumes", _always({"Volumes": [], "Warnings": None}))
    add("POST", "/volumes/create", _volume_create)
    add("POST", "/volumes/prune", _always({"VolumesDeleted": [], "SpaceReclaimed": 0}))
    for method in ("GET", "DELETE"):
        add(method, "/volumes/{name:.+}", _no_volume)
    add("GET", "/plugins", _always([]))
    add("POST", "/build/prune", _always({"CachesDeleted": None, "SpaceReclaimed": 0}))
    add("POST", "/swarm/leave", _not_in_swarm)
    for kind in ("swarm", "nodes", "services", "tasks", "secrets", "configs"):
        for method in ("GET", "POST", "DELETE"):
            add(method, f"/{kind}{{rest:(?:/.*)?}}", _no_swarm)


def _always(value: Any) -> Handler:
    async def answer(request: Request) -> Response:
        Filters.parse(request.first("filters"))
        await trio.lowlevel.checkpoint()
        return json_response(value)

    return answer


async def _volume_create(request: Request) -> Response:
    await trio.lowlevel.checkpoint()
    raise not_implemented("this engine keeps no volumes: mount a directory of the host instead")


async def _no_volume(request: Request) -> Response:
    await trio.lowlevel.checkpoint()
    raise not_found(f"get {request.params['name']}: no such volume")


async def _no_swarm(request: Request) -> Response:
    await trio.lowlevel.checkpoint()
    raise DockerError(503, NO_SWARM)


async def _not_in_swarm(request: Request) -> Response:
    await trio.lowlevel.checkpoint()
    raise DockerError(503, "This node is not part of a swarm")

"""The API as a function from requests to answers: versions, routes, errors."""

from __future__ import annotations

import logging
import platform
import sqlite3
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

from host_bridge.docker_api import absent, networks, system
from host_bridge.docker_api.errors import DockerError
from host_bridge.docker_api.events import EventLog
from host_bridge.docker_api.http import Answer, ClientGoneError, Headers, Request, Response, error_response
from host_bridge.docker_api.refusals import as_docker_error
from host_bridge.docker_api.router import Router, clean_path, parse_version, split_version
from host_bridge.errors import BridgeError
from host_bridge.events import FabricEvent
from host_bridge.fabric import Fabric
from host_bridge.waiting import Signal
from taploom import __version__

if TYPE_CHECKING:
    from host_bridge.containers.manager import ContainerManager

logger = logging.getLogger("taploom.bridge.docker")

# Go's names.
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """What the bridge says it is.

    Attributes:
        version: the engine's version.
        api: the newest API version.
        min_api: the oldest one.
    """

    version: str = __version__
    api: str = "1.51"
    min_api: str = "1.24"
    os: str = "linux"
    arch: str = field(default_factory=lambda: _ARCHITECTURES.get(platform.machine(), platform.machine()))


_ACTIONS = {
    "network-create": "create",
    "network-destroy": "destroy",
    "endpoint-connect": "connect",
    "endpoint-disconnect": "disconnect",
}
# Routes that look at no query.
_NO_QUERY = frozenset({"/_ping", "/version", "/info"})


class DockerApi:
    """Docker's API over a fabric. `serve_docker` puts it on a socket.

    Args:
        fabric: networks and guests.
        manager: containers; None: guests are all there is.
        version: what it says it is.

    Attributes:
        router: where further routes are added.
        events: what /events tells; `events.log` adds one.
    """

    def __init__(
        self, fabric: Fabric, manager: ContainerManager | None = None, *, version: VersionInfo | None = None
    ) -> None:
        self.fabric = fabric
        self.manager = manager
        self.version = version or VersionInfo()
        self.router = Router()
        self.events = EventLog()
        self._under_way = 0
        self._idle = Signal()
        self._oldest, self._newest = parse_version(self.version.min_api), parse_version(self.version.api)
        fabric.events.subscribe(self._tell)
        system.register(self)
        networks.register(self)
        absent.register(self)

    @property
    def headers(self) -> Headers:
        """What stands on every answer."""
        return (
            ("Api-Version", self.version.api),
            ("Docker-Experimental", "false"),
            ("Ostype", self.version.os),
            ("Server", f"Docker/{self.version.version} ({self.version.os})"),
        )

    async def drain(self, seconds: float) -> None:
        """Waits until the requests under way are answered, at most so long; streams are not waited for."""
        with trio.move_on_after(seconds):
            await self._idle.until(lambda: not self._under_way)

    def _tell(self, event: FabricEvent) -> None:
        """What happens to networks, as /events has it."""
        network, action = event.network, _ACTIONS.get(event.kind)
        if network is None or action is None or (action == "destroy" and network.config_only):
            return
        attributes = {"name": network.name, "type": network.driver}
        if event.endpoint is not None:
            attributes["container"] = event.endpoint.guest_id
        self.events.log("network", action, network.id, attributes)

    async def answer(self, request: Request) -> Answer:
        """Answers a request whose path still has its version; never raises but for the client's going."""
        self._under_way += 1
        try:
            return await self._routed(request)
        except DockerError as error:
            if error.status >= 500:
                logger.error("%s %s: %s", request.method, request.path, error)
            return error_response(error)
        except BridgeError as error:
            return error_response(as_docker_error(error))
        except sqlite3.Error as error:
            # A full disk, most of all: the transaction was rolled back.
            logger.error("cannot write the state: %s", error)
            return error_response(DockerError(500, f"the bridge cannot write its state: {error}; nothing was changed"))
        except ClientGoneError:
            raise
        except Exception as error:
            logger.exception("%s %s failed", request.method, request.path)
            return error_response(DockerError(500, f"internal error of the bridge: {error}"))
        finally:
            self._under_way -= 1
            self._idle.notify()

    async def _routed(self, request: Request) -> Answer:
        if (cleaned := clean_path(request.path)) != request.path:
            return Response(301, headers=[("Location", cleaned)])
        text, path = split_version(request.path)
        match = self.router.find(request.method, path)
        if match is None:
            raise DockerError(404, "page not found")
        version = self._newest
        if text is not None:
            version = parse_version(text)
            if version < self._oldest:
                message = (
                    f"client version {text} is too old. Minimum supported API version is {self.version.min_api}, "
                    "please upgrade your client to a newer version"
                )
                # Clients of that age print an answer as it is.
                headers = [("X-Content-Type-Options", "nosniff")]
                return Response(400, message.encode() + b"\n", headers, "text/plain; charset=utf-8")
            if version > self._newest:
                raise DockerError(
                    400,
                    f"client version {text} is too new. Maximum supported API version is {self.version.api}",
                )
        if request.query_error and path not in _NO_QUERY:
            raise DockerError(400, request.query_error)
        return await match.handler(request.with_route(path, version, match.params))

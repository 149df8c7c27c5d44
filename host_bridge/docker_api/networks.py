"""The /networks family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from host_bridge.docker_api.errors import DockerError
from host_bridge.errors import BridgeError

if TYPE_CHECKING:
    from host_bridge.docker_api.app import DockerApi


def register(api: DockerApi) -> None:
    """Adds the routes."""


def as_docker_error(error: BridgeError) -> DockerError:
    """A refusal of the fabric in Docker's words and status."""
    return DockerError(500, str(error))

"""What the container manager refuses, as answers of Docker's API."""

from __future__ import annotations

from host_bridge.containers.errors import ContainerError
from host_bridge.docker_api import refusals
from host_bridge.docker_api.errors import DockerError
from host_bridge.docker_api.http import Answer, Handler, Request, Response
from host_bridge.errors import BridgeError
from host_bridge.ports.model import PortError
from taploom.rpc import RpcError, StatusCode


def as_docker_error(error: BridgeError) -> DockerError:
    """A refusal in Docker's words and status."""
    if isinstance(error, ContainerError):
        return DockerError(error.status, error.message)
    if isinstance(error, PortError):
        return DockerError(500, str(error))
    return refusals.as_docker_error(error)


def explain(error: BridgeError) -> tuple[int, str]:
    """Status and text of a refusal."""
    refused = as_docker_error(error)
    return refused.status, refused.message


def guarded(handler: Handler) -> Handler:
    """The handler with the manager's refusals turned into answers."""

    async def answer(request: Request) -> Answer:
        try:
            return await handler(request)
        except ContainerError as error:
            if error.status == 304:
                return Response(304)
            raise as_docker_error(error) from error
        except BridgeError as error:
            raise as_docker_error(error) from error
        except RpcError as error:
            if error.code in (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED):
                raise DockerError(503, f"the container runtime does not answer: {error.message}") from error
            raise DockerError(500, error.message or str(error)) from error

    return answer

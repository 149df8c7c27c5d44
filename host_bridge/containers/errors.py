"""What cannot be done with a container, in Docker's words."""

from __future__ import annotations

from host_bridge.errors import BridgeError


class ContainerError(BridgeError):
    """A request about containers or images that cannot be done.

    Attributes:
        status: the HTTP status that Docker's API answers with; 304 says that nothing had to be done.
        message: Docker's text wherever it has one.
    """

    code = "FAILED_PRECONDITION"

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class NoSuchContainerError(ContainerError):
    """No container or guest has this id, name or prefix of an id."""

    code = "NOT_FOUND"

    def __init__(self, text: str) -> None:
        super().__init__(404, f"No such container: {text}")


class NotModifiedError(ContainerError):
    """The container is already as it was to be."""

    def __init__(self) -> None:
        super().__init__(304, "not modified")


def invalid(message: str) -> ContainerError:
    """400: the request is malformed."""
    return ContainerError(400, message)


def conflict(message: str) -> ContainerError:
    """409: the container's state does not allow it."""
    return ContainerError(409, message)


def not_running(container_id: str) -> ContainerError:
    """409: what needs a running container was asked of one that does not run."""
    return conflict(f"Container {container_id} is not running")


def foreign(name: str) -> ContainerError:
    """501: the container is a guest that some other runtime runs."""
    return ContainerError(
        501, f"container {name} was registered as a guest: the runtime that registered it starts, stops and enters it"
    )


def no_runtime() -> ContainerError:
    """501: there is nothing to run containers with."""
    return ContainerError(
        501, "this bridge has no container runtime: start it with --runtime ADDR to create and run containers"
    )

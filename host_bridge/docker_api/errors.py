"""What a Docker client is told when something cannot be done."""

from __future__ import annotations


class DockerError(Exception):
    """An error answer: `{"message": ...}` under an HTTP status.

    Attributes:
        status: the HTTP status code.
        message: Docker's own words wherever Docker has any.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


def bad_request(message: str) -> DockerError:
    """400: the request is malformed."""
    return DockerError(400, message)


def forbidden(message: str) -> DockerError:
    """403: what is asked is not permitted, now or ever."""
    return DockerError(403, message)


def not_found(message: str) -> DockerError:
    """404: what the request names does not exist."""
    return DockerError(404, message)


def conflict(message: str) -> DockerError:
    """409: the name or place is taken."""
    return DockerError(409, message)


def not_implemented(message: str) -> DockerError:
    """501: this bridge cannot do it at all."""
    return DockerError(501, message)

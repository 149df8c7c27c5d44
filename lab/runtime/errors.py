"""What can go wrong for the caller of the runtime; the service makes gRPC statuses of them."""

from __future__ import annotations


class RuntimeFailure(Exception):
    """Base of these; the message is for people."""


class NotFoundFailure(RuntimeFailure):
    """There is no such image, container or process."""


class InvalidFailure(RuntimeFailure):
    """What was asked for cannot be, whatever the state."""


class StateFailure(RuntimeFailure):
    """It cannot be done in the present state."""

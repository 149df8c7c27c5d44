"""What the bridge refuses and why.

Every error carries the name of the gRPC status code it becomes (see `protos/taploom/bridge/v1/bridge.proto`) and a
message that says what to do. Nothing here imports gRPC: state and address management are usable without it.
"""

from __future__ import annotations

from typing import ClassVar


class BridgeError(Exception):
    """A request that cannot be done. The message is for people; `code` names a gRPC status code."""

    code: ClassVar[str] = "INTERNAL"


class InvalidError(BridgeError):
    """The request is malformed, whatever the state is."""

    code = "INVALID_ARGUMENT"


class NotFoundError(BridgeError):
    """What the request names does not exist."""

    code = "NOT_FOUND"


class TakenError(BridgeError):
    """A name, address or place is held by another."""

    code = "ALREADY_EXISTS"


class PreconditionError(BridgeError):
    """The state does not allow the request now."""

    code = "FAILED_PRECONDITION"


class ExhaustedError(BridgeError):
    """No address, subnet or interface name is left."""

    code = "RESOURCE_EXHAUSTED"


class UnavailableError(BridgeError):
    """A guest or the helper does not answer; nothing was changed."""

    code = "UNAVAILABLE"


class AbortedError(BridgeError):
    """Another request undid this one while it was running."""

    code = "ABORTED"


class StateError(Exception):
    """The state directory or its database cannot be used; the message says what to do."""

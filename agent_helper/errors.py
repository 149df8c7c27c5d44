"""What can go wrong when the helper converges, each with the gRPC status that the host sees."""

from __future__ import annotations


class HelperError(Exception):
    """Base: `message` says what is wrong and what to do; `status` names a gRPC status code."""

    status = "INTERNAL"

    @property
    def message(self) -> str:
        return str(self.args[0]) if self.args else type(self).__name__


class InvalidSpecError(HelperError):
    """A description that can never be applied, whatever the state of the helper."""

    status = "INVALID_ARGUMENT"


class PreconditionError(HelperError):
    """A description that cannot be applied to what is there now."""

    status = "FAILED_PRECONDITION"


class NotFoundError(HelperError):
    """The object named is not there."""

    status = "NOT_FOUND"


class ExhaustedError(HelperError):
    """There is no room for more of it."""

    status = "RESOURCE_EXHAUSTED"


class UnavailableError(HelperError):
    """OVS or OVN does not answer now; try again."""

    status = "UNAVAILABLE"


class SetupError(HelperError):
    """The helper cannot start on this machine; the message says what is missing."""

    status = "FAILED_PRECONDITION"

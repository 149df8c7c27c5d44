"""Messages to bytes and back, with the strict wire check."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from . import wirecheck
from .service import Message
from .wire import WireError

MessageT = TypeVar("MessageT", bound=Message)


def make_parser(message_type: type[MessageT], *, strict: bool) -> Callable[[bytes], MessageT]:
    """A function from bytes to a message. It raises WireError for bytes that are not one.

    `strict` puts `wirecheck` before the parser; without it, only what the parser itself finds is refused.
    """
    if strict:
        return lambda data: wirecheck.parse_strict(message_type, data)

    def parse(data: bytes) -> MessageT:
        try:
            return message_type.parse(data)
        except (ValueError, OverflowError, EOFError, TypeError, AttributeError) as error:
            raise WireError(f"not a {message_type.__name__}: {error}") from error

    return parse

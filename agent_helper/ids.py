"""Identities, as the host bridge gives them to what it describes."""

from __future__ import annotations

import re

from agent_helper.errors import InvalidSpecError

_ID = re.compile(r"[a-zA-Z0-9_.-]{1,64}", re.ASCII)
_MOST_SHOWN = 80


def check_id(what: str, value: str) -> str:
    """The identity, when it is one.

    Raises:
        InvalidSpecError: it is not 1 to 64 characters of [a-zA-Z0-9_.-].
    """
    if not _ID.fullmatch(value):
        raise InvalidSpecError(f"{what} {value[:_MOST_SHOWN]!r} must be 1 to 64 characters of [a-zA-Z0-9_.-]")
    return value

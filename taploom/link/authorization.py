"""Single-use secrets: who may open the next link of an endpoint."""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Callable
from typing import Final

__all__ = ["SECRET_LIFETIME", "Authorizations", "new_secret"]

SECRET_LIFETIME: Final = 60.0
"""Seconds that a secret is good for."""


def new_secret() -> bytes:
    """A fresh link secret: 32 random bytes."""
    return secrets.token_bytes(32)


class Authorizations:
    """At most one valid secret per endpoint; the newest replaces the one before."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """``clock`` gives monotonic seconds."""
        self._clock = clock
        self._secrets: dict[str, tuple[bytes, float]] = {}
        # Unknown endpoints are compared with this one, so that they take as long as known ones.
        self._nobody: Final = new_secret()

    def put(self, endpoint_id: str, secret: bytes) -> None:
        """Let ``secret`` open one link of ``endpoint_id`` within SECRET_LIFETIME."""
        self._secrets[endpoint_id] = (bytes(secret), self._clock() + SECRET_LIFETIME)

    def has(self, endpoint_id: str) -> bool:
        """Whether there is a secret for ``endpoint_id``."""
        return endpoint_id in self._secrets

    def take(self, endpoint_id: str, secret: bytes) -> bool:
        """Whether ``secret`` opens a link now. A right one is used up, a wrong one leaves the right one as it was."""
        expected, expires = self._secrets.get(endpoint_id, (self._nobody, float("-inf")))
        right = hmac.compare_digest(expected, secret)
        if not right:
            return False
        self._secrets.pop(endpoint_id, None)
        return self._clock() < expires

    def drop(self, endpoint_id: str) -> None:
        """Forget the endpoint's secret."""
        self._secrets.pop(endpoint_id, None)

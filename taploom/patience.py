"""How long an attempt may take."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator


class Patience:
    """How long an attempt may take, in seconds: `first`, and twice as long after one that ended for want of time.

    A peer on a slow or busy machine may need longer than any fixed time for what it is asked. Were every attempt
    ended after the same time, the same work would begin again and again. Beyond `cap` it does not grow; attempts that
    succeed sooner bring it back.
    """

    # An attempt that has used this part of its time has failed for want of it, whatever it says: a peer answers
    # before its caller goes.
    _USED = 0.8
    # Not all attempts are equally much work: an easy one must not take the time away that a hard one has won.
    _DECAY = 0.8

    def __init__(self, first: float, cap: float) -> None:
        self._first = first
        self._cap = max(first, cap)
        self._seconds = first

    @property
    def seconds(self) -> float:
        """How long the next attempt may take."""
        return self._seconds

    @contextlib.contextmanager
    def attempt(self, *failures: type[BaseException]) -> Iterator[float]:
        """One attempt, given how long it may take; these exceptions say that it has failed."""
        allowed, began = self._seconds, time.monotonic()
        try:
            yield allowed
        except failures:
            self.failed(allowed, time.monotonic() - began)
            raise
        self.succeeded(time.monotonic() - began)

    def failed(self, allowed: float, took: float) -> None:
        """Says that an attempt failed, how long it was allowed to take and how long it took."""
        # By what that one was allowed: of many at a time that fail, only the first makes it longer.
        if took >= self._USED * allowed:
            self._seconds = max(self._seconds, min(2 * allowed, self._cap))

    def succeeded(self, took: float) -> None:
        """Says that an attempt succeeded, and how long it took."""
        enough = max(2 * took, self._DECAY * self._seconds)
        self._seconds = max(self._first, min(self._seconds, enough))

"""Waiting for conditions: wake-ups by key, and back-off between attempts."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator

import trio


class Signal:
    """Wakes whoever waits for a condition each time something that it may depend on has changed."""

    def __init__(self) -> None:
        self._lot = trio.lowlevel.ParkingLot()

    def notify(self) -> None:
        """Lets the waiters look again."""
        self._lot.unpark_all()

    async def wait(self) -> None:
        """Waits for the next `notify`. Check the condition before, with no await in between."""
        await self._lot.park()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Waits until the condition holds."""
        while not condition():
            await self._lot.park()


class KeyedSignal:
    """A `Signal` per key: a change of one of a thousand endpoints wakes that endpoint's waiters only."""

    def __init__(self) -> None:
        self._lots: dict[str, trio.lowlevel.ParkingLot] = {}

    def notify(self, key: str) -> None:
        """Lets the waiters of a key look again."""
        lot = self._lots.get(key)
        if lot is not None:
            lot.unpark_all()

    def notify_all(self) -> None:
        """Lets all waiters look again."""
        for lot in list(self._lots.values()):
            lot.unpark_all()

    async def until(self, key: str, condition: Callable[[], bool]) -> None:
        """Waits until the condition holds; it is looked at again on each change of the key."""
        while not condition():
            lot = self._lots.setdefault(key, trio.lowlevel.ParkingLot())
            try:
                await lot.park()
            finally:
                if not lot and self._lots.get(key) is lot:
                    del self._lots[key]


class Backoff:
    """Delays between attempts, in seconds: exponential from `first` to `cap`, +-20 % so that peers spread out.

    For `patience` seconds after the first failure the cap is `early_cap`: an agent that was killed is back within
    moments, and an attempt on a local socket costs microseconds; a peer that stays away is asked less often.
    """

    def __init__(
        self, *, first: float = 0.015, early_cap: float = 0.15, cap: float = 2.0, patience: float = 10.0
    ) -> None:
        self._first = first
        self._early_cap = early_cap
        self._cap = cap
        self._patience = patience
        self._delay = first
        self._started: float | None = None

    def reset(self) -> None:
        """The next delay is the first again."""
        self._delay = self._first
        self._started = None

    def next(self, now: float) -> float:
        """The delay before the next attempt; `now` is a monotonic time."""
        if self._started is None:
            self._started = now
        early = now - self._started < self._patience
        delay = min(self._delay, self._early_cap if early else self._cap)
        self._delay = min(self._delay * 1.7, self._early_cap if early else self._cap)
        return delay * random.uniform(0.8, 1.2)  # noqa: S311 - spread, not secrecy


@contextlib.contextmanager
def raised_alone() -> Iterator[None]:
    """Raises an exception that is alone in its groups as it is, without a nursery's group around it."""
    try:
        yield
    except BaseExceptionGroup as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        raise error from None

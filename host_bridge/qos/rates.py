"""What limits let through and drop, measured when somebody looks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import trio

from taploom.contracts.taploom.helper.v1 import QosCounters
from taploom.patience import Patience
from taploom.rpc import RpcError

# A rate is that of the time since the sample before, if that is so many seconds ago.
_SHORTEST, _LONGEST = 0.2, 5.0
_PAUSE = 0.3  # between two samples when there is none to compare with
# A helper on a slow machine needs longer than whoever looks would choose to wait.
_FIRST_TIMEOUT, _MOST_TIMEOUT = 0.5, 4.0

Key = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Measured:
    """What one limit did lately, in bits per second, and the bytes that it has dropped in all."""

    passed: int
    dropped: int
    dropped_bytes: int


class QosRates:
    """Samples the limits' counters.

    Args:
        ask: asks the helper for them, within so many seconds.
    """

    def __init__(self, ask: Callable[[float], Awaitable[Sequence[QosCounters]]]) -> None:
        self._ask = ask
        self._patience = Patience(_FIRST_TIMEOUT, _MOST_TIMEOUT)
        self._lock = trio.Lock()
        self._sampled_at = float("-inf")
        self._sample: Mapping[Key, QosCounters] = {}
        self.measured: Mapping[Key, Measured] = {}
        """By endpoint's id and direction, as of the last `measure`."""

    async def measure(self) -> None:
        """Brings `measured` up to date; it is empty afterwards when the helper does not answer in time, which is longer
        the next time then."""
        async with self._lock:
            age = trio.current_time() - self._sampled_at
            if age < _SHORTEST:
                return
            try:
                if age > _LONGEST:
                    await self._take()
                    await trio.sleep(_PAUSE)
                before, since = self._sample, self._sampled_at
                await self._take()
            except RpcError:
                self.forget()
                return
            seconds = self._sampled_at - since
            self.measured = {
                key: _measured(one, before[key], seconds) for key, one in self._sample.items() if key in before
            }

    def forget(self) -> None:
        """Drops what was measured: it is not true any more."""
        self._sample, self._sampled_at, self.measured = {}, float("-inf"), {}

    async def _take(self) -> None:
        with self._patience.attempt(RpcError) as within:
            counters = await self._ask(within)
        self._sampled_at = trio.current_time()
        self._sample = {(one.endpoint_id, int(one.direction)): one for one in counters}


def _measured(now: QosCounters, before: QosCounters, seconds: float) -> Measured:
    # Counters start anew when the limit is programmed anew.
    passed = max(0, now.passed_bytes - before.passed_bytes)
    dropped = max(0, now.dropped_bytes - before.dropped_bytes)
    return Measured(round(passed * 8 / seconds), round(dropped * 8 / seconds), now.dropped_bytes)

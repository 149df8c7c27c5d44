"""How often an interface is mended before the agent gives way for a while."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class _Bucket:
    tokens: float
    at: float


class RepairLimiter:
    """A token bucket per endpoint: ``burst`` repairs at once, then one each ``interval`` seconds.

    Enough for any administrator's slip, too little for a fight with another program to cost CPU or fill a log.
    """

    def __init__(self, burst: int = 5, interval: float = 2.0) -> None:
        self._burst = burst
        self._interval = interval
        self._buckets: dict[str, _Bucket] = {}

    def acquire(self, endpoint_id: str, now: float) -> float:
        """0.0 when a repair may be made now (and is counted); else the seconds until one may be."""
        bucket = self._buckets.setdefault(endpoint_id, _Bucket(float(self._burst), now))
        bucket.tokens = min(float(self._burst), bucket.tokens + max(0.0, now - bucket.at) / self._interval)
        bucket.at = now
        if bucket.tokens >= 1.0:
            bucket.tokens -= 1.0
            self._forget_full(now)
            return 0.0
        return (1.0 - bucket.tokens) * self._interval

    def _forget_full(self, now: float) -> None:
        # Endpoints come and go: one that has not needed a repair for long is as good as new.
        full = self._burst * self._interval
        for endpoint_id in [key for key, bucket in self._buckets.items() if now - bucket.at > full]:
            del self._buckets[endpoint_id]

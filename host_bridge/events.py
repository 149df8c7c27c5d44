"""What happened in the fabric, for those who follow it: Docker's /events, the container manager, published ports."""

from __future__ import annotations

import datetime
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from host_bridge.model import EndpointRecord, GuestRecord, NetworkRecord

logger = logging.getLogger("taploom.bridge.events")

EventKind = Literal[
    "network-create",
    "network-destroy",
    "endpoint-connect",
    "endpoint-disconnect",
    "guest-register",
    "guest-remove",
    "guest-rename",
    "helper-up",
]


@dataclass(frozen=True, slots=True)
class FabricEvent:
    """One thing that has happened. The records are as they were then; of what was removed, as they last were."""

    time: datetime.datetime
    kind: EventKind
    network: NetworkRecord | None = None
    guest: GuestRecord | None = None
    endpoint: EndpointRecord | None = None


class EventBus:
    """Tells subscribers, at once and in order. A subscriber must not block."""

    def __init__(self) -> None:
        self._subscribers: dict[object, Callable[[FabricEvent], None]] = {}

    def subscribe(self, callback: Callable[[FabricEvent], None]) -> Callable[[], None]:
        """Calls `callback` for every event from now on; returns what ends that."""
        key = object()
        self._subscribers[key] = callback

        def unsubscribe() -> None:
            self._subscribers.pop(key, None)

        return unsubscribe

    def emit(
        self,
        kind: EventKind,
        *,
        network: NetworkRecord | None = None,
        guest: GuestRecord | None = None,
        endpoint: EndpointRecord | None = None,
    ) -> None:
        """Tells everyone. What a subscriber does wrong is logged and hurts nobody else."""
        event = FabricEvent(datetime.datetime.now(datetime.UTC), kind, network, guest, endpoint)
        for callback in list(self._subscribers.values()):
            try:
                callback(event)
            except Exception:
                logger.exception("a follower of events failed at %s", kind)

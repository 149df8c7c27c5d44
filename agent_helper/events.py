"""What happens in the agent, handed to everyone who watches."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from datetime import UTC, datetime

import trio

from taploom.contracts.taploom.helper.v1 import WatchEventsResponse

_BACKLOG = 1024


class LaggingError(Exception):
    """A watcher was too slow and has missed events."""


class _Watcher:
    def __init__(self) -> None:
        self.send, self.receive = trio.open_memory_channel[WatchEventsResponse](_BACKLOG)
        self.lagging = False


class Events:
    """Distributes events. A watcher that falls behind is told so instead of holding the others up."""

    def __init__(self) -> None:
        self._watchers: set[_Watcher] = set()

    @property
    def watched(self) -> bool:
        """Whether anybody would get an event now."""
        return bool(self._watchers)

    def publish(self, event: WatchEventsResponse) -> None:
        """Stamps the event and hands it to all who watch now."""
        event.time = datetime.now(UTC)
        for watcher in list(self._watchers):
            try:
                watcher.send.send_nowait(event)
            except trio.WouldBlock:
                watcher.lagging = True
                watcher.send.close()
                self._watchers.discard(watcher)

    @contextlib.asynccontextmanager
    async def watch(self) -> AsyncIterator[AsyncIterator[WatchEventsResponse]]:
        """The events from now on; iterating raises LaggingError when some were missed."""
        watcher = _Watcher()
        self._watchers.add(watcher)
        try:
            yield _iterate(watcher)
        finally:
            self._watchers.discard(watcher)
            watcher.send.close()
            watcher.receive.close()


async def _iterate(watcher: _Watcher) -> AsyncIterator[WatchEventsResponse]:
    async for event in watcher.receive:
        yield event
    if watcher.lagging:
        raise LaggingError(f"more than {_BACKLOG} events were waiting")

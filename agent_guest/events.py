"""Events to any number of watchers. Publishing never waits: a watcher that does not keep up is dropped."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import AsyncIterator, Iterator

import trio

from taploom.contracts.taploom.guest.v1 import (
    InterfaceRepaired,
    LinkDown,
    LinkUp,
    WatchEventsResponse,
    WatchStarted,
)

QUEUE_LENGTH = 256

Event = LinkUp | LinkDown | InterfaceRepaired | WatchStarted


class SlowWatcherError(Exception):
    """The watcher has not read for so long that events were lost to it."""


class EventHub:
    """Fans events out to watchers, each with a queue of ``queue_length`` events."""

    def __init__(self, queue_length: int = QUEUE_LENGTH) -> None:
        self._queue_length = queue_length
        self._watchers: dict[Watcher, trio.MemorySendChannel[WatchEventsResponse]] = {}

    def publish(self, event: Event) -> None:
        """Gives the event to every watcher; drops those whose queue is full."""
        message = stamped(event)
        for watcher, channel in list(self._watchers.items()):
            try:
                channel.send_nowait(message)
            except trio.WouldBlock:
                watcher.lost = True
                channel.close()
                del self._watchers[watcher]

    def close(self) -> None:
        """Ends every watch after the events that it has not read yet."""
        for channel in self._watchers.values():
            channel.close()
        self._watchers.clear()

    @contextlib.contextmanager
    def watch(self) -> Iterator[Watcher]:
        """A watcher of everything that is published from now on."""
        send, receive = trio.open_memory_channel[WatchEventsResponse](self._queue_length)
        watcher = Watcher(receive)
        self._watchers[watcher] = send
        try:
            yield watcher
        finally:
            self._watchers.pop(watcher, None)
            send.close()
            receive.close()


class Watcher:
    """An iterator over events; raises SlowWatcherError after those that had room when one had none."""

    def __init__(self, channel: trio.MemoryReceiveChannel[WatchEventsResponse]) -> None:
        self._channel = channel
        self.lost = False

    async def __aiter__(self) -> AsyncIterator[WatchEventsResponse]:
        async for message in self._channel:
            yield message
        if self.lost:
            raise SlowWatcherError


def stamped(event: Event) -> WatchEventsResponse:
    """The message for an event that happens now."""
    message = WatchEventsResponse(time=datetime.datetime.now(datetime.UTC))
    match event:
        case LinkUp():
            message.link_up = event
        case LinkDown():
            message.link_down = event
        case InterfaceRepaired():
            message.interface_repaired = event
        case WatchStarted():
            message.started = event
    return message

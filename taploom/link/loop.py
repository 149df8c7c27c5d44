"""What runs on the data-plane thread: readiness in, handlers called, nothing else.

Everything here is called on that thread only, except ``call``.
"""

from __future__ import annotations

import selectors
import socket
from collections import deque
from collections.abc import Callable
from typing import Final, Protocol

from taploom.link.frames import HEADER_SIZE, LENGTH_SIZE, MAX_FRAME

__all__ = ["READ", "WRITE", "Job", "Loop"]

READ: Final = selectors.EVENT_READ
WRITE: Final = selectors.EVENT_WRITE

Handler = Callable[[int], None]

CHUNK: Final = 128 * 1024
"""Bytes that one wake-up moves at most in one direction of one link."""
_WIRE_FRAME: Final = LENGTH_SIZE + HEADER_SIZE + MAX_FRAME


class Job(Protocol):
    """A pump or a relay on the loop."""

    def start(self) -> None:
        """Register with the loop."""

    def stop(self) -> None:
        """Leave the loop and close the sockets; idempotent."""


class Loop:
    """A selector, the buffer that all links share, and a queue of calls from other threads."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._calls: deque[Callable[[], None]] = deque()
        self._wake_receive, self._wake_send = socket.socketpair()
        for sock in (self._wake_receive, self._wake_send):
            sock.setblocking(False)
        self._running = True
        # One chunk, the incomplete frame kept before it, and one frame that is read after the chunk is nearly full.
        self.buffer: Final = memoryview(bytearray(CHUNK + 2 * _WIRE_FRAME))

    def call(self, function: Callable[[], None]) -> None:
        """Run ``function`` on the loop's thread, soon; from any thread."""
        self._calls.append(function)
        try:
            self._wake_send.send(b"\0")
        except BlockingIOError:
            pass  # full of wake-ups already
        except OSError:
            pass  # the loop has ended: whoever waits for the call is told by the thread's end

    def watch(self, fd: int, events: int, handler: Handler) -> None:
        """Call ``handler(events)`` whenever ``fd`` is ready for one of ``events``; 0 stops that.

        Changing the events of a watched descriptor keeps it watched.
        """
        if fd not in self._selector.get_map():
            if events:
                self._selector.register(fd, events, handler)
        elif events:
            self._selector.modify(fd, events, handler)
        else:
            self._selector.unregister(fd)

    def stop(self) -> None:
        """End ``run`` after the handlers of this round."""
        self._running = False

    def run(self) -> None:
        """Serve until ``stop``."""
        select = self._selector.select
        self._selector.register(self._wake_receive, READ, self._run_calls)
        while self._running:
            for key, mask in select():
                key.data(mask)

    def _run_calls(self, _mask: int) -> None:
        self._wake_receive.recv(4096)
        while self._calls:
            self._calls.popleft()()

    def close(self) -> None:
        """Release the descriptors."""
        self._selector.close()
        self._wake_receive.close()
        self._wake_send.close()

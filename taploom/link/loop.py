"""What runs on the data-plane thread: readiness in, handlers called, nothing else.

Everything here is called on that thread only, except ``call``.
"""

from __future__ import annotations

import select
import selectors
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Protocol

from taploom.link.frames import HEADER_SIZE, LENGTH_SIZE, MAX_FRAME

__all__ = ["CHUNK", "HANGUP", "READ", "WRITE", "Job", "Loop"]

READ: Final = selectors.EVENT_READ
WRITE: Final = selectors.EVENT_WRITE
HANGUP: Final = 4
"""Neither of them: only errors and hang-ups, given as READ and WRITE. Nothing comes where the system cannot tell."""

Handler = Callable[[int], None]

CHUNK: Final = 256 * 1024
"""Bytes that one wake-up moves at most in one direction of one link."""
_WIRE_FRAME: Final = LENGTH_SIZE + HEADER_SIZE + MAX_FRAME


class Job(Protocol):
    """A pump or a relay on the loop."""

    def start(self) -> None:
        """Register with the loop."""

    def stop(self) -> None:
        """Leave the loop and close the sockets; idempotent."""


class _Poller(Protocol):
    """Waits for readiness and calls the handlers."""

    def watch(self, fd: int, events: int, handler: Handler) -> None:
        """As Loop.watch."""

    def serve(self) -> None:
        """Wait until something is ready, and call its handlers."""

    def close(self) -> None:
        """Release the descriptors."""


class _Epoll:
    """epoll(7) without `selectors` above it, which costs as much again for a small frame."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._handlers: dict[int, Handler] = {}

    def watch(self, fd: int, events: int, handler: Handler) -> None:
        mask = (select.EPOLLIN if events & READ else 0) | (select.EPOLLOUT if events & WRITE else 0)
        if fd not in self._handlers:
            if events:
                self._epoll.register(fd, mask)
                self._handlers[fd] = handler
        elif events:
            self._epoll.modify(fd, mask)
            self._handlers[fd] = handler
        else:
            del self._handlers[fd]
            with suppress(OSError):  # its owner has closed it
                self._epoll.unregister(fd)

    def serve(self) -> None:
        handlers = self._handlers
        for fd, mask in self._epoll.poll():
            handler = handlers.get(fd)
            if handler is None:  # taken off by an earlier handler of this round
                continue
            if mask == 1:  # EPOLLIN, nearly always
                handler(READ)
            else:  # an error or a hang-up is for both: whoever reads or writes first learns of it
                handler((READ if mask & ~select.EPOLLOUT else 0) | (WRITE if mask & ~select.EPOLLIN else 0))

    def close(self) -> None:
        self._epoll.close()


class _Selector:
    """What other systems have: the relay runs on macOS too."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def watch(self, fd: int, events: int, handler: Handler) -> None:
        events &= READ | WRITE
        if fd not in self._selector.get_map():
            if events:
                self._selector.register(fd, events, handler)
        elif events:
            self._selector.modify(fd, events, handler)
        else:
            self._selector.unregister(fd)

    def serve(self) -> None:
        for key, mask in self._selector.select():
            key.data(mask)

    def close(self) -> None:
        self._selector.close()


class Loop:
    """A poller, the buffer that all links share, and a queue of calls from other threads."""

    def __init__(self) -> None:
        # Asked by what `selectors` takes for the best, so that its choice can be overruled in one place.
        epoll = selectors.DefaultSelector is getattr(selectors, "EpollSelector", None)
        self._poller: _Poller = _Epoll() if epoll else _Selector()
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
        """Call ``handler(events)`` whenever ``fd`` is ready for one of ``events``; 0 stops that, HANGUP nearly.

        Changing the events of a watched descriptor keeps it watched.
        """
        self._poller.watch(fd, events, handler)

    def stop(self) -> None:
        """End ``run`` after the handlers of this round."""
        self._running = False

    def run(self) -> None:
        """Serve until ``stop``."""
        self.watch(self._wake_receive.fileno(), READ, self._run_calls)
        serve = self._poller.serve
        while self._running:
            serve()

    def _run_calls(self, _mask: int) -> None:
        self._wake_receive.recv(4096)
        while self._calls:
            self._calls.popleft()()

    def close(self) -> None:
        """Release the descriptors."""
        self._poller.close()
        self._wake_receive.close()
        self._wake_send.close()

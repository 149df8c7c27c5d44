"""The data-plane thread, as the rest of the process sees it.

One thread per process moves all frames, apart from trio's loop; trio starts it, watches it, and talks to it through
calls that run on it in turn. If it dies, the nursery around ``open_dataplane`` fails.
"""

from __future__ import annotations

import gc
import logging
import math
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Final

import trio

from taploom.address import set_buffers
from taploom.contracts.taploom.link.v1 import LinkCounters, LinkFeature
from taploom.link.loop import Job, Loop
from taploom.link.pump import Counters, Pump
from taploom.link.relay import Relay

__all__ = ["Attachment", "Dataplane", "DataplaneError", "open_dataplane"]

logger = logging.getLogger("taploom.link")

# CPython hands the interpreter lock on after this many seconds at the latest. The default of 5 ms is what every
# frame would wait for while the rest of the process computes.
_SWITCH_INTERVAL: Final = 0.0005


# Every batch makes a list and some views, which the collector counts: at its default of 700 it would run, and hold the
# interpreter lock over everything that was ever imported, every few hundred frames. That part is frozen.
_GC_THRESHOLD: Final = 5_000


class DataplaneError(Exception):
    """The data-plane thread has died: the process cannot move frames any more and should restart."""


class _Link:
    """One pump or relay: what trio's side knows of it."""

    __slots__ = ("counters", "detached", "job", "on_down")

    def __init__(self, counters: Counters, on_down: Callable[[str], None]) -> None:
        self.counters = counters
        self.on_down = on_down
        self.detached = False
        self.job: Job | None = None


class Attachment:
    """A job that ``attach`` put on the thread."""

    __slots__ = ("job", "on_end")

    def __init__(self, on_end: Callable[[str], None]) -> None:
        self.job: Job | None = None
        self.on_end: Callable[[str], None] | None = on_end


class Dataplane:
    """Attaches pumps and relays to the thread. Use ``open_dataplane``; call from trio only."""

    def __init__(self, loop: Loop, token: trio.lowlevel.TrioToken) -> None:
        self._loop: Final = loop
        self._token: Final = token
        self._links: dict[str, _Link] = {}
        self._counters: dict[str, Counters] = {}
        self._attachments: set[Attachment] = set()
        self._ended: Final = trio.Event()
        self.failure: BaseException | None = None
        self._send_down, self._receive_down = trio.open_memory_channel[tuple[_Link, str, str]](math.inf)

    def attach_pump(
        self,
        link_id: str,
        tap_fd: int,
        stream: trio.SocketStream,
        features: Iterable[LinkFeature],
        on_down: Callable[[str], None],
    ) -> None:
        """Pump frames between ``tap_fd`` and ``stream``, which is taken over.

        ``on_down(reason)`` is called in trio's thread when the link breaks; not after ``detach``.
        Raises ValueError when a link of this id is attached.
        """
        wanted = frozenset(features)
        self._attach(
            link_id,
            (stream,),
            lambda socks, counters, end: Pump(
                self._loop, tap_fd=tap_fd, sock=socks[0], features=wanted, counters=counters, on_end=end
            ),
            on_down,
        )

    def attach_relay(
        self,
        link_id: str,
        guest: trio.SocketStream,
        helper: trio.SocketStream,
        on_down: Callable[[str], None],
    ) -> None:
        """Copy bytes between two streams, which are taken over. Otherwise as ``attach_pump``."""
        self._attach(
            link_id,
            (guest, helper),
            lambda socks, counters, end: Relay(self._loop, socks[0], socks[1], counters, end),
            on_down,
        )

    def _attach(
        self,
        link_id: str,
        streams: tuple[trio.SocketStream, ...],
        make: Callable[[list[socket.socket], Counters, Callable[[str], None]], Job],
        on_down: Callable[[str], None],
    ) -> None:
        if link_id in self._links:
            raise ValueError(f"link {link_id} is attached already: detach it first")
        if self._ended.is_set():
            raise DataplaneError("the data plane has ended")
        counters = self._counters.get(link_id)
        if counters is None:
            counters = self._counters[link_id] = Counters()
        else:
            counters.reconnects += 1
        link = self._links[link_id] = _Link(counters, on_down)
        socks = [_take_over(stream) for stream in streams]

        def end(reason: str) -> None:
            # On the thread. After trio has ended there is nobody to tell.
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._send_down.send_nowait, (link, link_id, reason))

        def start() -> None:
            try:
                link.job = make(socks, counters, end)
                link.job.start()
            except (OSError, ValueError) as error:  # a descriptor that its owner has closed meanwhile
                if link.job is not None:
                    link.job.stop()
                for sock in socks:
                    sock.close()
                end(f"the link cannot be attached: {error}")

        self._loop.call(start)

    def attach(self, make: Callable[[Loop, Callable[[str], None]], Job], on_end: Callable[[str], None]) -> Attachment:
        """Run a job of another kind: ``make(loop, end)`` makes it, on the thread, with sockets that are its own then.

        The job calls ``end(reason)`` when it ends by itself; ``on_end(reason)`` is then called in trio's thread, soon,
        and not after ``end_attachment``. It must not raise.
        """
        if self._ended.is_set():
            raise DataplaneError("the data plane has ended")
        attachment = Attachment(on_end)
        self._attachments.add(attachment)

        def ended(reason: str) -> None:
            self._attachments.discard(attachment)
            on_end, attachment.on_end = attachment.on_end, None
            if on_end is not None:
                on_end(reason)

        def end(reason: str) -> None:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(ended, reason)

        def start() -> None:
            try:
                attachment.job = make(self._loop, end)
                attachment.job.start()
            except (OSError, ValueError) as error:
                if attachment.job is not None:
                    attachment.job.stop()
                end(f"the stream cannot be carried: {error}")

        self._loop.call(start)
        return attachment

    def end_attachment(self, attachment: Attachment, *, within: float = 0) -> None:
        """Stop the job, soon; one that has ended is no error.

        ``within``: block this thread until the job's sockets are closed, so many seconds at most; the thread
        does it between two rounds.
        """
        attachment.on_end = None
        if attachment not in self._attachments:
            return
        self._attachments.discard(attachment)
        stopped = threading.Event()

        def stop() -> None:
            if attachment.job is not None:
                attachment.job.stop()
            stopped.set()

        self._loop.call(stop)
        if within:
            stopped.wait(within)

    def call(self, function: Callable[[], None]) -> None:
        """Run ``function`` on the thread, soon: whatever is to be done to a job is done there."""
        self._loop.call(function)

    async def detach(self, link_id: str) -> None:
        """End the link and forget its counters; its sockets are closed and its TAP is unused on return.

        Unknown links and those that are down are no error. Not cut short by cancellation.
        """
        await self.stop(link_id)
        self._counters.pop(link_id, None)

    async def stop(self, link_id: str) -> None:
        """As ``detach``, but keep the counters for the link that follows."""
        link = self._links.pop(link_id, None)
        if link is None:
            return
        link.detached = True
        done = trio.Event()

        def stop() -> None:
            if link.job is not None:
                link.job.stop()
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(done.set)

        self._loop.call(stop)
        with trio.CancelScope(shield=True):
            async with trio.open_nursery() as nursery:

                async def until(event: trio.Event) -> None:
                    await event.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(until, done)
                nursery.start_soon(until, self._ended)

    def is_attached(self, link_id: str) -> bool:
        """Whether the link is there and has not broken."""
        return link_id in self._links

    def counters(self, link_id: str) -> LinkCounters:
        """What the link has carried since its first attach, over reconnects. Raises KeyError when unknown."""
        counters = self._counters[link_id]
        return LinkCounters(
            tx_frames=counters.tx_frames,
            tx_bytes=counters.tx_bytes,
            rx_frames=counters.rx_frames,
            rx_bytes=counters.rx_bytes,
            rx_drops=counters.rx_drops,
            tx_drops=counters.tx_drops,
            reconnects=counters.reconnects,
        )

    def _run(self) -> None:
        """The thread's body."""
        failure: BaseException | None = None
        try:
            self._loop.run()
        except BaseException as error:  # noqa: BLE001, RUF100 - whatever it is, trio has to know
            failure = error

        def ended() -> None:
            self.failure = failure
            self._ended.set()

        with suppress(trio.RunFinishedError):
            self._token.run_sync_soon(ended)

    async def _watch_thread(self) -> None:
        await self._ended.wait()
        if self.failure is not None:
            raise _died(self.failure) from self.failure

    async def _deliver_downs(self) -> None:
        async for link, link_id, reason in self._receive_down:
            if not link.detached:
                del self._links[link_id]
                link.detached = True
                link.on_down(reason)

    async def _shut_down(self, thread: threading.Thread) -> None:
        def stop_all() -> None:
            for link in list(self._links.values()):
                if link.job is not None:
                    link.job.stop()
            for attachment in self._attachments:
                if attachment.job is not None:
                    attachment.job.stop()
            self._loop.stop()

        for link in self._links.values():
            link.detached = True
        for attachment in self._attachments:
            attachment.on_end = None
        self._loop.call(stop_all)
        with trio.CancelScope(shield=True):
            await self._ended.wait()
            thread.join()
        if self.failure is not None:
            # Nobody else uses the links now, whatever state the bug left them in: let their peers know.
            for job in [*(link.job for link in self._links.values()), *(each.job for each in self._attachments)]:
                if job is not None:
                    with suppress(Exception):
                        job.stop()
        self._loop.close()


def _died(failure: BaseException) -> DataplaneError:
    return DataplaneError(f"the data-plane thread died: {failure!r}")


def _take_over(stream: trio.SocketStream) -> socket.socket:
    """The stream's descriptor as a plain non-blocking socket; the stream is as good as closed."""
    plain = socket.socket(fileno=stream.socket.detach())
    plain.setblocking(False)
    set_buffers(plain)
    return plain


@asynccontextmanager
async def open_dataplane() -> AsyncIterator[Dataplane]:
    """Run the data-plane thread for the length of the ``async with`` block; leaving it closes every link.

    Raises DataplaneError out of the block if the thread dies.
    """
    plane = Dataplane(Loop(), trio.lowlevel.current_trio_token())
    thread = threading.Thread(target=plane._run, name="taploom-dataplane", daemon=True)
    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(min(interval, _SWITCH_INTERVAL))
    gc.collect()  # or the garbage of the imports would be frozen with the rest
    gc.freeze()
    gc.set_threshold(max(thresholds[0], _GC_THRESHOLD), *thresholds[1:])
    thread.start()
    body_error: Exception | None = None
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(plane._watch_thread)
            nursery.start_soon(plane._deliver_downs)
            try:
                yield plane
            except Exception as error:  # noqa: BLE001, RUF100 - raised again below, without an exception group around it
                body_error = error
            finally:
                await plane._shut_down(thread)
                nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        if plane.failure is None:
            raise
        raise _died(plane.failure) from group
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*thresholds)
        gc.unfreeze()
    if body_error is not None:
        raise body_error

"""Locks for changes that may run beside one another and changes that may not."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import AsyncIterator, Iterator

import trio


class SharedLock:
    """Many sharers or one owner; first come, first served, so that neither starves."""

    def __init__(self) -> None:
        self._sharers = 0
        self._owned = False
        self._queue: deque[tuple[bool, trio.Event]] = deque()

    @contextlib.asynccontextmanager
    async def shared(self) -> AsyncIterator[None]:
        await self._acquire(exclusive=False)
        try:
            yield
        finally:
            self._sharers -= 1
            self._wake()

    @contextlib.asynccontextmanager
    async def exclusive(self) -> AsyncIterator[None]:
        await self._acquire(exclusive=True)
        try:
            yield
        finally:
            self._owned = False
            self._wake()

    async def _acquire(self, *, exclusive: bool) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()
        turn = trio.Event()
        entry = (exclusive, turn)
        self._queue.append(entry)
        self._wake()
        try:
            await turn.wait()
        except trio.Cancelled:
            if turn.is_set():  # it was our turn already: pass it on
                if exclusive:
                    self._owned = False
                else:
                    self._sharers -= 1
            else:
                self._queue.remove(entry)
            self._wake()
            raise

    def _wake(self) -> None:
        while self._queue:
            exclusive, turn = self._queue[0]
            if self._owned or (exclusive and self._sharers):
                return
            self._queue.popleft()
            if exclusive:
                self._owned = True
            else:
                self._sharers += 1
            turn.set()


class KeyedLocks:
    """A lock per key, there only as long as someone holds or awaits it."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[SharedLock, int]] = {}

    @contextlib.asynccontextmanager
    async def shared(self, key: str) -> AsyncIterator[None]:
        with self._used(key) as lock:
            async with lock.shared():
                yield

    @contextlib.asynccontextmanager
    async def exclusive(self, key: str) -> AsyncIterator[None]:
        with self._used(key) as lock:
            async with lock.exclusive():
                yield

    @contextlib.contextmanager
    def _used(self, key: str) -> Iterator[SharedLock]:
        lock, users = self._locks.get(key, (SharedLock(), 0))
        self._locks[key] = (lock, users + 1)
        try:
            yield lock
        finally:
            lock, users = self._locks.pop(key)
            if users > 1:
                self._locks[key] = (lock, users - 1)

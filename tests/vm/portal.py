"""Trio in a thread beside the tests: what is up for a whole module or session lives there."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

import trio

T = TypeVar("T")


class Portal:
    """Runs async functions for tests that are not async."""

    def __init__(self, token: trio.lowlevel.TrioToken, nursery: trio.Nursery) -> None:
        self._token = token
        self._nursery = nursery

    def call(self, function: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Awaits the function in the portal's thread and returns what it returns, or raises what it raises."""
        return trio.from_thread.run(function, *arguments, trio_token=self._token)

    @contextlib.contextmanager
    def opened(self, manager: contextlib.AbstractAsyncContextManager[T]) -> Iterator[T]:
        """An async context manager, entered and left by one task of the portal's."""
        close = self.call(_event)
        value: T
        left = self.call(_event)

        async def hold(task_status: trio.TaskStatus[T]) -> None:
            try:
                async with manager as value:
                    task_status.started(value)
                    await close.wait()
            finally:
                left.set()

        value = self.call(self._nursery.start, hold)
        try:
            yield value
        finally:
            self.call(_set, close)
            self.call(left.wait)


async def _event() -> trio.Event:
    return trio.Event()


async def _set(event: trio.Event) -> None:
    event.set()


@contextlib.contextmanager
def open_portal() -> Iterator[Portal]:
    """A portal for the length of the block."""
    ready = threading.Event()
    portals: list[Portal] = []
    stop: list[trio.CancelScope] = []
    failures: list[BaseException] = []

    async def main() -> None:
        async with trio.open_nursery() as nursery:
            stop.append(nursery.cancel_scope)
            portals.append(Portal(trio.lowlevel.current_trio_token(), nursery))
            ready.set()
            await trio.sleep_forever()

    def run() -> None:
        try:
            trio.run(main)
        except BaseException as error:
            failures.append(error)
        ready.set()

    thread = threading.Thread(target=run, name="portal")
    thread.start()
    ready.wait()
    if failures:
        raise failures[0]
    try:
        yield portals[0]
    finally:
        with contextlib.suppress(trio.RunFinishedError):
            trio.from_thread.run_sync(stop[0].cancel, trio_token=portals[0]._token)
        thread.join()
    if failures:
        raise failures[0]

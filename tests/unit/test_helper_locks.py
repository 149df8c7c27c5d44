"""Who waits for whom."""

from __future__ import annotations

import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from agent_helper.events import Events, LaggingError
from agent_helper.locks import KeyedLocks, SharedLock
from taploom.contracts.taploom.helper.v1 import LinkDown, WatchEventsResponse


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 5), st.integers(1, 5)), max_size=15))
def test_owners_are_alone(tasks: list[tuple[bool, int, int]]) -> None:
    inside: list[bool] = []
    finished = 0

    async def task(lock: SharedLock, exclusive: bool, start: int, duration: int) -> None:
        nonlocal finished
        await trio.sleep(start)
        async with lock.exclusive() if exclusive else lock.shared():
            assert not (exclusive and inside)
            assert True not in inside
            inside.append(exclusive)
            await trio.sleep(duration)
            inside.remove(exclusive)
        finished += 1

    async def main() -> None:
        lock = SharedLock()
        async with trio.open_nursery() as nursery:
            for exclusive, start, duration in tasks:
                nursery.start_soon(task, lock, exclusive, start, duration)

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))
    assert finished == len(tasks)


async def test_a_waiter_that_gives_up_holds_nobody_up(autojump_clock: trio.testing.MockClock) -> None:
    lock = SharedLock()
    async with trio.open_nursery() as nursery:

        async def owner() -> None:
            async with lock.exclusive():
                await trio.sleep(1)

        async def gives_up() -> None:
            with trio.move_on_after(2):
                async with lock.exclusive():
                    raise AssertionError("it has its turn only after it gave up")

        async def sharer(hold: float) -> None:
            async with lock.shared():
                await trio.sleep(hold)

        nursery.start_soon(sharer, 5)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(gives_up)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(sharer, 1)
        nursery.start_soon(owner)
    assert trio.current_time() >= 6


async def test_keys_are_apart_and_forgotten(autojump_clock: trio.testing.MockClock) -> None:
    locks = KeyedLocks()
    began = trio.current_time()
    async with trio.open_nursery() as nursery:

        async def hold(key: str) -> None:
            async with locks.exclusive(key):
                await trio.sleep(1)

        for key in ("a", "b", "a"):
            nursery.start_soon(hold, key)
    assert trio.current_time() - began == 2
    assert not locks._locks


async def test_a_watcher_sees_what_happens_from_its_start() -> None:
    events = Events()
    events.publish(WatchEventsResponse(link_down=LinkDown(endpoint_id="before")))
    async with events.watch() as seen:
        events.publish(WatchEventsResponse(link_down=LinkDown(endpoint_id="after")))
        event = await anext(seen)
        assert event.link_down is not None
        assert event.link_down.endpoint_id == "after"
        assert event.time is not None


async def test_a_slow_watcher_is_told_that_it_missed_some() -> None:
    events = Events()
    async with events.watch() as seen:
        for _ in range(5000):
            events.publish(WatchEventsResponse(link_down=LinkDown(endpoint_id="e")))
        count = 0
        try:
            async for _ in seen:
                count += 1
        except LaggingError:
            assert 0 < count < 5000
        else:
            raise AssertionError("it was not told")

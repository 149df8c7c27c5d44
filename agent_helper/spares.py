"""TAPs that are made, and plugged into the integration bridge, before an endpoint needs them.

Making a TAP takes longer than anything else that an endpoint waits for, and whenever a port comes or goes, ovs-vswitchd
looks at all that it has. An endpoint that gets a spare waits for neither: its port is told whose it is, which is
ovn-controller's matter alone (vswitchd does not read `external_ids`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

import trio

from taploom.link import Tap

MTU = 1500  # of spares; who wants another gets a TAP of its own
# Seconds in which nobody has come or gone: to make spares has vswitchd look at all ports too, and those who have just
# come have their first packets under way.
_QUIET = 0.25


class SpareTaps:
    """The spares that there are.

    Args:
        open_tap: opens a TAP of an MTU; blocks.
    """

    COUNT: Final = 4
    """So many, once nobody has taken one for a while."""

    def __init__(self, open_tap: Callable[[int], Tap]) -> None:
        self._open_tap = open_tap
        self._taps: deque[Tap] = deque()
        self._used = trio.Event()

    @property
    def names(self) -> list[str]:
        """Their interfaces."""
        return [tap.name for tap in self._taps]

    def take(self, mtu: int) -> Tap | None:
        """A spare, which is the caller's then, or None."""
        self.used()
        return self._taps.popleft() if self._taps and mtu == MTU else None

    def used(self) -> None:
        """To be called when an endpoint has come or gone."""
        self._used.set()
        self._used = trio.Event()

    async def until_used(self) -> None:
        """Returns when an endpoint has come or gone."""
        await self._used.wait()

    async def wanted(self) -> int:
        """Returns how many are missing, once it is a good time to make them."""
        while len(self._taps) >= self.COUNT:
            await self.until_used()
        while True:
            used = self._used
            with trio.move_on_after(_QUIET):
                await used.wait()
            if not used.is_set():
                return self.COUNT - len(self._taps)

    def open(self, count: int) -> list[Tap]:
        """Makes so many TAPs, for `add` once they are plugged. Blocks.

        Raises:
            OSError: there is none.
        """
        taps: list[Tap] = []
        try:
            taps.extend(self._open_tap(MTU) for _ in range(count))
        except BaseException:
            for tap in taps:
                tap.close()
            raise
        return taps

    def add(self, taps: list[Tap]) -> None:
        """Makes these be spares."""
        self._taps.extend(taps)

    def clear(self) -> list[Tap]:
        """Makes there be none; returns those that there were."""
        taps = list(self._taps)
        self._taps.clear()
        return taps

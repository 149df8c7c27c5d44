"""`taploom top`."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import click

from host_bridge.client import call
from host_bridge.commands.options import bridge_options, json_option
from host_bridge.output import plain, print_json
from host_bridge.view.table import KEYS, ORDERS, Row, render, rows

if TYPE_CHECKING:
    import trio

    from taploom.contracts.taploom.bridge.v1 import Status
    from taploom.rpc import Channel


@click.command()
@click.option("--sort", "order", type=click.Choice(ORDERS), default="rate", help="What comes first; default: rate.")
@click.option(
    "--interval", metavar="SECONDS", type=click.FloatRange(0.1, 60), default=1.0, help="To measure over; default: 1."
)
@click.option("--once", is_flag=True, help="Measure once, print it, and end.")
@json_option
@bridge_options
def top(*, bridge: str, order: str, interval: float, once: bool, as_json: bool) -> None:
    """Show what every endpoint carries, live: bits and frames per second both ways, drops and totals.

    `sent` is what its guest sends. Drops are frames, in both directions. A key sorts anew: b rate, s sent, r received,
    f frames, d drops, t total, n name; q ends it. With --json, one document a line, and with --once the only one.

    \b
    Example:
        taploom top
        taploom top --sort drops --interval 5
        taploom top --once --json | jq '.endpoints[] | select(.rates.sent_bits > 1e6) | .guest'
    """
    view = _View(order, once=once, as_json=as_json)

    async def run(channel: Channel) -> None:
        await _follow(channel, view, interval)

    with view.shown():
        call(bridge, run)


class _View:
    """What is done with each measurement."""

    def __init__(self, order: str, *, once: bool, as_json: bool) -> None:
        self.order = order
        self.once = once
        self._as_json = as_json
        self.live = sys.stdout.isatty() and not once and not as_json
        self._show: Callable[[list[Row]], None] = self._print
        self._last: tuple[Status, Status] | None = None

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Takes the terminal while it is live, and gives it back."""
        if not self.live:
            yield
            return
        from rich.console import Console
        from rich.live import Live

        console = Console(highlight=False)
        with _keys(), Live(console=console, auto_refresh=False, screen=True) as live:

            def show(found: list[Row]) -> None:
                live.update(render(found, self.order, room=console.height, hints=sys.stdin.isatty()), refresh=True)

            self._show = show
            yield

    def measured(self, before: Status, now: Status) -> None:
        """Shows a measurement."""
        self._last = before, now
        if self._as_json:
            found = rows(before, now, self.order)
            print_json({"time": plain(now.time), "endpoints": found}, line=not self.once)
        else:
            self._show(rows(before, now, self.order))

    def pressed(self, key: str) -> None:
        """Sorts anew."""
        if key in KEYS:
            self.order = KEYS[key]
            if self._last is not None:
                self.measured(*self._last)

    def _print(self, found: list[Row]) -> None:
        from rich.console import Console

        Console(highlight=False, soft_wrap=True).print(render(found, self.order))
        if not self.once:
            click.echo()


async def _follow(channel: Channel, view: _View, interval: float) -> None:
    import trio

    from taploom.contracts.taploom.bridge.v1 import WatchStatusRequest
    from taploom.contracts.taploom.bridge.v1.rpc import StatusServiceClient

    async with trio.open_nursery() as nursery:
        if view.live and sys.stdin.isatty():
            nursery.start_soon(_read_keys, view, nursery.cancel_scope)
        request = WatchStatusRequest(interval_ms=round(interval * 1000))
        before: Status | None = None
        async with StatusServiceClient(channel).watch_status(request) as stream:
            async for message in stream:
                assert message.status is not None
                if before is not None:
                    view.measured(before, message.status)
                    sys.stdout.flush()
                    if view.once:
                        break
                before = message.status
        nursery.cancel_scope.cancel()


async def _read_keys(view: _View, ending: trio.CancelScope) -> None:
    import trio

    while True:
        await trio.lowlevel.wait_readable(sys.stdin.fileno())
        pressed = os.read(sys.stdin.fileno(), 64).decode(errors="replace")
        if not pressed or "q" in pressed:
            ending.cancel()
            return
        for key in pressed:
            view.pressed(key)


@contextlib.contextmanager
def _keys() -> Iterator[None]:
    """Has the terminal hand over keys as they are pressed, and not show them."""
    if not sys.stdin.isatty():
        yield
        return
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)

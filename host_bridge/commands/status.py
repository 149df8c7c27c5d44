"""`taploom status`."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import TYPE_CHECKING

import click

from host_bridge.client import call, unary
from host_bridge.commands.options import bridge_options, json_option
from host_bridge.output import print_json
from host_bridge.view.rates import bits, elapsed, octets

if TYPE_CHECKING:
    from rich.console import Group, RenderableType
    from rich.table import Table

    from taploom.contracts.taploom.bridge.v1 import Link, Status
    from taploom.rpc import Channel

_COLOURS = {"ok": "green", "starting": "yellow", "down": "red"}


@click.command()
@click.option("--watch", is_flag=True, help="Go on, with live rates, until interrupted.")
@click.option(
    "--interval", metavar="SECONDS", type=click.FloatRange(0.1, 60), default=1.0, help="With --watch; default: 1."
)
@json_option
@bridge_options
def status(bridge: str, watch: bool, interval: float, as_json: bool) -> None:
    """Show how every component and link is, and what has not converged and why.

    Exits with 0 also when something is down: that is what it is there to show. With --json, `converged` says it all;
    with --watch and --json, one document a line.

    \b
    Example:
        taploom status
        taploom status --watch
        taploom status --json | jq .converged
    """
    if watch:
        _watch(bridge, interval, as_json)
        return
    from taploom.contracts.taploom.bridge.v1 import GetStatusRequest, GetStatusResponse

    now = unary(bridge, "StatusService/GetStatus", GetStatusRequest(), GetStatusResponse).status
    assert now is not None
    if as_json:
        print_json(now)
        return
    from rich.console import Console

    Console(highlight=False).print(render(now))


def _watch(bridge: str, interval: float, as_json: bool) -> None:
    from taploom.contracts.taploom.bridge.v1 import WatchStatusRequest
    from taploom.contracts.taploom.bridge.v1.rpc import StatusServiceClient

    request = WatchStatusRequest(interval_ms=round(interval * 1000))

    async def print_lines(channel: Channel) -> None:
        async with StatusServiceClient(channel).watch_status(request) as stream:
            async for message in stream:
                print_json(message.status, line=True)

    async def show(channel: Channel) -> None:
        from rich.console import Console
        from rich.live import Live

        before: Status | None = None
        async with StatusServiceClient(channel).watch_status(request) as stream:
            with Live(console=Console(highlight=False), auto_refresh=False) as live:
                async for message in stream:
                    assert message.status is not None
                    live.update(render(message.status, before), refresh=True)
                    before = message.status

    call(bridge, print_lines if as_json else show)


def render(now: Status, before: Status | None = None) -> Group:
    """The status for people; with the one before, rates in place of totals."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [_components(now)]
    if now.links:
        parts += [Text(), _links(now, before)]
        if any(link.qos for link in now.links):
            parts += [Text(), _limits(now)]
    if now.pending:
        parts += [Text(), _pending(now)]
    verdict = Text("everything has converged", "green") if now.converged else Text("not converged", "bold yellow")
    return Group(*parts, Text(), verdict)


def _table(*columns: str) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in columns:
        prose = column in _PROSE
        table.add_column(column, overflow="fold", no_wrap=not prose, justify="right" if column in _NUMBERS else "left")
    return table


_PROSE = frozenset({"PROBLEM", "WHY"})
_NUMBERS = frozenset(
    {"PASSES", "RATE", "BURST", "DROPPED", "DSCP", "SENT", "RECEIVED", "FRAMES", "DROPS", "REDIALS", "RESTARTS"}
)


def _components(now: Status) -> Table:
    from rich.text import Text

    table = _table("COMPONENT", "STATE", "SINCE", "RESTARTS", "VERSION", "PROBLEM")
    for component in now.components:
        state = (component.state.name or "unknown").lower()
        table.add_row(
            Text(component.name),
            Text(state, _COLOURS.get(state, "")),
            _ago(component.since, now),
            str(component.restarts) if component.restarts else "",
            Text(component.version),
            Text(component.problem),
        )
    return table


def _links(now: Status, before: Status | None) -> Table:
    from rich.text import Text

    earlier: Mapping[str, Link] = {link.endpoint.id: link for link in before.links if link.endpoint} if before else {}
    table = _table("LINK", "INTERFACE", "STATE", "SENT", "RECEIVED", "FRAMES", "DROPS", "REDIALS", "PROBLEM")
    for link in now.links:
        endpoint = link.endpoint
        assert endpoint is not None
        last = earlier.get(endpoint.id)
        seconds = elapsed(before.time, now.time) if before is not None else 0.0
        if last is not None and seconds > 0:
            # Counters start again with the agent.
            sent = f"{bits(max(0, link.tx_bytes - last.tx_bytes) * 8 / seconds)}"
            received = f"{bits(max(0, link.rx_bytes - last.rx_bytes) * 8 / seconds)}"
            both = link.tx_frames + link.rx_frames - last.tx_frames - last.rx_frames
            frames = f"{max(0, both) / seconds:,.0f}/s"
        else:
            sent, received = octets(link.tx_bytes), octets(link.rx_bytes)
            frames = f"{link.tx_frames + link.rx_frames:,}"
        table.add_row(
            Text(f"{endpoint.guest_name} on {endpoint.network_name}"),
            endpoint.interface_name,
            Text("up", "green") if link.up else Text("down", "red"),
            sent,
            received,
            frames,
            str(link.drops),
            str(link.reconnects),
            Text(link.problem),
        )
    return table


def _limits(now: Status) -> Table:
    from rich.text import Text

    from host_bridge.commands.qos import shown_burst, shown_direction, shown_rate

    table = _table("LIMIT", "DIRECTION", "PASSES", "RATE", "BURST", "DROPPED", "DSCP")
    for link in now.links:
        assert link.endpoint is not None
        for one in link.qos:
            assert one.rule is not None
            passed, dropped = one.passed_bits_per_second, one.dropped_bits_per_second
            table.add_row(
                Text(f"{link.endpoint.guest_name} on {link.endpoint.network_name}"),
                shown_direction(one.rule),
                "-" if passed is None else bits(passed),
                shown_rate(one.rule.rate_bits_per_second),
                shown_burst(one.rule.burst_bytes),
                "-" if dropped is None else bits(dropped),
                "-" if one.rule.dscp is None else str(one.rule.dscp),
            )
    return table


def _pending(now: Status) -> Table:
    from rich.text import Text

    table = _table("NOT CONVERGED", "FOR", "WHY")
    for pending in now.pending:
        table.add_row(Text(pending.subject), _ago(pending.since, now), Text(pending.reason))
    return table


def _ago(moment: datetime.datetime | None, now: Status) -> str:
    seconds = int(elapsed(moment, now.time))
    if moment is None:
        return ""
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= size:
            return f"{seconds // size}{unit}"
    return f"{max(0, seconds)}s"

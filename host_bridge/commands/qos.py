"""`taploom qos`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from host_bridge.client import CommandError, unary
from host_bridge.commands.documents import check_in_force
from host_bridge.commands.options import bridge_options, complete_guest, complete_network, json_option
from host_bridge.output import print_json, print_table

if TYPE_CHECKING:
    from taploom.contracts.taploom.bridge.v1 import QosDirection, QosEntry, QosRule

_DIRECTION = click.Choice(["out", "in", "both"])


@click.group()
def qos() -> None:
    """How much guests may send and receive, and which DSCP what they send has.

    \b
    Example:
        taploom qos set web --network app --rate 10mbit
        taploom qos set --network app --rate 100mbit --direction out
        taploom qos ls
    """


@qos.command("set")
@click.argument("guest", required=False, default="", shell_complete=complete_guest)
@click.option("--network", metavar="NETWORK", default="", shell_complete=complete_network, help="On which network.")
@click.option("--rate", metavar="RATE", help="Bits per second, such as 10mbit; 8kbit to 400gbit.")
@click.option("--burst", metavar="SIZE", help="Bytes at once after a pause, such as 200k; default: 0.2 s of the rate.")
@click.option("--dscp", metavar="NUMBER", help="The DSCP of IP packets that are sent, 0 to 63.")
@click.option("--direction", type=_DIRECTION, default="both", help="Seen from the guest; default: both (DSCP: out).")
@json_option
@bridge_options
def set_(
    *,
    bridge: str,
    guest: str,
    network: str,
    rate: str | None,
    burst: str | None,
    dscp: str | None,
    direction: str,
    as_json: bool,
) -> None:
    """Limit what GUEST sends and receives on a network, or mark what it sends; what is not given stays as it is.

    Without GUEST it is the network's default: it holds for each guest on it of which nothing else is said. Returns once
    it is in force.

    \b
    Example:
        taploom qos set web --network app --rate 10mbit --burst 200k
        taploom qos set web --network app --rate 50mbit --direction in
        taploom qos set web --network app --dscp 46
        taploom qos set --network app --rate 100mbit
    """
    from host_bridge.errors import InvalidError
    from host_bridge.qos.model import parse_burst, parse_dscp, parse_rate
    from taploom.contracts.taploom.bridge.v1 import SetQosRequest, SetQosResponse

    _check_place(guest, network)
    try:
        request = SetQosRequest(
            network=network,
            guest=guest,
            direction=_direction(direction),
            rate_bits_per_second=None if rate is None else parse_rate(rate),
            burst_bytes=None if burst is None else parse_burst(burst),
            dscp=None if dscp is None else parse_dscp(dscp),
        )
    except InvalidError as error:
        raise CommandError(str(error)) from error
    done = unary(bridge, "QosService/SetQos", request, SetQosResponse)
    assert done.entry is not None
    if as_json:
        print_json(done)
    else:
        _print([done.entry])
    check_in_force(done.pending)


@qos.command("ls")
@json_option
@bridge_options
def list_(bridge: str, as_json: bool) -> None:
    """List what is said of guests and networks; `taploom status` shows what passes.

    \b
    Example:
        taploom qos ls
    """
    from taploom.contracts.taploom.bridge.v1 import ListQosRequest, ListQosResponse

    found = unary(bridge, "QosService/ListQos", ListQosRequest(), ListQosResponse)
    if as_json:
        print_json(found)
        return
    _print(found.entries)
    if found.pending:
        click.echo(f"\nnot in force: {found.pending}")


@qos.command()
@click.argument("guest", required=False, default="", shell_complete=complete_guest)
@click.option("--network", metavar="NETWORK", default="", shell_complete=complete_network, help="On which network.")
@click.option("--direction", type=_DIRECTION, default="both", help="Seen from the guest; default: both.")
@bridge_options
def rm(bridge: str, guest: str, network: str, direction: str) -> None:
    """Remove what was set for GUEST on a network or, without GUEST, the network's default.

    \b
    Example:
        taploom qos rm web --network app
        taploom qos rm --network app --direction in
    """
    from taploom.contracts.taploom.bridge.v1 import RemoveQosRequest, RemoveQosResponse

    _check_place(guest, network)
    request = RemoveQosRequest(network=network, guest=guest, direction=_direction(direction))
    check_in_force(unary(bridge, "QosService/RemoveQos", request, RemoveQosResponse).pending)


def _check_place(guest: str, network: str) -> None:
    if not guest and not network:
        raise click.UsageError("Name a guest, or --network, or both.")


def _direction(text: str) -> QosDirection:
    from taploom.contracts.taploom.bridge.v1 import QosDirection

    return {"in": QosDirection.IN, "out": QosDirection.OUT}.get(text, QosDirection.UNSPECIFIED)


def _print(entries: list[QosEntry]) -> None:
    rows = [
        (
            entry.network_name,
            entry.guest_name or "(each guest)",
            shown_direction(rule),
            shown_rate(rule.rate_bits_per_second),
            shown_burst(rule.burst_bytes),
            "-" if rule.dscp is None else str(rule.dscp),
            "options" if rule.direction in entry.from_options else "set",
        )
        for entry in entries
        for rule in entry.rules
    ]
    print_table(("NETWORK", "GUEST", "DIRECTION", "RATE", "BURST", "DSCP", "BY"), rows)


def shown_direction(rule: QosRule) -> str:
    """A rule's direction."""
    return (rule.direction.name or "").lower()


def shown_rate(rate: int) -> str:
    """A rate as it may be given, such as 10mbit."""
    for unit, size in (("gbit", 10**9), ("mbit", 10**6), ("kbit", 10**3)):
        if rate >= size:
            return f"{rate / size:.6f}".rstrip("0").rstrip(".") + unit
    return str(rate) if rate else "-"


def shown_burst(burst: int) -> str:
    """A burst as it may be given, such as 200k."""
    for unit, size in (("m", 10**6), ("k", 10**3)):
        if burst >= size:
            return f"{burst / size:.6f}".rstrip("0").rstrip(".") + unit
    return str(burst) if burst else "-"

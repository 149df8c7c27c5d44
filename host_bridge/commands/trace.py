"""`taploom trace`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from host_bridge.client import CommandError, unary
from host_bridge.commands.options import bridge_options, complete_guest, json_option
from host_bridge.output import print_json

if TYPE_CHECKING:
    from rich.text import Text

    from taploom.contracts.taploom.bridge.v1 import TraceResponse, TraceStep

_NOT_TOLD = 2


@click.command()
@click.argument("source", shell_complete=complete_guest)
@click.argument("target", metavar="TARGET[:PORT]")
@click.option("--udp", "protocol", flag_value="udp", help="A UDP datagram; default: TCP where there is a port.")
@click.option("--icmp", "protocol", flag_value="icmp", help="A ping; default without a port.")
@click.option("-4", "family", flag_value=4, type=int, help="By IPv4 only.")
@click.option("-6", "family", flag_value=6, type=int, help="By IPv6 only.")
@click.option("--ovn", is_flag=True, help="Show OVN's own trace of each path too.")
@json_option
@bridge_options
@click.pass_context
def trace(
    context: click.Context,
    *,
    bridge: str,
    source: str,
    target: str,
    protocol: str | None,
    family: int | None,
    ovn: bool,
    as_json: bool,
) -> None:
    """Say whether and why a connection from SOURCE to TARGET would pass. Nothing is sent.

    SOURCE is a guest's or container's name or id, an address of one, or `host`: somebody outside who connects to a
    published port. TARGET is a name as SOURCE would ask for it, an address ([fd00::1]:80 with a port), or `host`.

    Exits with 0 when it passes, with 1 when it does not, and with 2 when that cannot be told or the question is wrong.

    \b
    Example:
        taploom trace web db:5432
        taploom trace web 9.9.9.9:53 --udp
        taploom trace host web:80 && echo reachable
    """
    from taploom.contracts.taploom.bridge.v1 import TraceRequest, TraceResponse, TraceVerdict

    host, port = split_target(target)
    request = TraceRequest(source=source, target=host, protocol=protocol or "", port=port, family=family or 0)
    try:
        found = unary(bridge, "TraceService/Trace", request, TraceResponse)
    except CommandError as error:
        click.echo(f"taploom: {error.format_message()}", err=True)
        context.exit(_NOT_TOLD)
    if as_json:
        print_json(found)
    else:
        _show(found, ovn=ovn)
    context.exit({TraceVerdict.PASSES: 0, TraceVerdict.STOPS: 1}.get(found.verdict, _NOT_TOLD))


def split_target(text: str) -> tuple[str, int]:
    """Name or address, and the port or 0, of NAME[:PORT], ADDRESS[:PORT] or [ADDRESS][:PORT].

    Raises:
        click.UsageError: it is none of these.
    """
    if text.startswith("["):
        host, closed, rest = text[1:].partition("]")
        if not closed or (rest and not rest.startswith(":")):
            raise click.UsageError(f"{text!r} is malformed: write an IPv6 address with a port as [fd00::1]:80.")
        port = rest[1:]
        if rest and not port:
            raise click.UsageError(f"{text!r} has no port after the colon.")
    elif text.count(":") > 1:
        return text, 0
    else:
        host, colon, port = text.partition(":")
        if colon and not port:
            raise click.UsageError(f"{text!r} has no port after the colon.")
    if not host:
        raise click.UsageError(f"{text!r} names no target.")
    if port and not (port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise click.UsageError(f"{port!r} is not a port: use 1 to 65535.")
    return host, int(port or 0)


def _show(found: TraceResponse, *, ovn: bool) -> None:
    from rich.console import Console
    from rich.text import Text

    from taploom.contracts.taploom.bridge.v1 import TraceVerdict

    console = Console(highlight=False, soft_wrap=True)
    for one in found.steps:
        console.print(_line(one))
    for path in found.paths:
        if found.steps or len(found.paths) > 1:
            console.print(Text(f"{path.source_address or 'host'} > {path.destination_address}", "bold"))
        for one in path.steps:
            console.print(_line(one))
        if ovn and path.ovn_trace:
            console.print(Text(path.ovn_trace.rstrip(), "dim"))
    style = {TraceVerdict.PASSES: "bold green", TraceVerdict.STOPS: "bold red"}.get(found.verdict, "bold yellow")
    console.print(Text(found.summary, style))


def _line(step: TraceStep) -> Text:
    from rich.text import Text

    from taploom.contracts.taploom.bridge.v1 import TraceVerdict

    mark = {TraceVerdict.PASSES: ("  ✓ ", "green"), TraceVerdict.STOPS: ("  ✗ ", "bold red")}
    topic = (step.topic.name or "").lower().replace("_", " ")
    return Text.assemble(mark.get(step.verdict, ("  ? ", "bold yellow")), (f"{topic:<14}", "dim"), step.text)

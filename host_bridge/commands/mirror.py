"""`taploom mirror`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from host_bridge.client import unary
from host_bridge.commands.documents import check_in_force
from host_bridge.commands.options import bridge_options, complete_guest, complete_network, json_option
from host_bridge.output import print_json, print_table

if TYPE_CHECKING:
    from collections.abc import Callable

    from taploom.contracts.taploom.bridge.v1 import Mirror, MirrorEnd


@click.group()
def mirror() -> None:
    """Copies of what a guest sends and receives, for another guest.

    \b
    Example:
        taploom mirror add web --to ids
        taploom mirror ls
    """


def _ends(command: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option(
            "--to-network",
            metavar="NETWORK",
            default="",
            shell_complete=complete_network,
            help="Where the other guest receives them; needed where it is on several networks.",
        ),
        click.option(
            "--network",
            metavar="NETWORK",
            default="",
            shell_complete=complete_network,
            help="On which network GUEST is copied from; needed where it is on several.",
        ),
        click.option(
            "--to",
            "target",
            metavar="GUEST",
            required=True,
            shell_complete=complete_guest,
            help="Who receives the copies.",
        ),
        click.argument("guest", shell_complete=complete_guest),
    ):
        command = option(command)
    return command


@mirror.command()
@_ends
@click.option(
    "--direction", type=click.Choice(["out", "in", "both"]), default="both", help="Seen from GUEST; default: both."
)
@json_option
@bridge_options
def add(*, bridge: str, guest: str, target: str, network: str, to_network: str, direction: str, as_json: bool) -> None:
    """Copy what GUEST sends and receives to another guest, each frame once and as it is.

    The other one sees the copies at its interface (tcpdump, Suricata and the like); what it answers goes its own way.

    \b
    Example:
        taploom mirror add web --to ids
        taploom mirror add web --network app --to ids --to-network watch --direction in
    """
    from taploom.contracts.taploom.bridge.v1 import (
        AddMirrorRequest,
        AddMirrorResponse,
        Mirror,
        MirrorDirection,
        MirrorEnd,
    )

    wanted = Mirror(
        source=MirrorEnd(guest=guest, network=network),
        target=MirrorEnd(guest=target, network=to_network),
        direction=MirrorDirection[direction.upper()],
    )
    done = unary(bridge, "MirrorService/AddMirror", AddMirrorRequest(mirror=wanted), AddMirrorResponse)
    assert done.mirror is not None
    print_json(done) if as_json else _print([done.mirror])
    check_in_force(done.pending)


@mirror.command("ls")
@json_option
@bridge_options
def list_(bridge: str, as_json: bool) -> None:
    """List the mirrors.

    \b
    Example:
        taploom mirror ls
    """
    from taploom.contracts.taploom.bridge.v1 import ListMirrorsRequest, ListMirrorsResponse

    found = unary(bridge, "MirrorService/ListMirrors", ListMirrorsRequest(), ListMirrorsResponse)
    if as_json:
        print_json(found)
        return
    _print(found.mirrors)
    if found.pending:
        click.echo(f"\nnot in force: {found.pending}")


@mirror.command()
@_ends
@bridge_options
def rm(*, bridge: str, guest: str, target: str, network: str, to_network: str) -> None:
    """Remove a mirror.

    \b
    Example:
        taploom mirror rm web --to ids
    """
    from taploom.contracts.taploom.bridge.v1 import MirrorEnd, RemoveMirrorRequest, RemoveMirrorResponse

    request = RemoveMirrorRequest(
        source=MirrorEnd(guest=guest, network=network), target=MirrorEnd(guest=target, network=to_network)
    )
    check_in_force(unary(bridge, "MirrorService/RemoveMirror", request, RemoveMirrorResponse).pending)


def _print(mirrors: list[Mirror]) -> None:
    rows = [(_place(one.source), (one.direction.name or "").lower(), _place(one.target)) for one in mirrors]
    print_table(("FROM", "DIRECTION", "TO"), rows)


def _place(end: MirrorEnd | None) -> str:
    return "" if end is None else f"{end.guest}@{end.network}"

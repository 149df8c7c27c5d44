"""`taploom guest`."""

from __future__ import annotations

import click

from host_bridge.client import unary
from host_bridge.commands.network import print_endpoints
from host_bridge.commands.options import bridge_options, complete_guest, json_option
from host_bridge.output import plain, print_fields, print_json, print_table, short


@click.group()
def guest() -> None:
    """Guests: VMs with an agent in them.

    \b
    Example:
        taploom guest register web vsock:3
        taploom guest ls
    """


@guest.command()
@click.argument("name")
@click.argument("address")
@click.option("--data", metavar="ADDRESS", default="", help="Its data port; default: beside the control port.")
@json_option
@bridge_options
def register(bridge: str, name: str, address: str, data: str, as_json: bool) -> None:
    """Register the guest whose agent listens at ADDRESS; prints its id.

    ADDRESS is vsock:CID[:PORT], hybrid:PATH[:PORT] or unix:PATH; PORT is 5555 unless given.

    \b
    Example:
        taploom guest register web vsock:3
        taploom guest register db hybrid:/run/vms/db/v.sock:5555
    """
    from taploom.contracts.taploom.bridge.v1 import RegisterGuestRequest, RegisterGuestResponse

    request = RegisterGuestRequest(name=name, address=address, data_address=data)

    registered = unary(bridge, "GuestService/RegisterGuest", request, RegisterGuestResponse).guest
    assert registered is not None
    print_json(registered) if as_json else click.echo(registered.id)


@guest.command("ls")
@json_option
@bridge_options
def list_(bridge: str, as_json: bool) -> None:
    """List the guests.

    \b
    Example:
        taploom guest ls
    """
    from taploom.contracts.taploom.bridge.v1 import ListGuestsRequest, ListGuestsResponse

    guests = unary(bridge, "GuestService/ListGuests", ListGuestsRequest(), ListGuestsResponse).guests
    if as_json:
        print_json(guests)
        return
    print_table(
        ("GUEST ID", "NAME", "ADDRESS", "AGENT", "NETWORKS"),
        [
            (
                short(one.id),
                one.name,
                one.address,
                "connected" if one.connected else "down",
                " ".join(endpoint.network_name for endpoint in one.endpoints) or "-",
            )
            for one in guests
        ],
    )


@guest.command()
@click.argument("guest", shell_complete=complete_guest)
@json_option
@bridge_options
def inspect(bridge: str, guest: str, as_json: bool) -> None:
    """Show a guest and its networks. GUEST is its name, its id, or the beginning of its id.

    \b
    Example:
        taploom guest inspect web
    """
    from taploom.contracts.taploom.bridge.v1 import GetGuestRequest, GetGuestResponse

    found = unary(bridge, "GuestService/GetGuest", GetGuestRequest(guest=guest), GetGuestResponse).guest
    assert found is not None
    if as_json:
        print_json(found)
        return
    print_fields(
        [
            ("Name", found.name),
            ("Id", found.id),
            ("Registered", plain(found.created_at)),
            ("Address", found.address),
            ("Data address", found.data_address),
            ("Agent", "connected" if found.connected else "down"),
            *([("Problem", found.problem)] if found.problem else []),
        ]
    )
    print_endpoints(found.endpoints, of_guest=True)


@guest.command()
@click.argument("guests", metavar="GUEST...", nargs=-1, required=True, shell_complete=complete_guest)
@json_option
@bridge_options
def rm(bridge: str, guests: tuple[str, ...], as_json: bool) -> None:
    """Remove guests and disconnect them from their networks. Prints what was removed.

    \b
    Example:
        taploom guest rm web
    """
    from taploom.contracts.taploom.bridge.v1 import RemoveGuestRequest, RemoveGuestResponse

    removed = []
    for name in guests:
        removed.append(unary(bridge, "GuestService/RemoveGuest", RemoveGuestRequest(guest=name), RemoveGuestResponse))
        if not as_json:
            click.echo(name)
    if as_json:
        print_json(removed)

"""`taploom guest`."""

from __future__ import annotations

import click

from host_bridge.client import unary
from host_bridge.commands.network import print_endpoints
from host_bridge.commands.options import bridge_options, complete_guest, json_option
from host_bridge.output import plain, print_fields, print_json, print_table, short


@click.group()
def guest() -> None:
    """Guests: VMs with an agent in them, or with a network card that QEMU carries.

    \b
    Example:
        taploom guest register web vsock:3
        taploom guest ls
    """


@guest.command()
@click.argument("name")
@click.argument("address", required=False, default="")
@click.option("--data", metavar="ADDRESS", default="", help="Its data port; default: beside the control port.")
@click.option("--qemu", metavar="PATH", help="No agent: QEMU connects its network card to this Unix socket.")
@click.option("--qemu-server", metavar="PATH", help="No agent: QEMU listens for its network card at this Unix socket.")
@click.option("--mac", metavar="MAC", default="", help="The MAC address of that card; default: one is chosen.")
@click.option(
    "--qmp", metavar="PATH", default="", help="Where its QEMU takes commands: the card then has a carrier or not."
)
@json_option
@bridge_options
def register(
    *,
    bridge: str,
    name: str,
    address: str,
    data: str,
    qemu: str | None,
    qemu_server: str | None,
    mac: str,
    qmp: str,
    as_json: bool,
) -> None:
    """Register the guest whose agent listens at ADDRESS; prints its id.

    ADDRESS is vsock:CID[:PORT], hybrid:PATH[:PORT] or unix:PATH; PORT is 5555 unless given. A VM without an agent has
    --qemu or --qemu-server in its place; what to start QEMU with is said on standard error.

    \b
    Example:
        taploom guest register web vsock:3
        taploom guest register db hybrid:/run/vms/db/v.sock:5555
        taploom guest register vm1 --qemu-server unix:/run/vms/vm1.sock
    """
    from taploom.contracts.taploom.bridge.v1 import RegisterGuestRequest, RegisterGuestResponse

    places = [f"{prefix}:{path}" for prefix, path in (("qemu", qemu), ("qemu-server", qemu_server)) if path is not None]
    if len(places) + bool(address) != 1:
        raise click.UsageError("give one of ADDRESS, --qemu and --qemu-server")
    request = RegisterGuestRequest(name=name, address=address or places[0], data_address=data, mac_address=mac, qmp=qmp)

    registered = unary(bridge, "GuestService/RegisterGuest", request, RegisterGuestResponse).guest
    assert registered is not None
    print_json(registered) if as_json else click.echo(registered.id)
    if registered.mac_address:
        path = registered.address.partition(":")[2]
        server = "on" if qemu_server is not None else "off"
        commands = f" -qmp unix:{qmp.removeprefix('unix:')},server=on,wait=off" if qmp else ""
        click.echo(
            f"qemu: -netdev stream,id=net0,addr.type=unix,addr.path={path},server={server} "
            f"-device virtio-net-pci,netdev=net0,mac={registered.mac_address}{commands}",
            err=True,
        )


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
                ("none" if one.mac_address else "connected") if one.connected else "down",
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
            *(
                [("MAC", found.mac_address), ("Network card", "plugged in" if found.connected else "not plugged in")]
                if found.mac_address
                else [("Data address", found.data_address), ("Agent", "connected" if found.connected else "down")]
            ),
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

"""`taploom network`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click

from host_bridge.client import unary
from host_bridge.commands.options import Pairs, bridge_options, complete_guest, complete_network, json_option
from host_bridge.output import plain, print_fields, print_json, print_table, short

if TYPE_CHECKING:
    from taploom.contracts.taploom.bridge.v1 import Endpoint


_MODES = click.Choice(["nat", "nat-unprotected", "routed", "isolated"])


@click.group()
def network() -> None:
    """Networks, and which guests are on them.

    \b
    Example:
        taploom network create app
        taploom network connect app web
    """


@network.command()
@click.argument("name")
@click.option("--subnet", "subnets", metavar="CIDR", multiple=True, help="A subnet; one per family.")
@click.option(
    "--gateway", "gateways", metavar="IP", multiple=True, help="A subnet's gateway; default: its lowest address."
)
@click.option(
    "--ip-range", "ip_ranges", metavar="CIDR", multiple=True, help="Where in a subnet addresses are taken from."
)
@click.option(
    "--aux-address",
    "auxiliary",
    type=Pairs("NAME=IP"),
    multiple=True,
    help="An address in a subnet that no guest gets; repeatable.",
)
@click.option("--internal", is_flag=True, help="No way out of the network.")
@click.option("--ipv6/--no-ipv6", default=False, help="Give the network IPv6 too.")
@click.option("--ipv4/--no-ipv4", default=True, help="Give the network IPv4; default: yes.")
@click.option("--mtu", metavar="BYTES", type=click.IntRange(0, 65535), default=0, help="Default: 1500.")
@click.option(
    "--ra",
    type=click.Choice(["none", "slaac", "stateless", "stateful"]),
    help="How IPv6 hosts that configure themselves come to addresses; default: by DHCPv6 where DHCP answers.",
)
@click.option("--dhcp", type=click.Choice(["auto", "on", "off"]), help="Whom DHCP answers; auto: who has no agent.")
@click.option("--gateway-mode-ipv4", "mode4", type=_MODES, help="nat, or routed: no address translation; default: nat.")
@click.option("--gateway-mode-ipv6", "mode6", type=_MODES, help="The same in IPv6.")
@click.option("--vlan", metavar="TAG", type=int, help="Be this VLAN of what is behind a network card of the helper's.")
@click.option("--uplink", metavar="CARD", help="With --vlan: which card; default: the only one that it can be.")
@click.option("--label", "labels", type=Pairs("KEY=VALUE", lone=True), multiple=True, help="A label; repeatable.")
@click.option(
    "-o", "--opt", "options", type=Pairs("KEY=VALUE"), multiple=True, help="One of Docker's driver options; repeatable."
)
@json_option
@bridge_options
def create(
    *,
    bridge: str,
    name: str,
    subnets: tuple[str, ...],
    gateways: tuple[str, ...],
    ip_ranges: tuple[str, ...],
    auxiliary: tuple[tuple[str, str], ...],
    internal: bool,
    ipv6: bool,
    ipv4: bool,
    mtu: int,
    ra: str | None,
    dhcp: str | None,
    mode4: str | None,
    mode6: str | None,
    vlan: int | None,
    uplink: str | None,
    labels: tuple[tuple[str, str], ...],
    options: tuple[tuple[str, str], ...],
    as_json: bool,
) -> None:
    """Create a network; prints its id.

    \b
    Example:
        taploom network create app
        taploom network create back --internal --subnet 10.5.0.0/24 --gateway 10.5.0.1 --ipv6
        taploom network create quiet -o com.docker.network.bridge.enable_icc=false --label tier=front
        taploom network create six --no-ipv4 --ipv6 --ra slaac --gateway-mode-ipv6 routed
        taploom network create office --vlan 120 --subnet 10.120.0.0/24 --gateway 10.120.0.1 --ip-range 10.120.0.192/26
    """
    from taploom.contracts.taploom.bridge.v1 import CreateNetworkRequest, CreateNetworkResponse

    given = dict(options)
    flags = {
        "taploom.ipv6.ra": ra,
        "taploom.dhcp": dhcp,
        "com.docker.network.bridge.gateway_mode_ipv4": mode4,
        "com.docker.network.bridge.gateway_mode_ipv6": mode6,
        "taploom.vlan.tag": None if vlan is None else str(vlan),
        "taploom.vlan.uplink": uplink,
    }
    for key, value in flags.items():
        if value is not None and given.setdefault(key, value) != value:
            raise click.UsageError(f"option {key} is given twice, as {given[key]} and as {value}")
    if uplink is not None and "taploom.vlan.tag" not in given:
        raise click.UsageError("--uplink is the card of a VLAN: give --vlan too")
    request = CreateNetworkRequest(
        name=name,
        subnets=list(subnets),
        gateways=list(gateways),
        internal=internal,
        mtu=mtu,
        enable_ipv6=ipv6,
        disable_ipv4=not ipv4,
        ip_ranges=list(ip_ranges),
        auxiliary_addresses=dict(auxiliary),
        labels=dict(labels),
        options=given,
    )

    created = unary(bridge, "NetworkService/CreateNetwork", request, CreateNetworkResponse).network
    assert created is not None
    print_json(created) if as_json else click.echo(created.id)


@network.command("ls")
@json_option
@bridge_options
def list_(bridge: str, as_json: bool) -> None:
    """List the networks.

    \b
    Example:
        taploom network ls
    """
    from taploom.contracts.taploom.bridge.v1 import ListNetworksRequest, ListNetworksResponse

    networks = unary(bridge, "NetworkService/ListNetworks", ListNetworksRequest(), ListNetworksResponse).networks
    if as_json:
        print_json(networks)
        return
    print_table(
        ("NETWORK ID", "NAME", "DRIVER", "SUBNETS", "INTERNAL", "MTU", "GUESTS"),
        [
            (
                short(one.id),
                one.name,
                one.driver or "bridge",
                " ".join(one.subnets) or "-",
                "yes" if one.internal else "no",
                str(one.mtu),
                " ".join(endpoint.guest_name for endpoint in one.endpoints) or "-",
            )
            for one in networks
        ],
    )


@network.command()
@click.argument("network", shell_complete=complete_network)
@json_option
@bridge_options
def inspect(bridge: str, network: str, as_json: bool) -> None:
    """Show a network and who is on it. NETWORK is its name, its id, or the beginning of its id.

    \b
    Example:
        taploom network inspect app
    """
    from host_bridge.vlan import place_of
    from taploom.contracts.taploom.bridge.v1 import GetNetworkRequest, GetNetworkResponse

    found = unary(bridge, "NetworkService/GetNetwork", GetNetworkRequest(network=network), GetNetworkResponse).network
    assert found is not None
    if as_json:
        print_json(found)
        return
    print_fields(
        [
            ("Name", found.name),
            ("Id", found.id),
            ("Created", plain(found.created_at)),
            ("Driver", found.driver or "bridge"),
            ("Subnets", " ".join(found.subnets)),
            ("Gateways", " ".join(found.gateways)),
            *_given("IP ranges", found.ip_ranges),
            *_given("Reserved", _pairs(found.auxiliary_addresses)),
            *_given("VLAN", [str(place)] if (place := place_of(found.options)) is not None else []),
            ("Internal", "yes" if found.internal else "no"),
            ("MTU", str(found.mtu)),
            *_given("Labels", _pairs(found.labels)),
            *_given("Options", _pairs(found.options)),
        ]
    )
    print_endpoints(found.endpoints, of_guest=False)


def _given(name: str, values: Sequence[str]) -> list[tuple[str, str]]:
    """A line of `inspect`, unless there is nothing to show."""
    return [(name, " ".join(values))] if values else []


def _pairs(values: Mapping[str, str]) -> list[str]:
    return [f"{key}={value}" for key, value in sorted(values.items())]


@network.command()
@click.argument("networks", metavar="NETWORK...", nargs=-1, required=True, shell_complete=complete_network)
@json_option
@bridge_options
def rm(bridge: str, networks: tuple[str, ...], as_json: bool) -> None:
    """Remove networks; guests must be disconnected first. Prints what was removed.

    \b
    Example:
        taploom network rm app
    """
    from taploom.contracts.taploom.bridge.v1 import DeleteNetworkRequest, DeleteNetworkResponse

    removed = []
    for name in networks:
        removed.append(
            unary(bridge, "NetworkService/DeleteNetwork", DeleteNetworkRequest(network=name), DeleteNetworkResponse)
        )
        if not as_json:
            click.echo(name)
    if as_json:
        print_json(removed)


@network.command()
@click.argument("network", shell_complete=complete_network)
@click.argument("guest", shell_complete=complete_guest)
@click.option("--ip", "addresses", metavar="IP", multiple=True, help="The address to have; one per family.")
@click.option("--alias", "aliases", metavar="NAME", multiple=True, help="A further name of the guest; repeatable.")
@click.option("--priority", metavar="N", type=int, default=0, help="The highest has the default route; default: 0.")
@click.option("--mac", metavar="MAC", default="", help="The MAC address to have; default: one of the IP address.")
@click.option(
    "--link",
    "links",
    type=Pairs("ALIAS=GUEST"),
    multiple=True,
    help="A name that only this guest has for another; repeatable.",
)
@click.option("--parent", metavar="NETWORK", help="Go over the guest's interface on this network, with --tag.")
@click.option("--tag", metavar="TAG", type=int, help="With --parent: the VLAN tag of the frames there.")
@click.option("--driver-opt", "options", type=Pairs("KEY=VALUE"), multiple=True, help="A driver option; repeatable.")
@json_option
@bridge_options
def connect(
    *,
    bridge: str,
    network: str,
    guest: str,
    addresses: tuple[str, ...],
    aliases: tuple[str, ...],
    priority: int,
    mac: str,
    links: tuple[tuple[str, str], ...],
    parent: str | None,
    tag: int | None,
    options: tuple[tuple[str, str], ...],
    as_json: bool,
) -> None:
    """Connect a guest to a network while it runs; returns once frames can pass.

    \b
    Example:
        taploom network connect app db --alias postgres
        taploom network connect back db --ip 10.5.0.10 --priority 1
        taploom network connect lab vm --parent base --tag 20
    """
    from taploom.contracts.taploom.bridge.v1 import ConnectGuestRequest, ConnectGuestResponse

    if not -(2**31) <= priority < 2**31:
        raise click.BadParameter("use -2147483648 to 2147483647", param_hint="--priority")
    given = dict(options)
    for key, value in (("taploom.vlan.parent", parent), ("taploom.vlan.tag", None if tag is None else str(tag))):
        if value is not None and given.setdefault(key, value) != value:
            raise click.UsageError(f"option {key} is given twice, as {given[key]} and as {value}")
    if parent is not None and "taploom.vlan.tag" not in given:
        raise click.UsageError(f"the frames over the interface on {parent} need a VLAN tag: give --tag too")
    if tag is not None and "taploom.vlan.parent" not in given:
        raise click.UsageError("--tag is of frames over the interface on another network: give --parent too")
    request = ConnectGuestRequest(
        network=network,
        guest=guest,
        addresses=list(addresses),
        aliases=list(aliases),
        gateway_priority=priority,
        mac_address=mac,
        links=dict(links),
        driver_options=given,
    )

    endpoint = unary(bridge, "NetworkService/ConnectGuest", request, ConnectGuestResponse).endpoint
    if as_json:
        print_json(endpoint)


@network.command()
@click.argument("network", shell_complete=complete_network)
@click.argument("guest", shell_complete=complete_guest)
@bridge_options
def disconnect(bridge: str, network: str, guest: str) -> None:
    """Disconnect a guest from a network while it runs.

    \b
    Example:
        taploom network disconnect app db
    """
    from taploom.contracts.taploom.bridge.v1 import DisconnectGuestRequest, DisconnectGuestResponse

    request = DisconnectGuestRequest(network=network, guest=guest)

    unary(bridge, "NetworkService/DisconnectGuest", request, DisconnectGuestResponse)


def print_endpoints(endpoints: list[Endpoint], *, of_guest: bool) -> None:
    """Prints the endpoints of a network, or of a guest."""
    if not endpoints:
        return
    click.echo()
    print_table(
        ("NETWORK" if of_guest else "GUEST", "INTERFACE", "ADDRESSES", "MAC", "ALIASES", "PRIORITY", "LINK"),
        [
            (
                endpoint.network_name if of_guest else endpoint.guest_name,
                endpoint.interface_name,
                " ".join(endpoint.addresses),
                endpoint.mac_address,
                " ".join(endpoint.aliases) or "-",
                str(endpoint.gateway_priority),
                "up" if endpoint.link_up else "down",
            )
            for endpoint in endpoints
        ],
    )
    for endpoint in endpoints:
        if endpoint.left_to_guest:
            click.echo(f"\n{endpoint.guest_name}, {endpoint.interface_name}: {endpoint.left_to_guest}")

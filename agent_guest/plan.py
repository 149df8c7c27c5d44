"""What has to be done so that the kernel has what the specs say: pure functions from both to a list of steps.

An empty plan means that all is right; nothing that is right is ever touched. Routes that the agent sets are told from
others' by their protocol number (PROTOCOL), default routes by their metric, since `ip route` is to show one plain
default route per family as in any container.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv6Interface

from .spec import InterfaceSpec
from .state import NAMES_TABLE, AddressState, IpInterface, LinkState, RouteState, network, parse_interface

PROTOCOL = 84
"""rtm_protocol of the agent's routes: in the range left to programs (rtnetlink(7)), used by none of rt_protos."""
PROTOCOL_BOOT = 3
"""RTPROT_BOOT, what `ip route add` sets; the default routes have it."""
DEFAULT_METRIC = {4: 0, 6: 1024}
DEFAULT_DESTINATION = {4: network("0.0.0.0/0"), 6: network("::/0")}


@dataclass(frozen=True, slots=True)
class SetLink:
    """Change the link's given attributes; None leaves one alone."""

    index: int
    name: str | None = None
    mac: str | None = None
    mtu: int | None = None
    alias: str | None = None
    up: bool | None = None

    def __str__(self) -> str:
        parts = []
        if self.up:
            parts.append("set up")
        if self.name is not None:
            parts.append(f"renamed to {self.name}")
        if self.mac is not None:
            parts.append(f"MAC {self.mac} restored")
        if self.mtu is not None:
            parts.append(f"MTU {self.mtu} restored")
        if self.alias is not None:
            parts.append("marked again")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class AddAddress:
    """Give the link this address."""

    address: AddressState

    def __str__(self) -> str:
        return f"address {self.address.address} added"


@dataclass(frozen=True, slots=True)
class RemoveAddress:
    """Take this address from the link."""

    address: AddressState

    def __str__(self) -> str:
        return f"address {self.address.address} removed"


@dataclass(frozen=True, slots=True)
class ReplaceRoute:
    """Set this route, in place of another with the same destination and metric."""

    route: RouteState

    def __str__(self) -> str:
        return f"{_route_text(self.route)} set"


@dataclass(frozen=True, slots=True)
class RemoveRoute:
    """Take this route away."""

    route: RouteState

    def __str__(self) -> str:
        return f"{_route_text(self.route)} removed"


Step = SetLink | AddAddress | RemoveAddress | ReplaceRoute | RemoveRoute


def _route_text(route: RouteState) -> str:
    if route.destination.prefixlen == 0:
        return f"IPv{route.destination.version} default route via {route.gateway}"
    return f"route to {route.destination}"


def link_local(mac: str) -> IPv6Interface:
    """The link-local address that belongs to a MAC address (RFC 4291, appendix A), with its prefix length."""
    octets = bytearray(bytes.fromhex(mac.replace(":", "")))
    octets[0] ^= 2
    identifier = bytes(octets[:3]) + b"\xff\xfe" + bytes(octets[3:])
    address = parse_interface(
        f"fe80::{identifier[:2].hex()}:{identifier[2:4].hex()}:{identifier[4:6].hex()}:{identifier[6:].hex()}/64"
    )
    assert isinstance(address, IPv6Interface)
    return address


def plan_link(spec: InterfaceSpec, link: LinkState, alias: str) -> list[SetLink]:
    """Name, MAC, MTU, alias and administrative state, as one change."""
    step = SetLink(
        index=link.index,
        name=spec.name if link.name != spec.name else None,
        mac=spec.mac if link.mac != spec.mac else None,
        mtu=spec.mtu if link.mtu != spec.mtu else None,
        alias=alias if link.alias != alias else None,
        up=True if not link.up else None,
    )
    return [] if step == SetLink(link.index) else [step]


def wanted_addresses(spec: InterfaceSpec) -> tuple[IpInterface, ...]:
    """The spec's addresses and, where IPv6 is used, the link-local one that neighbour discovery needs."""
    if not spec.wants_ipv6:
        return spec.addresses
    own = link_local(spec.mac)
    if any(address.ip == own.ip for address in spec.addresses):
        return spec.addresses
    return (*spec.addresses, own)


def plan_addresses(
    spec: InterfaceSpec, index: int, current: Iterable[AddressState], *, remove_others: bool = True
) -> list[Step]:
    """Adds what is missing first, then removes what is not wanted, so that a change has no moment without address.

    The link needs promote_secondaries, or removing an IPv4 address takes the new ones of its subnet along.
    """
    wanted = wanted_addresses(spec)
    mine = [state for state in current if state.index == index]
    there = {state.address for state in mine if not state.failed}
    steps: list[Step] = []
    removed = set()
    for address in wanted:
        if address in there:
            continue
        for state in mine:
            # IPv6 has an address once per link, whatever the prefix length: make room.
            if address.version == 6 and state.address.ip == address.ip:
                steps.append(RemoveAddress(state))
                removed.add(state)
        steps.append(AddAddress(AddressState(index, address)))
    if remove_others:
        steps += [RemoveAddress(state) for state in mine if state.address not in wanted and state not in removed]
    return steps


def route_order(specs: Iterable[InterfaceSpec], version: int) -> list[InterfaceSpec]:
    """The interfaces that can have the family's default route, the one that has it first."""
    candidates = [spec for spec in specs if spec.gateway(version) is not None]
    return sorted(candidates, key=lambda spec: (-spec.priority, spec.network_name.encode(), spec.endpoint_id))


def name_order(specs: Iterable[InterfaceSpec]) -> list[InterfaceSpec]:
    """The order in which networks are asked for names: that of the default route, internal networks after others."""
    return sorted(
        specs,
        key=lambda spec: (-spec.priority, not spec.gateways, spec.network_name.encode(), spec.endpoint_id),
    )


def default_links(specs: Mapping[int, InterfaceSpec]) -> set[int]:
    """The links that default routes are to go over, or did before one of the interfaces came or changed."""
    first = {spec.endpoint_id for version in (4, 6) for spec in route_order(specs.values(), version)[:2]}
    return {index for index, spec in specs.items() if spec.endpoint_id in first}


def wanted_routes(specs: Mapping[int, InterfaceSpec], over: Collection[int] | None = None) -> list[RouteState]:
    """The routes of the interfaces, given by link index, over all links or some."""
    routes = []
    for index, spec in specs.items():
        if over is not None and index not in over:
            continue
        # fe80::/64 is on every IPv6 link already, and only the link tells whose it is.
        servers = [server for server in spec.dns_servers if not (server.version == 6 and server.is_link_local)]
        for server in servers:
            destination = network(str(server))
            routes.append(RouteState(destination, None, index, DEFAULT_METRIC[server.version], PROTOCOL, NAMES_TABLE))
        for route in spec.routes:
            metric = DEFAULT_METRIC[route.destination.version]
            routes.append(RouteState(route.destination, route.gateway, index, metric, PROTOCOL))
    for version in (4, 6):
        order = route_order(specs.values(), version)
        if order:
            index = next(index for index, spec in specs.items() if spec is order[0])
            if over is not None and index not in over:
                continue
            destination = DEFAULT_DESTINATION[version]
            gateway = order[0].gateway(version)
            routes.append(RouteState(destination, gateway, index, DEFAULT_METRIC[version], PROTOCOL_BOOT))
    return routes


def plan_routes(
    specs: Mapping[int, InterfaceSpec], current: Iterable[RouteState], over: Collection[int] | None = None
) -> list[Step]:
    """Sets what is missing, then removes the agent's routes that are not wanted, over the given links only.

    Args:
        over: those of the links whose routes ``current`` has; None: all.
    """
    wanted = {_key(route): route for route in wanted_routes(specs, over)}
    there = {_key(route): route for route in current if route.index in specs}
    steps: list[Step] = [ReplaceRoute(route) for key, route in wanted.items() if key not in there]
    steps += [RemoveRoute(route) for key, route in there.items() if key not in wanted and is_own(route)]
    return steps


def is_own(route: RouteState) -> bool:
    """Whether a route over one of the agent's links is one that the agent set."""
    if route.destination.prefixlen == 0:
        return route.metric == DEFAULT_METRIC[route.destination.version]
    return route.protocol == PROTOCOL


def _key(route: RouteState) -> tuple[object, ...]:
    """What a route is known by: whoever has set it."""
    return route.destination, route.gateway, route.index, route.metric, route.table

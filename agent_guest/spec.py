"""Validated descriptions of interfaces. A message from the host becomes an InterfaceSpec or a SpecError."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from taploom.contracts.taploom.guest.v1 import Interface, NameLink, Route, TrunkChild

from .state import Ip, IpInterface, Network, network, parse_interface, parse_ip

_ENDPOINT_ID = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_INTERFACE_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,15}")
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}")
# net/ipv4/conf has directories of these names that are not interfaces; "." and ".." are no names at all.
_RESERVED_NAMES = frozenset({"lo", "all", "default", ".", ".."})
MTU_MIN, MTU_MAX, MTU_MIN_IPV6 = 68, 65521, 1280
"""RFC 791; 65535 less the Ethernet header, drivers/net/tun.c; RFC 8200."""
MAX_ITEMS = 256
"""Addresses, routes, servers and links of names of one interface."""
TAGS = range(1, 4095)
"""IEEE 802.1Q: 0 is no VLAN, 4095 is reserved."""

_T = TypeVar("_T")


class SpecError(ValueError):
    """The description cannot be applied; the message says which field and what is allowed."""


@dataclass(frozen=True, slots=True)
class RouteSpec:
    """A route over the interface; ``gateway`` None: the destination is on the link."""

    destination: Network
    gateway: Ip | None


@dataclass(frozen=True, slots=True)
class TrunkSpec:
    """What carries an interface: frames with that tag over the interface of another endpoint."""

    parent_id: str
    tag: int


@dataclass(frozen=True, slots=True)
class InterfaceSpec:
    """An interface as it is to be."""

    endpoint_id: str
    name: str
    mac: str
    addresses: tuple[IpInterface, ...]
    gateways: tuple[Ip, ...]
    priority: int
    routes: tuple[RouteSpec, ...]
    mtu: int
    network_name: str
    dns_servers: tuple[Ip, ...]
    name_links: tuple[tuple[str, str], ...] = ()
    """(alias, target): what only this container calls another one of the network."""
    trunk: TrunkSpec | None = None
    """None: a data link of its own."""

    @property
    def wants_ipv6(self) -> bool:
        return any(address.version == 6 for address in self.addresses)

    def gateway(self, version: int) -> Ip | None:
        return next((gateway for gateway in self.gateways if gateway.version == version), None)

    @classmethod
    def parse(cls, message: Interface) -> InterfaceSpec:
        """Checks every field; raises SpecError."""
        check_endpoint_id(message.endpoint_id)
        name = message.name
        if not _INTERFACE_NAME.fullmatch(name) or name in _RESERVED_NAMES:
            raise SpecError(f"name {name[:40]!r} is not an interface name: 1 to 15 of [a-zA-Z0-9_.-], such as eth0")
        mac = message.mac_address.lower()
        if not _MAC.fullmatch(mac) or mac == "00:00:00:00:00:00":
            raise SpecError(f"mac_address {mac[:40]!r} is not of the form aa:bb:cc:dd:ee:ff")
        if int(mac[:2], 16) & 1:
            raise SpecError(f"mac_address {mac} is a multicast address; an interface needs a unicast one")
        for field in ("addresses", "routes", "dns_servers", "name_links"):
            if len(getattr(message, field)) > MAX_ITEMS:
                raise SpecError(f"{field} has {len(getattr(message, field))} entries; at most {MAX_ITEMS} are allowed")
        addresses = tuple(_parse("addresses", text, _address) for text in message.addresses)
        if len({address.ip for address in addresses}) != len(addresses):
            raise SpecError("addresses has one address twice")
        _check_mtu(message.mtu, any(address.version == 6 for address in addresses))
        gateways = tuple(_parse("gateways", text, _ip) for text in message.gateways)
        if len({gateway.version for gateway in gateways}) != len(gateways):
            raise SpecError("gateways has two of one family; at most one per family is allowed")
        for gateway in gateways:
            _check_next_hop("gateway", gateway, addresses)
        routes = tuple(_route(route, addresses) for route in message.routes)
        if len({route.destination for route in routes}) != len(routes):
            raise SpecError("routes has one destination twice")
        servers = tuple(_parse("dns_servers", text, _ip) for text in message.dns_servers)
        _check_servers(servers, addresses)
        for server in servers:
            if any(route.destination == network(str(server)) for route in routes):
                raise SpecError(f"routes has a route to the DNS server {server}, which gets its own")
        _check_name("network_name", message.network_name)
        for link in message.name_links:
            for field, text in (("alias", link.alias), ("target", link.target)):
                _check_name(f"name_links: {field}", text)
                if not text:
                    raise SpecError(f"name_links: {field} is missing")
        return cls(
            endpoint_id=message.endpoint_id,
            name=name,
            mac=mac,
            addresses=addresses,
            gateways=gateways,
            priority=message.gateway_priority,
            routes=routes,
            mtu=message.mtu,
            network_name=message.network_name,
            dns_servers=servers,
            name_links=tuple((link.alias, link.target) for link in message.name_links),
            trunk=_trunk(message.endpoint_id, message.trunk_child),
        )

    def carried_by(self, parent: InterfaceSpec | None) -> InterfaceSpec:
        """As it can be over that interface: with an MTU of at most that one's, which the kernel demands too."""
        return self if parent is None or parent.mtu >= self.mtu else replace(self, mtu=parent.mtu)

    def to_message(self) -> Interface:
        """The message again, in canonical spelling."""
        return Interface(
            endpoint_id=self.endpoint_id,
            name=self.name,
            mac_address=self.mac,
            addresses=[str(address) for address in self.addresses],
            gateways=[str(gateway) for gateway in self.gateways],
            gateway_priority=self.priority,
            routes=[
                Route(destination=str(route.destination), gateway="" if route.gateway is None else str(route.gateway))
                for route in self.routes
            ],
            mtu=self.mtu,
            network_name=self.network_name,
            dns_servers=[str(server) for server in self.dns_servers],
            name_links=[NameLink(alias=alias, target=target) for alias, target in self.name_links],
            trunk_child=None if self.trunk is None else trunk_message(self.trunk),
        )


def trunk_message(trunk: TrunkSpec) -> TrunkChild:
    """The message again."""
    return TrunkChild(parent_endpoint_id=trunk.parent_id, tag=trunk.tag)


def check_endpoint_id(text: str) -> None:
    """Raises SpecError unless the text can be an endpoint's id."""
    if not _ENDPOINT_ID.fullmatch(text):
        raise SpecError(f"endpoint_id {text[:80]!r} must be 1 to 64 characters of [a-zA-Z0-9_.-]")


def check_against(spec: InterfaceSpec, others: list[InterfaceSpec]) -> None:
    """Raises SpecError when the interface cannot stand beside the others, which are other endpoints'."""
    for other in others:
        shared = set(spec.dns_servers) & set(other.dns_servers)
        if any(not server.is_link_local or server.version == 4 for server in shared):
            raise SpecError(
                f"dns_servers: {min(map(str, shared))} is already a server of endpoint {other.endpoint_id};"
                " each network needs a server address of its own"
            )
        both = {address.ip for address in spec.addresses} & {address.ip for address in other.addresses}
        if any(not (ip.version == 6 and ip.is_link_local) for ip in both):
            raise SpecError(f"addresses: {min(map(str, both))} is already an address of endpoint {other.endpoint_id}")
        if spec.trunk is not None and spec.trunk == other.trunk:
            raise SpecError(f"trunk_child: tag {spec.trunk.tag} is endpoint {other.endpoint_id}'s there")
        routes = {route.destination for route in spec.routes} & {route.destination for route in other.routes}
        if routes:
            raise SpecError(f"routes: {min(map(str, routes))} is already routed over endpoint {other.endpoint_id}")


def check_trunk(spec: InterfaceSpec, parent: InterfaceSpec) -> None:
    """Raises SpecError when an interface cannot carry one that it is to carry."""
    if parent.trunk is not None:
        raise SpecError(
            f"trunk_child: endpoint {parent.endpoint_id} goes over {parent.trunk.parent_id} itself: name that,"
            " tags are not nested"
        )
    if spec.wants_ipv6 and parent.mtu < MTU_MIN_IPV6:
        raise SpecError(
            f"trunk_child: the interface of endpoint {parent.endpoint_id} has an MTU of {parent.mtu}, too small for"
            f" IPv6, which needs {MTU_MIN_IPV6}"
        )


def _trunk(endpoint_id: str, message: TrunkChild | None) -> TrunkSpec | None:
    if message is None:
        return None
    if not _ENDPOINT_ID.fullmatch(message.parent_endpoint_id):
        raise SpecError("trunk_child: parent_endpoint_id must be 1 to 64 characters of [a-zA-Z0-9_.-]")
    if message.parent_endpoint_id == endpoint_id:
        raise SpecError("trunk_child: an endpoint cannot carry itself")
    if message.tag not in TAGS:
        raise SpecError(f"trunk_child: tag {message.tag} is not within 1 to 4094")
    return TrunkSpec(message.parent_endpoint_id, message.tag)


def _check_name(field: str, text: str) -> None:
    if len(text.encode()) > 253 or any(character.isspace() or not character.isprintable() for character in text):
        raise SpecError(f"{field} must be at most 253 bytes, without spaces or control characters")


def _parse(field: str, text: str, parser: Callable[[str], _T]) -> _T:
    try:
        return parser(text)
    except SpecError as error:
        raise SpecError(f"{field}: {error}") from None
    except ValueError:
        wanted = "an address with prefix length, such as 172.18.0.2/16" if parser is _address else "an IP address"
        raise SpecError(f"{field}: {text[:80]!r} is not {wanted}") from None


def _ip(text: str) -> Ip:
    if "%" in text:
        raise ValueError(text)
    return parse_ip(text)


def _address(text: str) -> IpInterface:
    if "/" not in text or "%" in text or not text.rpartition("/")[2].isdecimal():
        raise ValueError(text)
    address = parse_interface(text)
    ip, net = address.ip, address.network
    if ip.is_multicast or ip.is_loopback or ip.is_unspecified or net.prefixlen == 0:
        raise SpecError(f"{text} cannot be an interface's address")
    if ip.version == 4 and net.prefixlen < 31 and ip in (net.network_address, net.broadcast_address):
        raise SpecError(f"{text} is its subnet's network or broadcast address")
    return address


def _check_mtu(mtu: int, ipv6: bool) -> None:
    if not MTU_MIN <= mtu <= MTU_MAX:
        raise SpecError(f"mtu {mtu} is not within {MTU_MIN} to {MTU_MAX}, which is what a TAP can have")
    if ipv6 and mtu < MTU_MIN_IPV6:
        raise SpecError(f"mtu {mtu} is too small for IPv6, which needs {MTU_MIN_IPV6}")


def _check_next_hop(what: str, hop: Ip, addresses: tuple[IpInterface, ...]) -> None:
    if hop.is_multicast or hop.is_unspecified or hop.is_loopback:
        raise SpecError(f"{what} {hop} cannot be a next hop")
    if any(hop == address.ip for address in addresses):
        raise SpecError(f"{what} {hop} is the interface's own address")
    if hop.version == 6 and hop.is_link_local:
        reachable = any(address.version == 6 for address in addresses)
    else:
        reachable = any(hop in address.network for address in addresses if address.version == hop.version)
    if not reachable:
        raise SpecError(f"{what} {hop} is not on the link: none of the addresses' subnets has it")


def _route(message: Route, addresses: tuple[IpInterface, ...]) -> RouteSpec:
    text = message.destination
    try:
        if "/" not in text or "%" in text:
            raise ValueError(text)
        destination = network(text)
    except ValueError:
        raise SpecError(
            f"routes: {text[:80]!r} is not a destination in CIDR form, such as 10.0.0.0/8 (no host bits set)"
        ) from None
    if destination.prefixlen == 0:
        raise SpecError("routes: the default route is set by gateways, not by routes")
    if destination.is_multicast or destination.is_loopback:
        raise SpecError(f"routes: {destination} cannot be routed over an interface")
    if any(destination == address.network for address in addresses):
        raise SpecError(f"routes: {destination} is the interface's own subnet")
    if not any(address.version == destination.version for address in addresses):
        raise SpecError(f"routes: {destination} needs an IPv{destination.version} address on the interface")
    if not message.gateway:
        return RouteSpec(destination, None)
    gateway = _parse("routes", message.gateway, _ip)
    if gateway.version != destination.version:
        raise SpecError(f"routes: {destination} has the gateway {gateway} of the other family")
    _check_next_hop("routes: the gateway", gateway, addresses)
    return RouteSpec(destination, gateway)


def _check_servers(servers: tuple[Ip, ...], addresses: tuple[IpInterface, ...]) -> None:
    if len(set(servers)) != len(servers):
        raise SpecError("dns_servers has one address twice")
    for server in servers:
        if server.is_multicast or server.is_unspecified or server.is_loopback:
            raise SpecError(f"dns_servers: {server} cannot be a server on a network")
        if any(server == address.ip for address in addresses):
            raise SpecError(f"dns_servers: {server} is the interface's own address")
        if not any(server.version == address.version for address in addresses):
            raise SpecError(f"dns_servers: {server} needs an IPv{server.version} address on the interface")

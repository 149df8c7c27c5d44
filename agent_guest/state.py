"""What the kernel has: links, addresses and routes as plain values, so that planning needs no kernel."""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import (
    IPv4Address,
    IPv4Interface,
    IPv4Network,
    IPv6Address,
    IPv6Interface,
    IPv6Network,
    ip_address,
    ip_interface,
    ip_network,
)
from typing import TypeAlias

Ip: TypeAlias = IPv4Address | IPv6Address
IpInterface: TypeAlias = IPv4Interface | IPv6Interface
Network: TypeAlias = IPv4Network | IPv6Network

parse_ip = ip_address
parse_interface = ip_interface
network = ip_network

MAIN_TABLE, NAMES_TABLE = 254, 84
"""RT_TABLE_MAIN, and the table of the routes to DNS servers: `ip route` is to show what it shows with Docker."""
ALIAS_PREFIX = "taploom:"
"""What the alias (IFLA_IFALIAS) of every interface of the agent starts with; the endpoint's id follows."""


@dataclass(frozen=True, slots=True)
class LinkState:
    """A link. ``up`` is the administrative state, ``carrier`` the lower layer's."""

    index: int
    name: str
    mac: str
    mtu: int
    up: bool
    carrier: bool = False
    alias: str = ""
    kind: str = ""
    over: int = 0
    """Of a VLAN interface: the index of the link that it is over."""
    tag: int = 0
    """Of a VLAN interface."""

    @property
    def endpoint_id(self) -> str:
        """The endpoint that the link was made for; empty when it is not the agent's."""
        return self.alias.removeprefix(ALIAS_PREFIX) if self.alias.startswith(ALIAS_PREFIX) else ""


@dataclass(frozen=True, slots=True)
class AddressState:
    """An address of a link. ``failed``: duplicate address detection refused it."""

    index: int
    address: IpInterface
    failed: bool = False


@dataclass(frozen=True, slots=True)
class RouteState:
    """A unicast route. ``metric`` 0 is IPv4's default; IPv6's is 1024."""

    destination: Network
    gateway: Ip | None
    index: int
    metric: int
    protocol: int
    table: int = MAIN_TABLE


@dataclass(frozen=True, slots=True)
class KernelState:
    """All of it."""

    links: dict[int, LinkState]
    addresses: list[AddressState]
    routes: list[RouteState]

    def by_name(self, name: str) -> LinkState | None:
        return next((link for link in self.links.values() if link.name == name), None)

    def by_endpoint(self, endpoint_id: str) -> LinkState | None:
        return next((link for link in self.links.values() if link.endpoint_id == endpoint_id), None)

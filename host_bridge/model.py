"""The bridge's records: what the database holds, as immutable values."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field

IPV4 = 4
IPV6 = 6


@dataclass(frozen=True, slots=True)
class SubnetRecord:
    """A network's subnet of one family, with its gateway (no prefix length)."""

    family: int
    subnet: str
    gateway: str


@dataclass(frozen=True, slots=True)
class NetworkRecord:
    """A network. `subnets` are ordered IPv4 first; `mtu` is in bytes; `active` is False until the helper has it."""

    id: str
    name: str
    internal: bool
    mtu: int
    created_at: datetime.datetime
    active: bool
    dns_server: str
    gateway_mac: str
    dns_mac: str
    subnets: tuple[SubnetRecord, ...] = field(default=())

    def subnet(self, family: int) -> SubnetRecord | None:
        """The subnet of a family (4 or 6), or None."""
        return next((subnet for subnet in self.subnets if subnet.family == family), None)


@dataclass(frozen=True, slots=True)
class GuestRecord:
    """A guest: a VM with an agent at `address` (control) and `data_address` (data links)."""

    id: str
    name: str
    address: str
    data_address: str
    created_at: datetime.datetime


@dataclass(frozen=True, slots=True)
class EndpointRecord:
    """A guest's place on a network. `addresses` have no prefix length, IPv4 first; `active` is False until the link
    has been up once."""

    id: str
    network_id: str
    guest_id: str
    interface_name: str
    mac_address: str
    gateway_priority: int
    created_at: datetime.datetime
    active: bool
    addresses: tuple[str, ...] = field(default=())
    aliases: tuple[str, ...] = field(default=())

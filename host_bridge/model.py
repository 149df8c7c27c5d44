"""The bridge's records: what the database holds, as immutable values; and what callers ask for."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from host_bridge.addressing import Addressing
from host_bridge.errors import EndpointOptionError
from host_bridge.vlan import Carried, VlanPlace, carried_of, is_carried, place_of

IPV4 = 4
IPV6 = 6

# Docker's names: the driver of networks that the helper makes, and those of the two that are names only.
BRIDGE_DRIVER = "bridge"
HOST_DRIVER = "host"
NULL_DRIVER = "null"

DEFAULT_NETWORK = "bridge"
PREDEFINED = ("bridge", "host", "none")

# Options of Docker's bridge driver that change what the fabric does.
OPTION_ICC = "com.docker.network.bridge.enable_icc"
OPTION_MASQUERADE = "com.docker.network.bridge.enable_ip_masquerade"
OPTION_HOST_BINDING = "com.docker.network.bridge.host_binding_ipv4"
OPTION_MTU = "com.docker.network.driver.mtu"
OPTION_PREFIX = "com.docker.network.container_iface_prefix"
# And one of its endpoints'.
OPTION_INTERFACE = "com.docker.network.endpoint.ifname"

# What addresses of guests without an agent begin with.
QEMU, QEMU_SERVER = "qemu:", "qemu-server:"

_TRUE = frozenset({"1", "t", "T", "TRUE", "true", "True"})
_FALSE = frozenset({"0", "f", "F", "FALSE", "false", "False"})


def parse_bool(text: str) -> bool | None:
    """A boolean option's value as Go's strconv.ParseBool reads it; None when it is none."""
    return True if text in _TRUE else False if text in _FALSE else None


@dataclass(frozen=True, slots=True)
class SubnetRecord:
    """A network's subnet of one family, with its gateway (no prefix length).

    `ip_range` (CIDR) is where addresses that nobody asks for are taken from, empty: the whole subnet; `auxiliary` are
    (name, address) that are never given out. `configured`: the user gave the subnet; `gateway_given`: and the gateway.
    One that is only echoed (`NetworkRecord.idle_subnets`) may have no gateway.
    """

    family: int
    subnet: str
    gateway: str
    ip_range: str = ""
    auxiliary: tuple[tuple[str, str], ...] = ()
    configured: bool = True
    gateway_given: bool = False


@dataclass(frozen=True, slots=True)
class NetworkRecord:
    """A network. `subnets` are ordered IPv4 first; `mtu` is in bytes; `active` is False until the helper has it.

    Attributes:
        dns_server, dns_mac: where its names are answered; empty where nobody has a name.
        driver: `bridge`; `host` and `null` are names only: the helper never hears of them.
        predefined: bridge, host or none.
        labels, options, ipam_driver, ipam_options, attachable, ingress: as they were given.
        config_only: not a network but what others are made from; `config_from` names what this one was made from.
        idle_subnets: subnets that are only echoed: of a family that is not enabled, or of a configuration.
        uplink_addresses: the router's addresses on the helper's uplink in CIDR form, one per family; none: no egress.
        uplink_mac: its MAC address there, or empty.
    """

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
    driver: str = BRIDGE_DRIVER
    predefined: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    ipam_driver: str = "default"
    ipam_options: Mapping[str, str] | None = None
    attachable: bool = False
    ingress: bool = False
    config_only: bool = False
    config_from: str = ""
    enable_ipv4: bool = True
    enable_ipv6: bool = False
    idle_subnets: tuple[SubnetRecord, ...] = ()
    uplink_addresses: tuple[str, ...] = ()
    uplink_mac: str = ""

    def subnet(self, family: int) -> SubnetRecord | None:
        """The subnet of a family (4 or 6), or None."""
        return next((subnet for subnet in self.subnets if subnet.family == family), None)

    @property
    def switched(self) -> bool:
        """True when the helper makes the network; False for host, none and configurations."""
        return self.driver == BRIDGE_DRIVER and not self.config_only

    @property
    def default_bridge(self) -> bool:
        """True for the predefined network `bridge`, on which nobody has a name."""
        return self.predefined and self.driver == BRIDGE_DRIVER

    @property
    def isolated(self) -> bool:
        """True when its guests do not reach each other (enable_icc=false)."""
        return parse_bool(self.options.get(OPTION_ICC, "")) is False

    @property
    def masquerade(self) -> bool:
        """True when packets leave with the helper's address (enable_ip_masquerade, the default)."""
        return parse_bool(self.options.get(OPTION_MASQUERADE, "")) is not False

    @property
    def addressing(self) -> Addressing:
        """How its hosts come to addresses, and its gateway modes."""
        return Addressing(self.options)

    @property
    def vlan(self) -> VlanPlace | None:
        """The VLAN that the network is; None: it is none."""
        return place_of(self.options) if self.switched else None

    @property
    def has_router(self) -> bool:
        """True when the helper routes between the network and what is outside; from there published ports are reached.
        On a VLAN somebody else does."""
        return self.switched and not self.internal and self.vlan is None

    @property
    def host_binding(self) -> str:
        """The host's address that published ports are bound to unless one is given; empty: all."""
        return self.options.get(OPTION_HOST_BINDING, "")


@dataclass(frozen=True, slots=True)
class GuestSettings:
    """What a container's names are resolved with.

    Attributes:
        hostname, domainname: its own; empty: the guest has no name of its own in /etc/hosts.
        dns: servers for names that no network knows; none: the bridge's.
        dns_search, dns_options: lines of /etc/resolv.conf.
        extra_hosts: (name, address) for /etc/hosts; several names for an address are separated by spaces.
        card_mac: the MAC address of the network card of a guest without an agent.
        card_qmp: the path of the Unix socket at which its QEMU takes commands; empty: none.
    """

    hostname: str = ""
    domainname: str = ""
    dns: tuple[str, ...] = ()
    dns_search: tuple[str, ...] = ()
    dns_options: tuple[str, ...] = ()
    extra_hosts: tuple[tuple[str, str], ...] = ()
    card_mac: str = ""
    card_qmp: str = ""


@dataclass(frozen=True, slots=True)
class CardPlace:
    """Where the network card of a guest without an agent is plugged in: a Unix socket with the framing of QEMU.

    `qemu_listens`: QEMU listens there, and the bridge connects; else the other way round.
    """

    path: str
    qemu_listens: bool

    def __str__(self) -> str:
        return f"{QEMU_SERVER if self.qemu_listens else QEMU}{self.path}"


@dataclass(frozen=True, slots=True)
class GuestRecord:
    """A guest: a VM with an agent at `address` (control) and `data_address` (data links), or with a card (`card`)."""

    id: str
    name: str
    address: str
    data_address: str
    created_at: datetime.datetime
    settings: GuestSettings = field(default_factory=GuestSettings)

    @property
    def card(self) -> CardPlace | None:
        """Where the network card of a guest without an agent is; None: it has an agent."""
        for prefix in (QEMU, QEMU_SERVER):
            if self.address.startswith(prefix):
                return CardPlace(self.address.removeprefix(prefix), prefix == QEMU_SERVER)
        return None


@dataclass(frozen=True, slots=True)
class EndpointRecord:
    """A guest's place on a network. `addresses` have no prefix length, IPv4 first; `active` is False until the link
    has been up once.

    Attributes:
        static_addresses: those of the addresses that were asked for.
        static_mac: the MAC address was asked for.
        links: (alias, other guest's name): names that only this guest has.
        driver_options: as they were given.
        names: further names of the guest on the network, besides its name, short id, hostname and aliases.
    """

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
    static_addresses: tuple[str, ...] = ()
    static_mac: bool = False
    links: tuple[tuple[str, str], ...] = ()
    driver_options: Mapping[str, str] = field(default_factory=dict)
    names: tuple[str, ...] = ()

    @property
    def carried(self) -> Carried | None:
        """The network, by name, over whose endpoint of the guest this one goes, and its tag; None: it has a link."""
        if not is_carried(self.driver_options):
            return None
        with contextlib.suppress(EndpointOptionError):  # kept from before it meant something
            return carried_of(self.driver_options)
        return None


@dataclass(frozen=True, slots=True)
class ContainerRecord:
    """A container, whether it runs or not. While it runs, the guest of the same id and name is its place in the fabric.

    `config` and `state` are JSON objects whose content is the container manager's.
    """

    id: str
    name: str
    created_at: datetime.datetime
    config: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class SubnetOptions:
    """A subnet that a network is to have. Empty `subnet`: the next free one.

    `auxiliary` maps names to addresses that no guest gets.
    """

    subnet: str = ""
    gateway: str = ""
    ip_range: str = ""
    auxiliary: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkOptions:
    """How a network is to be.

    Attributes:
        subnets: at most one per family. None for a family that is enabled: the next free default one.
        internal: no way out of the network.
        mtu: bytes; 0: what the driver option says, or 1500.
        enable_ipv4, enable_ipv6: the families; a family of which a subnet is given is enabled.
        labels, options: echoed; those options that are known (see `NetworkRecord`) change what the fabric does.
        config_only, config_from: see `NetworkRecord`.
    """

    subnets: Sequence[SubnetOptions] = ()
    internal: bool = False
    mtu: int = 0
    enable_ipv4: bool = True
    enable_ipv6: bool = False
    labels: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, str] = field(default_factory=dict)
    driver: str = BRIDGE_DRIVER
    attachable: bool = False
    ingress: bool = False
    config_only: bool = False
    config_from: str = ""
    ipam_driver: str = "default"
    ipam_options: Mapping[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EndpointOptions:
    """How a guest is to be connected.

    Attributes:
        addresses: addresses to have, at most one per family, only on networks whose subnet was given. None for a
            family: the lowest free one.
        aliases: further names, that others see too.
        gateway_priority: the highest of a guest's networks has the default route.
        mac_address: empty: one that follows from the address.
        links: (alias, other guest's name): names that only this guest has for others on the network.
        driver_options: echoed.
        names: further names that are not shown as aliases.
    """

    addresses: Sequence[str] = ()
    aliases: Sequence[str] = ()
    gateway_priority: int = 0
    mac_address: str = ""
    links: Sequence[tuple[str, str]] = ()
    driver_options: Mapping[str, str] = field(default_factory=dict)
    names: Sequence[str] = ()

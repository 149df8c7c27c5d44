"""Descriptions of networks and endpoints, checked: what passes here can be given to OVN and dnsmasq as it is."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from agent_helper.errors import InvalidSpecError
from agent_helper.ids import check_id
from agent_helper.policy import MemberSpec, parse_member
from agent_helper.qos import QosSpec, parse_qos
from agent_helper.vlan import ChildSpec, VlanSpec, parse_child, parse_vlan
from taploom.contracts.taploom.helper.v1 import (
    Dhcp,
    Endpoint,
    GatewayMode,
    Network,
    OpenPort,
    PortProtocol,
    RouterAdvertisementMode,
    RouterAdvertisements,
    RouterPreference,
    Uplink,
)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Interface = ipaddress.IPv4Interface | ipaddress.IPv6Interface
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,255}", re.ASCII)
_MAC = re.compile(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", re.ASCII)
_LABEL = re.compile(r"[a-zA-Z0-9_]([a-zA-Z0-9_-]{0,61}[a-zA-Z0-9_])?", re.ASCII)
MAX_NAMES = 256
MAX_OPEN_PORTS = 1024
MAX_DNS_SERVERS = 8
DEFAULT_LEASE = 3600
_LEASES = range(60, 2**31)
_INTERVALS = range(4, 1801)  # RFC 4861, 6.2.1: MaxRtrAdvInterval
_PROTOCOLS = {PortProtocol.TCP: "tcp", PortProtocol.UDP: "udp"}


@dataclass(frozen=True)
class DhcpSpec:
    """What endpoints are told by DHCP beside their addresses. `lease` is in seconds."""

    lease: int = DEFAULT_LEASE
    dns_servers: tuple[Address, ...] = ()
    domain: str = ""


@dataclass(frozen=True)
class RouterSpec:
    """What the gateway says of itself in IPv6. `interval` is in seconds, 0: only who asks is answered."""

    mode: RouterAdvertisementMode = RouterAdvertisementMode.UNSPECIFIED
    interval: int = 0
    preference: RouterPreference = RouterPreference.UNSPECIFIED
    dns_server: ipaddress.IPv6Address | None = None
    domain: str = ""


@dataclass(frozen=True)
class NetworkSpec:
    """A network. `subnets` and `gateways` are in the same order, at most one per family; `modes` are the families'
    gateway modes where they are not NAT. The gateways of a VLAN are somebody else there."""

    network_id: str
    name: str
    subnets: tuple[IPNetwork, ...]
    gateways: tuple[Address, ...]
    gateway_mac: str
    internal: bool
    mtu: int
    dns_servers: tuple[Address, ...]
    dns_mac: str
    uplink_addresses: tuple[Interface, ...]
    uplink_mac: str
    endpoints_isolated: bool
    masquerade_disabled: bool
    modes: tuple[tuple[int, GatewayMode], ...] = ()
    dhcp: DhcpSpec = field(default_factory=DhcpSpec)
    router: RouterSpec = field(default_factory=RouterSpec)
    vlan: VlanSpec | None = None

    @property
    def gateway_interfaces(self) -> list[str]:
        """The gateways that are ours with their subnets' prefix lengths, as `10.0.0.1/24`."""
        if self.vlan is not None:
            return []
        return [
            f"{gateway}/{subnet.prefixlen}"
            for gateway, subnet in zip(self.gateways, self.subnets, strict=True)
            if self.mode(subnet.version) != GatewayMode.ISOLATED
        ]

    def mode(self, version: int) -> GatewayMode:
        """What the gateway does in a family, 4 or 6."""
        return dict(self.modes).get(version, GatewayMode.NAT)

    def masquerades(self, version: int) -> bool:
        """Whether connections to the outside leave with the helper's address."""
        return not self.masquerade_disabled and self.mode(version) in (GatewayMode.NAT, GatewayMode.NAT_UNPROTECTED)

    def gateway(self, version: int) -> Address | None:
        """The gateway of a family, or None where there is none."""
        if self.mode(version) == GatewayMode.ISOLATED:
            return None
        return next((gateway for gateway in self.gateways if gateway.version == version), None)

    def subnet(self, version: int) -> IPNetwork | None:
        """The subnet of a family, or None."""
        return next((subnet for subnet in self.subnets if subnet.version == version), None)


@dataclass(frozen=True)
class UplinkSpec:
    """The network on which the helper's kernel and the networks' routers meet. `addresses` are the kernel's.

    `mtu` is that of the way on from there, in bytes.
    """

    addresses: tuple[Interface, ...]
    mac_address: str
    host_addresses: tuple[Address, ...]
    mtu: int = 1500

    @property
    def stand_ins(self) -> tuple[Address, ...]:
        """Addresses that nobody has, one per family: each network's router sends there what is for its own gateway.

        They are the last of the uplink's subnets (but for the broadcast address).
        """
        return tuple(address.network.broadcast_address - 1 for address in self.addresses)


@dataclass(frozen=True)
class Leg:
    """Where a network's router hangs on the uplink, in one family."""

    address: Interface
    kernel: Address
    stand_in: Address
    subnet: IPNetwork
    gateway: Address


def legs(network: NetworkSpec, uplink: UplinkSpec | None) -> tuple[Leg, ...]:
    """The network's legs on the uplink; none when it is internal, or has no address on that uplink."""
    if uplink is None or network.internal or network.vlan is not None or not network.uplink_mac:
        return ()
    found: list[Leg] = []
    for subnet, gateway in zip(network.subnets, network.gateways, strict=True):
        for kernel, stand_in in zip(uplink.addresses, uplink.stand_ins, strict=True):
            found += [
                Leg(address, kernel.ip, stand_in, subnet, gateway)
                for address in network.uplink_addresses
                if subnet.version == address.version == kernel.version
                and address.network == kernel.network
                and address.ip not in (kernel.ip, stand_in)
            ]
    return tuple(found)


@dataclass(frozen=True)
class EndpointSpec:
    """An endpoint. `names` are those that DNS can carry, the container's first."""

    endpoint_id: str
    network_id: str
    mac_address: str
    addresses: tuple[Address, ...]
    names: tuple[str, ...]
    disabled: bool
    policy: MemberSpec = field(default_factory=MemberSpec)
    dhcp: bool = False
    open_ports: tuple[tuple[str, int], ...] = ()  # (tcp or udp, port)
    qos: QosSpec = field(default_factory=QosSpec)
    child: ChildSpec | None = None

    @property
    def port_addresses(self) -> str:
        """MAC and addresses in the form of OVN's `addresses` and `port_security` (ovn-nb(5)).

        With IPv6, the link-local address of the MAC address is among them: port security lets it pass by itself, but in
        OVN 23.03 looks for a hop limit of 225 in advertisements of it, and drops them.
        """
        addresses = [*map(str, self.addresses)]
        if any(address.version == 6 for address in self.addresses):
            addresses.append(str(link_local(self.mac_address)))
        return " ".join(dict.fromkeys([self.mac_address, *addresses]))


def link_local(mac: str) -> ipaddress.IPv6Address:
    """The link-local address that belongs to a MAC address (RFC 4291, appendix A)."""
    octets = bytearray(bytes.fromhex(mac.replace(":", "")))
    octets[0] ^= 2
    return ipaddress.IPv6Address(b"\xfe\x80" + bytes(6) + bytes(octets[:3]) + b"\xff\xfe" + bytes(octets[3:]))


def parse_network(message: Network) -> NetworkSpec:
    """Checks a network.

    Raises:
        InvalidSpecError: says which field is wrong and what it must be.
    """
    network_id = check_id("network_id", message.network_id)
    if not _NAME.fullmatch(message.name) or not _servable(message.name):
        raise InvalidSpecError(
            f"name {_show(message.name)} must be labels of 1 to 63 characters of [a-zA-Z0-9_-], with dots between"
        )
    subnets = tuple(_subnet(text) for text in message.subnets)
    if not subnets:
        raise InvalidSpecError("subnets must have at least one subnet")
    _one_per_family("subnets", subnets)
    if len(message.gateways) != len(subnets):
        raise InvalidSpecError(f"gateways must be one per subnet: {len(subnets)}, not {len(message.gateways)}")
    gateways = tuple(_address("gateways", text) for text in message.gateways)
    for gateway, subnet in zip(gateways, subnets, strict=True):
        _host_address("gateway", gateway, [subnet])
    gateway_mac = _mac("gateway_mac", message.gateway_mac)
    least = 1280 if any(subnet.version == 6 for subnet in subnets) else 68
    if not least <= message.mtu <= 65535:
        raise InvalidSpecError(f"mtu {message.mtu} must be {least} to 65535")
    dns_servers = tuple(_address("dns_servers", text) for text in message.dns_servers)
    _one_per_family("dns_servers", dns_servers)
    for server in dns_servers:
        if any(server in subnet for subnet in subnets):
            raise InvalidSpecError(f"dns_servers {server} must be outside the subnets")
        if server.is_multicast or server.is_unspecified or server.is_loopback:
            raise InvalidSpecError(f"dns_servers {server} must be a unicast address")
    dns_mac = ""
    if dns_servers:
        dns_mac = _mac("dns_mac", message.dns_mac)
        if dns_mac == gateway_mac:
            raise InvalidSpecError(f"dns_mac {dns_mac} must not be the gateway's")
    uplink_addresses = _interfaces("uplink_addresses", message.uplink_addresses)
    return NetworkSpec(
        network_id,
        message.name,
        subnets,
        gateways,
        gateway_mac,
        message.internal,
        message.mtu,
        dns_servers,
        dns_mac,
        uplink_addresses,
        _mac("uplink_mac", message.uplink_mac) if uplink_addresses else "",
        message.endpoints_isolated,
        message.masquerade_disabled,
        _modes(message),
        _dhcp(message.dhcp or Dhcp()),
        _router(message.router_advertisements or RouterAdvertisements(), subnets),
        parse_vlan(message.vlan),
    )


def _modes(message: Network) -> tuple[tuple[int, GatewayMode], ...]:
    found: list[tuple[int, GatewayMode]] = []
    for version, mode in ((4, message.gateway_mode_ipv4), (6, message.gateway_mode_ipv6)):
        chosen = _known(f"gateway_mode_ipv{version}", mode, GatewayMode)
        if chosen == GatewayMode.ISOLATED and not message.internal:
            raise InvalidSpecError(f"gateway_mode_ipv{version} can be ISOLATED only where the network is internal")
        if chosen != GatewayMode.UNSPECIFIED:
            found.append((version, chosen))
    return tuple(found)


def _dhcp(message: Dhcp) -> DhcpSpec:
    if message.lease_seconds and message.lease_seconds not in _LEASES:
        raise InvalidSpecError(f"dhcp: lease_seconds {message.lease_seconds} must be 60 to 2147483647, or 0")
    if len(message.dns_servers) > MAX_DNS_SERVERS:
        raise InvalidSpecError(f"dhcp: dns_servers must be at most {MAX_DNS_SERVERS}, not {len(message.dns_servers)}")
    servers = tuple(_unicast("dhcp: dns_servers", text) for text in message.dns_servers)
    return DhcpSpec(message.lease_seconds or DEFAULT_LEASE, servers, _domain("dhcp: domain", message.domain))


def _router(message: RouterAdvertisements, subnets: Iterable[IPNetwork]) -> RouterSpec:
    mode = _known("router_advertisements: mode", message.mode, RouterAdvertisementMode)
    prefix = next((subnet.prefixlen for subnet in subnets if subnet.version == 6), 64)
    if mode in (RouterAdvertisementMode.SLAAC, RouterAdvertisementMode.STATELESS) and prefix != 64:
        raise InvalidSpecError(f"router_advertisements: mode {mode.name} needs an IPv6 subnet of 64 bits, not {prefix}")
    if message.interval_seconds and message.interval_seconds not in _INTERVALS:
        raise InvalidSpecError(
            f"router_advertisements: interval_seconds {message.interval_seconds} must be 4 to 1800, or 0"
        )
    server = _unicast("router_advertisements: dns_server", message.dns_server) if message.dns_server else None
    if isinstance(server, ipaddress.IPv4Address):
        raise InvalidSpecError(f"router_advertisements: dns_server {server} must be an IPv6 address")
    return RouterSpec(
        mode,
        message.interval_seconds,
        _known("router_advertisements: preference", message.preference, RouterPreference),
        server,
        _domain("router_advertisements: domain", message.domain),
    )


E = TypeVar("E", GatewayMode, RouterAdvertisementMode, RouterPreference)


def _known(what: str, value: E, kind: type[E]) -> E:
    """The value, when this agent knows it."""
    if value.name is None:
        raise InvalidSpecError(f"{what} {int(value)} is not known to this agent: update it")
    return kind(value)


def _unicast(what: str, text: str) -> Address:
    address = _address(what, text)
    if address.is_multicast or address.is_unspecified or address.is_loopback:
        raise InvalidSpecError(f"{what} {address} must be a unicast address")
    return address


def _domain(what: str, text: str) -> str:
    """A domain that can stand between the quotes of OVN's options."""
    if text and (len(text) > 253 or not all(_LABEL.fullmatch(label) for label in text.split("."))):
        raise InvalidSpecError(f"{what} {_show(text)} must be labels of 1 to 63 letters, digits, '_' and '-'")
    return text


def _open_ports(messages: Iterable[OpenPort]) -> tuple[tuple[str, int], ...]:
    found: dict[tuple[str, int], None] = {}
    for message in messages:
        protocol = _PROTOCOLS.get(message.protocol)
        if protocol is None:
            raise InvalidSpecError(f"open_ports: protocol {int(message.protocol)} must be TCP or UDP")
        if not 1 <= message.port <= 65535:
            raise InvalidSpecError(f"open_ports: port {message.port} must be 1 to 65535")
        found[protocol, message.port] = None
    if len(found) > MAX_OPEN_PORTS:
        raise InvalidSpecError(f"open_ports must be at most {MAX_OPEN_PORTS}, not {len(found)}")
    return tuple(found)


def parse_uplink(message: Uplink) -> UplinkSpec | None:
    """Checks an uplink; None when it has no addresses: there is to be none.

    Raises:
        InvalidSpecError: says which field is wrong and what it must be.
    """
    addresses = _interfaces("addresses", message.addresses)
    for address in addresses:
        if address.network.num_addresses < 8:
            raise InvalidSpecError(f"addresses {address}: the uplink's subnet has no room for networks' routers")
        _host_address("addresses", address.ip, [address.network])
        if address.ip == address.network.broadcast_address - 1:
            raise InvalidSpecError(f"addresses {address}: the last address of the uplink's subnet must be left free")
    host_addresses = tuple(_address("host_addresses", text) for text in message.host_addresses)
    if not addresses:
        return None
    return UplinkSpec(addresses, _mac("mac_address", message.mac_address), host_addresses)


def parse_endpoint(message: Endpoint) -> EndpointSpec:
    """Checks an endpoint by itself; `check_in_network` checks it against its network.

    Raises:
        InvalidSpecError: says which field is wrong and what it must be.
    """
    endpoint_id = check_id("endpoint_id", message.endpoint_id)
    network_id = check_id("network_id", message.network_id)
    addresses = tuple(_address("addresses", text) for text in message.addresses)
    if not addresses:
        raise InvalidSpecError("addresses must have at least one address")
    _one_per_family("addresses", addresses)
    if len(message.names) > MAX_NAMES:
        raise InvalidSpecError(f"names must be at most {MAX_NAMES}, not {len(message.names)}")
    for name in message.names:
        if not _NAME.fullmatch(name):
            raise InvalidSpecError(f"names: {_show(name)} must be 1 to 255 characters of [a-zA-Z0-9_.-]")
    child = parse_child(message.trunk_child)
    if child is not None and child.parent_id == endpoint_id:
        raise InvalidSpecError(f"trunk_child: endpoint {endpoint_id} cannot carry itself")
    return EndpointSpec(
        endpoint_id,
        network_id,
        _mac("mac_address", message.mac_address),
        addresses,
        tuple(dict.fromkeys(name for name in message.names if _servable(name))),
        message.disabled,
        parse_member(message.policy),
        message.dhcp,
        _open_ports(message.open_ports),
        parse_qos(message.qos),
        child,
    )


def check_in_network(endpoint: EndpointSpec, network: NetworkSpec) -> None:
    """Checks that the endpoint's addresses fit its network.

    Raises:
        InvalidSpecError: an address is outside the subnets or the gateway's, or the MAC address is the network's.
    """
    for address in endpoint.addresses:
        _host_address("addresses", address, network.subnets)
        if address in network.gateways:
            raise InvalidSpecError(f"addresses {address} is the gateway of network {network.network_id}")
    if endpoint.mac_address in (network.gateway_mac, network.dns_mac):
        raise InvalidSpecError(f"mac_address {endpoint.mac_address} is the network's own")


def _interfaces(what: str, texts: Iterable[str]) -> tuple[Interface, ...]:
    found: list[Interface] = []
    for text in texts:
        try:
            if "/" not in text:
                raise ValueError("no prefix length")
            interface = ipaddress.ip_interface(text)
        except ValueError:
            raise InvalidSpecError(f"{what} {_show(text)} is not an address in CIDR form") from None
        if isinstance(interface, ipaddress.IPv6Interface) and interface.scope_id is not None:
            raise InvalidSpecError(f"{what} {_show(text)} must not have a zone")
        if interface.is_multicast or interface.is_loopback or interface.is_unspecified:
            raise InvalidSpecError(f"{what} {interface} must be a unicast address")
        found.append(interface)
    _one_per_family(what, found)
    return tuple(found)


def _subnet(text: str) -> IPNetwork:
    try:
        if "/" not in text:
            raise ValueError("no prefix length")
        subnet = ipaddress.ip_network(text)
    except ValueError:
        raise InvalidSpecError(f"subnets {_show(text)} is not a subnet in CIDR form without host bits") from None
    if subnet.is_multicast or subnet.is_loopback or subnet.is_unspecified or subnet.prefixlen == 0:
        raise InvalidSpecError(f"subnets {subnet} is not a unicast subnet")
    if subnet.prefixlen > subnet.max_prefixlen - 1:
        raise InvalidSpecError(f"subnets {subnet} has no room for an endpoint beside the gateway")
    return subnet


def _address(what: str, text: str) -> Address:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        raise InvalidSpecError(f"{what} {_show(text)} is not an IP address without prefix length") from None
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
        raise InvalidSpecError(f"{what} {_show(text)} must not have a zone")
    return address


def _host_address(what: str, address: Address, subnets: Iterable[IPNetwork]) -> None:
    subnet = next((subnet for subnet in subnets if address in subnet), None)
    if subnet is None:
        raise InvalidSpecError(f"{what} {address} is outside {', '.join(map(str, subnets))}")
    if subnet.prefixlen < subnet.max_prefixlen - 1 and (
        address == subnet.network_address or (address.version == 4 and address == subnet.broadcast_address)
    ):
        raise InvalidSpecError(f"{what} {address} is the network's or the broadcast address of {subnet}")


def _one_per_family(what: str, values: Iterable[Address | IPNetwork | Interface]) -> None:
    versions = [value.version for value in values]
    if len(versions) != len(set(versions)):
        raise InvalidSpecError(f"{what} must be at most one per family")


def _mac(what: str, text: str) -> str:
    mac = text.lower()
    if not _MAC.fullmatch(mac):
        raise InvalidSpecError(f"{what} {_show(text)} must be a MAC address like 02:42:ac:11:00:02")
    if int(mac[:2], 16) & 1 or mac == "00:00:00:00:00:00":
        raise InvalidSpecError(f"{what} {mac} must be a unicast MAC address")
    return mac


def _servable(name: str) -> bool:
    """Whether DNS can carry the name (RFC 1035, 2.3.4)."""
    return len(name) <= 253 and all(1 <= len(label) <= 63 for label in name.split("."))


def _show(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")

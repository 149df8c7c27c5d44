"""How a network's hosts come to addresses and its packets get out: Docker's gateway modes, router advertisements, DHCP.

All of it is driver options of a network, kept as they were given; here they are read and checked. The keys and what
they may be are in docs/ipv6.md and docs/dhcp.md.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from host_bridge.errors import NetworkOptionError
from taploom.contracts.taploom.helper.v1 import (
    Dhcp,
    GatewayMode,
    RouterAdvertisementMode,
    RouterAdvertisements,
    RouterPreference,
)

OPTION_GATEWAY_MODES: Final = {
    4: "com.docker.network.bridge.gateway_mode_ipv4",
    6: "com.docker.network.bridge.gateway_mode_ipv6",
}
OPTION_RA: Final = "taploom.ipv6.ra"
OPTION_RA_INTERVAL: Final = "taploom.ipv6.ra.interval"
OPTION_RA_PREFERENCE: Final = "taploom.ipv6.ra.preference"
OPTION_RDNSS: Final = "taploom.ipv6.rdnss"
OPTION_DHCP: Final = "taploom.dhcp"
OPTION_DHCP_LEASE: Final = "taploom.dhcp.lease"
OPTION_DHCP_DNS: Final = "taploom.dhcp.dns"

NAT, NAT_UNPROTECTED, ROUTED, ISOLATED = "nat", "nat-unprotected", "routed", "isolated"
DHCP_AUTO, DHCP_ON, DHCP_OFF = "auto", "on", "off"
SLAAC, STATELESS = "slaac", "stateless"

DNS_IPV6: Final = "fe80::53"
"""The address of each network's DNS server in IPv6. Link-local: each network has its own."""
_NONE: Final = "none"
_INTERVALS: Final = range(4, 1801)
_LEASES: Final = range(60, 2**31)
_MAX_SERVERS: Final = 3
_NUMBER: Final = re.compile(r"[0-9]{1,10}", re.ASCII)

_GATEWAY_MODES: Final = {
    "": GatewayMode.UNSPECIFIED,
    NAT: GatewayMode.UNSPECIFIED,
    NAT_UNPROTECTED: GatewayMode.NAT_UNPROTECTED,
    ROUTED: GatewayMode.ROUTED,
    ISOLATED: GatewayMode.ISOLATED,
}
_RA_MODES: Final = {
    _NONE: RouterAdvertisementMode.NONE,
    SLAAC: RouterAdvertisementMode.SLAAC,
    STATELESS: RouterAdvertisementMode.STATELESS,
    "stateful": RouterAdvertisementMode.STATEFUL,
}
_PREFERENCES: Final = {
    "low": RouterPreference.LOW,
    "medium": RouterPreference.UNSPECIFIED,
    "high": RouterPreference.HIGH,
}


@dataclass(frozen=True, slots=True)
class Addressing:
    """A network's options, read; they have been checked.

    Attributes:
        options: all of the network's driver options.
    """

    options: Mapping[str, str]

    def mode(self, family: int) -> str:
        """The gateway mode of a family, 4 or 6."""
        return self.options.get(OPTION_GATEWAY_MODES[family], "") or NAT

    def gateway_mode(self, family: int) -> GatewayMode:
        """The same as the helper is told it."""
        return _GATEWAY_MODES[self.mode(family)]

    @property
    def dhcp(self) -> str:
        """Whom DHCP answers: those without an agent, all, or nobody."""
        return self.options.get(OPTION_DHCP, DHCP_AUTO)

    @property
    def autonomous(self) -> bool:
        """True when hosts make their IPv6 addresses of the prefix and their MAC addresses."""
        return self.options.get(OPTION_RA) in (SLAAC, STATELESS)

    def dhcp_message(self, upstreams: tuple[str, ...]) -> Dhcp | None:
        """What DHCP tells beside addresses; None: the helper's defaults.

        Args:
            upstreams: the addresses of servers for names that no network knows.
        """
        lease = int(self.options.get(OPTION_DHCP_LEASE, "0"))
        given = _listed(self.options.get(OPTION_DHCP_DNS, ""))
        servers = given or list(upstreams)
        return Dhcp(lease_seconds=lease, dns_servers=servers) if lease or servers else None

    def router_message(self, name: str, *, has_dns: bool) -> RouterAdvertisements:
        """What the gateway says of itself.

        Args:
            name: the domain that names are looked for in.
            has_dns: whether the network has a DNS server.
        """
        server = self.options.get(OPTION_RDNSS, DNS_IPV6 if has_dns else _NONE)
        mode = self.options.get(OPTION_RA)
        return RouterAdvertisements(
            mode=RouterAdvertisementMode.UNSPECIFIED if mode is None else _RA_MODES[mode],
            interval_seconds=int(self.options.get(OPTION_RA_INTERVAL, "0")),
            preference=_PREFERENCES[self.options.get(OPTION_RA_PREFERENCE, "medium")],
            dns_server="" if server == _NONE else server,
            domain=name if has_dns else "",
        )


def slaac_address(subnet: str, mac: str) -> str:
    """The address that a host with that MAC address makes of a prefix of 64 bits (RFC 4291, appendix A)."""
    octets = bytearray(bytes.fromhex(mac.replace(":", "")))
    octets[0] ^= 2
    identifier = bytes(octets[:3]) + b"\xff\xfe" + bytes(octets[3:])
    network = ipaddress.IPv6Network(subnet)
    return str(network.network_address + int.from_bytes(identifier))


def check(options: Mapping[str, str], *, internal: bool, ipv6: bool, prefix: int) -> None:
    """Checks the options of a network.

    Args:
        internal: the network has no way out.
        ipv6: it has IPv6.
        prefix: the length of its IPv6 subnet's prefix.

    Raises:
        NetworkOptionError
    """
    for key, value in options.items():
        if key.startswith(("taploom.ipv6.", OPTION_DHCP)) and key not in _CHECKS:
            raise NetworkOptionError(key, value, "unknown")
        wanted = _CHECKS.get(key)
        if wanted is not None and not wanted[0](value):
            raise NetworkOptionError(key, value, wanted[1])
        if key.startswith("taploom.ipv6.") and not ipv6:
            raise NetworkOptionError(key, value, "no-ipv6")
        if key in OPTION_GATEWAY_MODES.values() and value == ISOLATED and not internal:
            raise NetworkOptionError(key, value, "isolated")
        if key == OPTION_RA and value in (SLAAC, STATELESS) and prefix != 64:
            raise NetworkOptionError(key, value, "prefix")


def _listed(text: str) -> list[str]:
    return [part for word in text.split(",") if (part := word.strip())]


def _is_number(values: range) -> Callable[[str], bool]:
    return lambda text: _NUMBER.fullmatch(text) is not None and int(text) in values


def _is_server(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return not (address.is_multicast or address.is_unspecified or address.is_loopback or "%" in text)


def _are_servers(text: str) -> bool:
    return 1 <= len(_listed(text)) <= _MAX_SERVERS and all(map(_is_server, _listed(text)))


_CHECKS: Final[dict[str, tuple[Callable[[str], bool], str]]] = {
    OPTION_GATEWAY_MODES[4]: (_GATEWAY_MODES.__contains__, "gateway-mode"),
    OPTION_GATEWAY_MODES[6]: (_GATEWAY_MODES.__contains__, "gateway-mode"),
    OPTION_RA: (_RA_MODES.__contains__, "ra"),
    OPTION_RA_INTERVAL: (_is_number(_INTERVALS), "interval"),
    OPTION_RA_PREFERENCE: (_PREFERENCES.__contains__, "preference"),
    OPTION_RDNSS: (lambda text: text == _NONE or (":" in text and _is_server(text)), "rdnss"),
    OPTION_DHCP: ((DHCP_AUTO, DHCP_ON, DHCP_OFF).__contains__, "dhcp"),
    OPTION_DHCP_LEASE: (_is_number(_LEASES), "lease"),
    OPTION_DHCP_DNS: (_are_servers, "dns"),
}

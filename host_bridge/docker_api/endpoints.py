"""How a container is to be on a network: Docker's EndpointSettings, their checks and what they mean to the fabric."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import Any

from host_bridge.docker_api import refusals
from host_bridge.docker_api.errors import DockerError
from host_bridge.docker_api.gojson import INT, STRING, List, Map, Optional, Struct
from host_bridge.model import EndpointOptions, NetworkRecord

IPAM_CONFIG = Struct(
    "network.EndpointIPAMConfig",
    {"IPv4Address": STRING, "IPv6Address": STRING, "LinkLocalIPs": List(STRING)},
)
ENDPOINT_SETTINGS = Struct(
    "network.EndpointSettings",
    {
        "IPAMConfig": Optional(IPAM_CONFIG),
        "Links": List(STRING),
        "Aliases": List(STRING),
        "MacAddress": STRING,
        "DriverOpts": Map(STRING),
        "GwPriority": INT,
        "NetworkID": STRING,
        "EndpointID": STRING,
        "Gateway": STRING,
        "IPAddress": STRING,
        "IPPrefixLen": INT,
        "IPv6Gateway": STRING,
        "GlobalIPv6Address": STRING,
        "GlobalIPv6PrefixLen": INT,
        "DNSNames": List(STRING),
    },
)

_SYSCTLS = "com.docker.network.endpoint.sysctls"
# net.ParseMAC: EUI-48, EUI-64 and IPoIB's 20 octets, with colons, hyphens or dots.
_MAC = re.compile(
    r"[0-9a-f]{2}([:-])[0-9a-f]{2}(\1[0-9a-f]{2}){4}((\1[0-9a-f]{2}){2}((\1[0-9a-f]{2}){12})?)?"
    r"|[0-9a-f]{4}\.[0-9a-f]{4}\.[0-9a-f]{4}(\.[0-9a-f]{4}((\.[0-9a-f]{4}){6})?)?",
    re.IGNORECASE | re.ASCII,
)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def parse_ip(text: str) -> Address | None:
    """An address as Go's net.ParseIP reads it, IPv4 in IPv6 as IPv4; None: it is none."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if address.version == 6:
        return None if address.scope_id is not None else address.ipv4_mapped or address
    return address


def check(settings: Mapping[str, Any], network: NetworkRecord | None) -> None:
    """Raises DockerError 400 for settings that make no sense, or not on this network, in dockerd's order."""
    ipam = settings["IPAMConfig"] or {}
    ipv4, ipv6 = ipam.get("IPv4Address") or "", ipam.get("IPv6Address") or ""
    reasons: list[str] = []
    if network is not None and network.predefined:
        if ipv4 or ipv6:
            reasons.append(refusals.STATIC_ON_DEFAULT)
        if settings["Aliases"]:
            reasons.append(refusals.ALIAS_ON_DEFAULT)
    for text, family in ((ipv4, 4), (ipv6, 6)):
        address = parse_ip(text)
        if text and (address is None or address.version != family or address.is_unspecified):
            reasons.append(f"invalid IPv{family} address: {text}")
    for text in ipam.get("LinkLocalIPs") or ():
        address = parse_ip(text)
        if address is None or address.is_unspecified:
            reasons.append(f"invalid link-local IP address: {text}")
    if network is not None:
        reasons += [
            reason for text, family in ((ipv4, 4), (ipv6, 6)) if text and (reason := _place(text, family, network))
        ]
    if settings["MacAddress"] and not _MAC.fullmatch(settings["MacAddress"]):
        raise DockerError(400, f"invalid MAC address {settings['MacAddress']}")
    for sysctl in (settings["DriverOpts"] or {}).get(_SYSCTLS, "").split(","):
        parts = sysctl.split(".", 4)
        if sysctl and (
            len(parts) != 5 or parts[1] not in ("ipv4", "ipv6", "mpls") or parts[3] not in ("IFNAME", "ifname")
        ):
            reasons.append(
                f"unrecognised network interface sysctl '{sysctl}'; represent 'net.X.Y.ethN.Z=V' as "
                "'net.X.Y.IFNAME.Z=V', 'X' must be 'ipv4', 'ipv6' or 'mpls'"
            )
    if reasons:
        raise refusals.endpoint_settings(*reasons)


def _place(text: str, family: int, network: NetworkRecord) -> str:
    """Why an address cannot be on the network; empty: it can, or is no address at all."""
    subnet = network.subnet(family)
    if subnet is None or not subnet.configured:
        return refusals.STATIC_ADDRESS
    address = parse_ip(text)
    if address is None or address.version != family or address not in ipaddress.ip_network(subnet.subnet):
        return f"no configured subnet or ip-range contain the IP address {text}"
    return ""


def options(settings: Mapping[str, Any]) -> EndpointOptions:
    """Checked settings as the fabric takes them.

    A MAC address is not among them: dockerd ignores one here, and takes it when a container is created. Link-local
    addresses are not supported.
    """
    ipam = settings["IPAMConfig"] or {}
    texts = [text for key in ("IPv4Address", "IPv6Address") if (text := ipam.get(key))]
    return EndpointOptions(
        addresses=tuple(str(parse_ip(text)) for text in texts),
        aliases=tuple(dict.fromkeys(settings["Aliases"] or ())),
        gateway_priority=settings["GwPriority"],
        links=tuple(parse_link(text) for text in settings["Links"] or ()),
        driver_options=settings["DriverOpts"] or {},
    )


def parse_link(text: str) -> tuple[str, str]:
    """`container:alias` as (alias, container); the alias is the container's name when there is none."""
    if not text:
        raise DockerError(500, "empty string specified for links")
    parts = text.split(":")
    if len(parts) > 2:
        raise DockerError(500, f"bad format for links: {text}")
    target = parts[0].removeprefix("/")
    alias = parts[-1] or target
    # Written by old versions: /child:/parent/alias
    return (alias.rpartition("/")[2], target)

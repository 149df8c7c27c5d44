"""Docker's checks of a network's address configuration, before anything is allocated."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping, Sequence
from typing import Any

from host_bridge.docker_api import refusals
from host_bridge.docker_api.errors import bad_request, forbidden
from host_bridge.model import SubnetOptions

Prefix = ipaddress.IPv4Interface | ipaddress.IPv6Interface


def check(configs: Sequence[Mapping[str, Any]], *, ipv6: bool) -> None:
    """Raises DockerError 400 that lists everything that is wrong; IPv6 is looked at only where it is enabled."""
    reasons: list[str] = []
    for config in configs:
        reasons += _check_one(config, ipv6=ipv6)
    if reasons:
        raise bad_request("invalid network config:\n" + refusals.joined(reasons))
    enabled = [
        network
        for config in configs
        if (network := ipaddress.ip_interface(config["Subnet"]).network).version == 4 or ipv6
    ]
    for number, one in enumerate(enabled):
        if any(one.version == other.version and one.overlaps(other) for other in enabled[:number]):
            raise forbidden(refusals.OVERLAP)


def subnets(configs: Sequence[Mapping[str, Any]]) -> tuple[SubnetOptions, ...]:
    """Checked configurations as the fabric takes them."""
    return tuple(
        SubnetOptions(
            subnet=config["Subnet"],
            gateway=config["Gateway"],
            ip_range=config["IPRange"],
            auxiliary=dict(config["AuxiliaryAddresses"] or {}),
        )
        for config in configs
    )


def _check_one(config: Mapping[str, Any], *, ipv6: bool) -> list[str]:
    subnet = _prefix(config["Subnet"])
    if subnet is None:
        return [f"invalid subnet {config['Subnet']}: invalid CIDR block notation"]
    if subnet.version == 6 and not ipv6:
        return []
    reasons = []
    if subnet.ip != subnet.network.network_address:
        reasons.append(f"invalid subnet {subnet}: it should be {subnet.network}")
    if config["IPRange"]:
        reasons += _check_range(config["IPRange"], subnet)
    if config["Gateway"] and (reason := _misplaced(config["Gateway"], subnet)):
        reasons.append(f"invalid gateway {config['Gateway']}: {reason}")
    for name, text in (config["AuxiliaryAddresses"] or {}).items():
        if text and (reason := _misplaced(text, subnet)):
            reasons.append(f"invalid auxiliary address {name}: {reason}")
    return reasons


def _check_range(text: str, subnet: Prefix) -> list[str]:
    inner = _prefix(text)
    if inner is None:
        return [f"invalid ip-range {text}: invalid CIDR block notation"]
    if inner.version != subnet.version:
        return [f"invalid ip-range {text}: parent subnet is an IPv{subnet.version} block"]
    reasons = []
    if inner.network.prefixlen < subnet.network.prefixlen:
        reasons.append(f"invalid ip-range {text}: CIDR block is bigger than its parent subnet {subnet}")
    if inner.ip != inner.network.network_address:
        reasons.append(f"invalid ip-range {inner}: it should be {inner.network}")
    # Of one family, as was just seen.
    if not subnet.network.overlaps(inner.network):
        reasons.append(f"invalid ip-range {text}: parent subnet {subnet} doesn't contain ip-range")
    return reasons


def _misplaced(text: str, subnet: Prefix) -> str:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return "invalid address"
    if address.version != subnet.version:
        return f"parent subnet is an IPv{subnet.version} block"
    if address not in subnet.network:
        return f"parent subnet {subnet} doesn't contain this address"
    return ""


def _prefix(text: str) -> Prefix | None:
    """CIDR form; None: it is none. No zones, no netmasks, as with Go's netip.ParsePrefix."""
    head, slash, length = text.partition("/")
    if not slash or "%" in head or not (length.isascii() and length.isdigit() and str(int(length)) == length):
        return None
    try:
        return ipaddress.ip_interface(text)
    except ValueError:
        return None

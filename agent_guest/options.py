"""What the agent is told when it is started, and what it offers then."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from taploom.address import Address
from taploom.contracts.taploom.guest.v1 import GuestFeature
from taploom.contracts.taploom.link.v1 import LinkFeature

OPTIONAL_FEATURES = {
    "vnet-hdr": GuestFeature.LINK_VNET_HDR,
    "tso": GuestFeature.LINK_TSO,
    "uso": GuestFeature.LINK_USO,
    "resolver": GuestFeature.RESOLVER,
    "events": GuestFeature.EVENTS,
    "hosts": GuestFeature.HOSTS,
    "direct-dns": GuestFeature.DIRECT_DNS,
    "vlan": GuestFeature.VLAN,
}
"""The features by the names that --without knows."""
LINK_FEATURES = {
    GuestFeature.LINK_VNET_HDR: LinkFeature.VNET_HDR,
    GuestFeature.LINK_TSO: LinkFeature.TSO,
    GuestFeature.LINK_USO: LinkFeature.USO,
}


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    control: Address
    data: Address
    resolv_conf: Path
    hosts: Path
    state_dir: Path
    without: frozenset[str] = frozenset()


def features(
    link_features: frozenset[LinkFeature], without: frozenset[str], *, vlan: bool = False
) -> frozenset[GuestFeature]:
    """What the agent offers: what the kernel can and ``without`` does not hide. Offloads need vnet-hdr.

    Args:
        vlan: whether the kernel has VLAN interfaces.
    """
    found = {GuestFeature.RESOLVER, GuestFeature.EVENTS, GuestFeature.HOSTS, GuestFeature.DIRECT_DNS}
    found |= {GuestFeature.VLAN} if vlan else set()
    found |= {guest for guest, link in LINK_FEATURES.items() if link in link_features}
    found -= {OPTIONAL_FEATURES[name] for name in without}
    if GuestFeature.LINK_VNET_HDR not in found:
        found -= set(LINK_FEATURES)
    return frozenset(found)

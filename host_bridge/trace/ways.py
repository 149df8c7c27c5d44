"""What a guest does with a name and an address, from what is desired.

Which addresses a name has for it, and by which of its networks it sends to an address: functions of records. The rules
are those of the guest's agent.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from host_bridge.describe import endpoint_names, guest_interface, guest_priority
from host_bridge.model import EndpointRecord, GuestRecord, NetworkRecord


@dataclass(frozen=True, slots=True)
class Place:
    """A guest's place on a network."""

    endpoint: EndpointRecord
    guest: GuestRecord
    network: NetworkRecord

    def address(self, family: int) -> str | None:
        """Its address of a family, without prefix length."""
        return next((a for a in self.endpoint.addresses if ipaddress.ip_address(a).version == family), None)


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a name is for a guest.

    Attributes:
        addresses: without prefix length; more than one per family where several guests share the name.
        how: who says so, for people.
    """

    addresses: tuple[str, ...]
    how: str
    network: str = ""


@dataclass(frozen=True, slots=True)
class Route:
    """From which of a guest's places an address is sent to, and why, for people. `direct`: it is on that network."""

    place: Place
    why: str
    direct: bool


def name_order(places: Iterable[Place]) -> list[Place]:
    """The order in which a guest's networks are asked for names."""

    def key(place: Place) -> tuple[int, bool, bytes, str]:
        shown = guest_interface(place.endpoint, place.network)
        return -shown.gateway_priority, not shown.gateways, shown.network_name.encode(), place.endpoint.id

    return sorted(places, key=key)


def resolve(
    name: str,
    guest: GuestRecord,
    own: Sequence[Place],
    others: Sequence[Place],
    balanced: Mapping[tuple[str, str], Sequence[str]] = MappingProxyType({}),
) -> Resolved | None:
    """What a name is for a guest; None: no network knows it.

    Args:
        own: the guest's places.
        others: everybody's places, its own included.
        balanced: the addresses of load balancers, by network id and name in lower case.
    """
    wanted = name.rstrip(".").lower()
    for host_names, address in guest.settings.extra_hosts:
        if wanted in host_names.lower().split():
            return Resolved((address,), f"its /etc/hosts has {address} for {name}")
    for place in own:
        for alias, target in place.endpoint.links:
            if alias.lower() == wanted:
                found = _known(target.lower(), place.network, others)
                if found is not None:
                    return Resolved(found[0], f"a link of {guest.name} on network {place.network.name} to {target}")
    hostname = guest.settings.hostname.lower()
    if hostname and wanted == hostname:
        return Resolved(tuple(a for place in own for a in place.endpoint.addresses), "it is its own host name")
    for place in name_order(own):
        network = place.network
        if not network.dns_server:
            continue
        addresses_of = balanced.get((network.id, _bare(wanted, network)))
        if addresses_of:
            how = f"network {network.name} knows it as the name of a load balancer"
            return Resolved(tuple(addresses_of), how, network.name)
        found = _known(wanted, network, others)
        if found is not None:
            addresses, what = found
            return Resolved(addresses, f"network {network.name} knows it as {what}", network.name)
    return None


def _known(wanted: str, network: NetworkRecord, others: Sequence[Place]) -> tuple[tuple[str, ...], str] | None:
    bare = _bare(wanted, network)
    found = [
        place
        for place in others
        if place.network.id == network.id
        and any(bare == one.lower() for one in endpoint_names(place.endpoint, place.guest, network))
    ]
    if not found:
        return None
    kinds = {_kind(bare, place) for place in found}
    who = " and ".join(sorted({place.guest.name for place in found}))
    kind = next(iter(kinds)) if len(kinds) == 1 else "a name"
    text = f"{kind} of {who}" if kind != "the name" or bare != who.lower() else "the name of the guest"
    return tuple(a for place in found for a in place.endpoint.addresses), text


def _bare(wanted: str, network: NetworkRecord) -> str:
    """A name in lower case without the network's."""
    return wanted.removesuffix("." + guest_network_name(network).lower())


def guest_network_name(network: NetworkRecord) -> str:
    """Under which name guests know the network."""
    from host_bridge.describe import helper_network

    return helper_network(network).name


def _kind(bare: str, place: Place) -> str:
    if bare == place.guest.name.lower():
        return "the name"
    if bare in (alias.lower() for alias in place.endpoint.aliases):
        return "an alias"
    if bare == place.guest.id[:12]:
        return "the short id"
    return "a name"


def route(destination: str, own: Sequence[Place]) -> Route | None:
    """The place from which a guest sends to an address; None: it has no route."""
    address = ipaddress.ip_address(destination)
    family = address.version
    direct = []
    for place in own:
        subnet = place.network.subnet(family)
        if subnet is not None and place.address(family) and address in ipaddress.ip_network(subnet.subnet):
            direct.append((ipaddress.ip_network(subnet.subnet).prefixlen, place))
    if direct:
        place = max(direct, key=lambda pair: pair[0])[1]
        subnet = place.network.subnet(family)
        assert subnet is not None
        return Route(place, f"{destination} is in its subnet {subnet.subnet}", direct=True)
    candidates = [place for place in own if _gateway(place, family)]
    if not candidates:
        return None
    order = sorted(
        candidates,
        key=lambda place: (
            -guest_priority(place.endpoint, place.network),
            guest_network_name(place.network).encode(),
            place.endpoint.id,
        ),
    )
    first = order[0]
    return Route(first, _why(first, order[1:], family), direct=False)


def _why(first: Place, others: Sequence[Place], family: int) -> str:
    gateway = _gateway(first, family)
    if not others:
        return f"it has the only way out, by {gateway}"
    second = others[0]
    if first.endpoint.gateway_priority != second.endpoint.gateway_priority:
        reason = f"its gateway priority {first.endpoint.gateway_priority} is the highest"
    elif len(first.network.subnets) != len(second.network.subnets):
        reason = "of those with the highest gateway priority it has both families"
    else:
        reason = "of those with the highest gateway priority its name comes first"
    return f"{reason}: the default route is by {gateway}"


def _gateway(place: Place, family: int) -> str:
    """The router that the guest may use for the family; empty: none."""
    if not place.address(family):
        return ""
    gateways = guest_interface(place.endpoint, place.network).gateways
    return next((one for one in gateways if ipaddress.ip_address(one).version == family), "")

"""Records as contract messages: what the guests, the helper and the bridge's callers are told."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable

from host_bridge.model import EndpointRecord, GuestRecord, NetworkRecord
from taploom.contracts.taploom.bridge import v1 as bridge
from taploom.contracts.taploom.guest import v1 as guest
from taploom.contracts.taploom.helper import v1 as helper

_SHORT_ID = 12


def with_prefixes(endpoint: EndpointRecord, network: NetworkRecord) -> list[str]:
    """The endpoint's addresses with their subnets' prefix lengths."""
    result = []
    for address in endpoint.addresses:
        subnet = network.subnet(ipaddress.ip_address(address).version)
        assert subnet is not None, "an endpoint has addresses of its network's families only"
        result.append(f"{address}/{subnet.subnet.rpartition('/')[2]}")
    return result


def guest_interface(endpoint: EndpointRecord, network: NetworkRecord) -> guest.Interface:
    """What the guest's agent is to make of an endpoint.

    An internal network has a gateway (the helper answers for it), but the guest is not told: without a way out there is
    to be no default route.
    """
    return guest.Interface(
        endpoint_id=endpoint.id,
        name=endpoint.interface_name,
        mac_address=endpoint.mac_address,
        addresses=with_prefixes(endpoint, network),
        gateways=[] if network.internal else [subnet.gateway for subnet in network.subnets],
        gateway_priority=endpoint.gateway_priority,
        mtu=network.mtu,
        network_name=network.name,
        dns_servers=[network.dns_server],
    )


def helper_network(network: NetworkRecord) -> helper.Network:
    """What the helper is to make of a network."""
    return helper.Network(
        network_id=network.id,
        name=network.name,
        subnets=[subnet.subnet for subnet in network.subnets],
        gateways=[subnet.gateway for subnet in network.subnets],
        gateway_mac=network.gateway_mac,
        internal=network.internal,
        mtu=network.mtu,
        dns_servers=[network.dns_server],
        dns_mac=network.dns_mac,
    )


def endpoint_names(endpoint: EndpointRecord, guest_record: GuestRecord) -> list[str]:
    """The names of a guest on a network, as Docker has them: its name, its short id, its aliases; each once."""
    names: dict[str, str] = {}
    for name in (guest_record.name, guest_record.id[:_SHORT_ID], *endpoint.aliases):
        names.setdefault(name.lower(), name)
    return list(names.values())


def helper_endpoint(endpoint: EndpointRecord, guest_record: GuestRecord) -> helper.Endpoint:
    """What the helper is to make of an endpoint."""
    return helper.Endpoint(
        endpoint_id=endpoint.id,
        network_id=endpoint.network_id,
        mac_address=endpoint.mac_address,
        addresses=list(endpoint.addresses),
        names=endpoint_names(endpoint, guest_record),
    )


def bridge_endpoint(
    endpoint: EndpointRecord, network: NetworkRecord, guest_record: GuestRecord, *, link_up: bool
) -> bridge.Endpoint:
    """An endpoint as the bridge's callers see it."""
    return bridge.Endpoint(
        id=endpoint.id,
        network_id=network.id,
        network_name=network.name,
        guest_id=guest_record.id,
        guest_name=guest_record.name,
        interface_name=endpoint.interface_name,
        mac_address=endpoint.mac_address,
        addresses=with_prefixes(endpoint, network),
        aliases=list(endpoint.aliases),
        gateway_priority=endpoint.gateway_priority,
        link_up=link_up,
    )


def bridge_network(network: NetworkRecord, endpoints: Iterable[bridge.Endpoint]) -> bridge.Network:
    """A network as the bridge's callers see it."""
    return bridge.Network(
        id=network.id,
        name=network.name,
        subnets=[subnet.subnet for subnet in network.subnets],
        gateways=[subnet.gateway for subnet in network.subnets],
        internal=network.internal,
        mtu=network.mtu,
        created_at=network.created_at,
        endpoints=list(endpoints),
    )


def bridge_guest(
    record: GuestRecord, endpoints: Iterable[bridge.Endpoint], *, connected: bool, problem: str
) -> bridge.Guest:
    """A guest as the bridge's callers see it."""
    return bridge.Guest(
        id=record.id,
        name=record.name,
        address=record.address,
        data_address=record.data_address,
        connected=connected,
        problem=problem,
        created_at=record.created_at,
        endpoints=list(endpoints),
    )

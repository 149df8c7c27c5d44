"""Records as contract messages: what the guests, the helper and the bridge's callers are told."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Iterable, Sequence

from host_bridge.ipam import is_address, ula_prefix, uplink_kernel
from host_bridge.model import EndpointRecord, GuestRecord, NetworkRecord, SubnetRecord
from host_bridge.names import dns_name, host_name
from host_bridge.store import Store
from taploom.contracts.taploom.bridge import v1 as bridge
from taploom.contracts.taploom.guest import v1 as guest
from taploom.contracts.taploom.helper import v1 as helper

_SHORT_ID = 12
# What /etc/resolv.conf and /etc/hosts can carry.
_OPTION = re.compile(r"[a-zA-Z0-9_-]+(:[a-zA-Z0-9._-]+)?", re.ASCII)
_HOST = re.compile(r"[^\s#\x00-\x1f\x7f-\x9f]{1,255}")
_MAX_HOSTS = 1000
# Where a container's resolver listens, as with Docker.
_RESOLVER = "127.0.0.11"


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
    to be no default route. On the default bridge nobody has a name, so there is nobody to ask.
    """
    return guest.Interface(
        endpoint_id=endpoint.id,
        name=endpoint.interface_name,
        mac_address=endpoint.mac_address,
        addresses=with_prefixes(endpoint, network),
        gateways=[] if network.internal else [_way_out(subnet) for subnet in network.subnets],
        gateway_priority=guest_priority(endpoint, network),
        mtu=network.mtu,
        network_name=_suffix(network),
        dns_servers=[network.dns_server] if network.dns_server else [],
        name_links=[
            guest.NameLink(alias=alias, target=target)
            for alias, target in endpoint.links
            if not network.default_bridge and dns_name(alias) and dns_name(target)
        ],
    )


def guest_priority(endpoint: EndpointRecord, network: NetworkRecord) -> int:
    """The priority that the guest's agent goes by: Docker's order, in which a network with both families comes before
    one with one of the same priority. Exact for priorities of up to 30 bits; larger ones are all the same."""
    value = endpoint.gateway_priority * 2 + (len(network.subnets) > 1)
    return max(-(2**31), min(value, 2**31 - 1))


def _suffix(network: NetworkRecord) -> str:
    """Under which name the agents know the network; Docker's may be one that DNS cannot carry."""
    return network.name if dns_name(network.name) else network.id[:_SHORT_ID]


def _way_out(subnet: SubnetRecord) -> str:
    """The router that guests use: with Docker, an auxiliary address of this name stands in for the gateway."""
    return dict(subnet.auxiliary).get(f"DefaultGatewayIPv{subnet.family}", subnet.gateway)


def guest_resolver(
    record: GuestRecord, store: Store, upstreams: Sequence[str], features: frozenset[int]
) -> guest.Resolver:
    """How a guest's names are resolved. Only of a container is /etc/hosts the agent's business.

    Docker takes most of these settings as any text. What an agent would refuse is left out: an option that means
    nothing must not keep a container from its networks.
    """
    settings = record.settings
    resolver = guest.Resolver(
        enabled=True,
        upstreams=[text for text in settings.dns or upstreams if not settings.dns or _is_server(text)],
        search=[domain for domain in settings.dns_search if domain == "." or host_name(domain.removesuffix("."))],
        options=[option for option in settings.dns_options if _OPTION.fullmatch(option)],
        hostname=settings.hostname if host_name(settings.hostname) else "",
    )
    if not store.is_container(record.id):
        return resolver
    # In the order in which they were connected, as Docker has them.
    endpoints = sorted(store.endpoints(guest_id=record.id), key=lambda endpoint: endpoint.created_at)
    networks = {endpoint.network_id: store.network(endpoint.network_id) for endpoint in endpoints}
    on_default = [one for one in endpoints if (network := networks[one.network_id]) and network.default_bridge]
    if guest.GuestFeature.HOSTS in features:
        resolver.manage_hosts = True
        resolver.hosts = _host_entries(record, endpoints, on_default, store)
    if guest.GuestFeature.DIRECT_DNS in features:
        resolver.direct = len(on_default) == len(endpoints)
    return resolver


def _host_entries(
    record: GuestRecord, endpoints: Sequence[EndpointRecord], on_default: Sequence[EndpointRecord], store: Store
) -> list[guest.HostEntry]:
    """The lines of /etc/hosts in Docker's order: extra hosts, links on the default bridge, own addresses."""
    settings = record.settings
    entries = [
        guest.HostEntry(address=address, names=names)
        for name, address in settings.extra_hosts
        if is_address(address) and (names := name.split()) and all(_HOST.fullmatch(one) for one in names)
    ]
    for endpoint in on_default:
        if not endpoint.links:
            continue
        guests = {one.id: one for one in store.guests()}
        others = {guests[one.guest_id].name: one for one in store.endpoints(network_id=endpoint.network_id)}
        for alias, target in endpoint.links:
            other = others.get(target)
            if other is None or not other.addresses or not dns_name(alias):
                continue
            hostname = guests[other.guest_id].settings.hostname
            names = [alias, hostname if dns_name(hostname) else other.guest_id[:_SHORT_ID]]
            names += [target] if target != alias else []
            entries.append(guest.HostEntry(address=other.addresses[0], names=names))
    if dns_name(settings.hostname):
        full = f"{settings.hostname}.{settings.domainname}" if dns_name(settings.domainname) else settings.hostname
        # As Docker has it: the whole name, then its first label.
        names = [full, full.partition(".")[0]] if "." in full else [full]
        entries += [
            guest.HostEntry(address=address, names=names) for endpoint in endpoints for address in endpoint.addresses
        ]
    return entries[:_MAX_HOSTS]


def _is_server(text: str) -> bool:
    """True for the address of a DNS server that is not the container's own resolver."""
    if not is_address(text) or text == _RESOLVER:
        return False
    address = ipaddress.ip_address(text)
    return not address.is_multicast and not address.is_unspecified


def helper_network(network: NetworkRecord) -> helper.Network:
    """What the helper is to make of a network."""
    return helper.Network(
        network_id=network.id,
        name=_suffix(network),
        subnets=[subnet.subnet for subnet in network.subnets],
        gateways=[subnet.gateway for subnet in network.subnets],
        gateway_mac=network.gateway_mac,
        internal=network.internal,
        mtu=network.mtu,
        dns_servers=[network.dns_server] if network.dns_server else [],
        dns_mac=network.dns_mac,
        uplink_addresses=list(network.uplink_addresses),
        uplink_mac=network.uplink_mac,
        endpoints_isolated=network.isolated,
        masquerade_disabled=not network.masquerade,
    )


def helper_uplink(host_id: str, host_addresses: Iterable[str]) -> helper.Uplink:
    """Where the helper's kernel meets the networks' routers."""
    return helper.Uplink(
        addresses=list(uplink_kernel(ula_prefix(host_id))),
        mac_address=(b"\x02" + hashlib.sha256(f"uplink {host_id}".encode()).digest()[:5]).hex(":"),
        host_addresses=sorted(host_addresses),
    )


def endpoint_names(endpoint: EndpointRecord, guest_record: GuestRecord, network: NetworkRecord) -> list[str]:
    """The names of a guest on a network, as Docker has them: its name, short id, aliases and hostname; each once, as
    far as DNS can carry them. On the default bridge there are none."""
    if network.default_bridge:
        return []
    names: dict[str, str] = {}
    hostname = guest_record.settings.hostname
    for name in (guest_record.name, guest_record.id[:_SHORT_ID], *endpoint.aliases, *endpoint.names, hostname):
        if dns_name(name):
            names.setdefault(name.lower(), name)
    return list(names.values())


def helper_endpoint(
    endpoint: EndpointRecord,
    guest_record: GuestRecord,
    network: NetworkRecord,
    policy: helper.EndpointPolicy | None = None,
) -> helper.Endpoint:
    """What the helper is to make of an endpoint."""
    return helper.Endpoint(
        endpoint_id=endpoint.id,
        network_id=endpoint.network_id,
        mac_address=endpoint.mac_address,
        addresses=list(endpoint.addresses),
        names=endpoint_names(endpoint, guest_record, network),
        policy=policy,
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
        links=dict(endpoint.links),
        driver_options=dict(endpoint.driver_options),
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
        driver=network.driver,
        predefined=network.predefined,
        labels=dict(network.labels),
        options=dict(network.options),
        ip_ranges=[subnet.ip_range for subnet in network.subnets if subnet.ip_range],
        auxiliary_addresses={name: address for subnet in network.subnets for name, address in subnet.auxiliary},
        uplink_addresses=list(network.uplink_addresses),
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

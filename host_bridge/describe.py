"""Records as contract messages: what the guests, the helper and the bridge's callers are told."""

from __future__ import annotations

import hashlib
import ipaddress
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from host_bridge.addressing import DHCP_AUTO, DHCP_ON, DNS_IPV6, ROUTED
from host_bridge.ipam import is_address, ula_prefix, uplink_kernel
from host_bridge.model import IPV4, IPV6, EndpointRecord, GuestRecord, NetworkRecord, SubnetRecord
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


def guest_interface(
    endpoint: EndpointRecord, network: NetworkRecord, carrier: EndpointRecord | None = None
) -> guest.Interface:
    """What the guest's agent is to make of an endpoint.

    An internal network has a gateway (the helper answers for it), but the guest is not told: without a way out there is
    to be no default route. On the default bridge nobody has a name, so there is nobody to ask.

    Args:
        carrier: over whose interface tagged frames carry it; None: it has a link of its own.
    """
    trunk: guest.TrunkChild | None = None
    if endpoint.carried is not None and carrier is not None:
        trunk = guest.TrunkChild(parent_endpoint_id=carrier.id, tag=endpoint.carried.tag)
    return guest.Interface(
        endpoint_id=endpoint.id,
        name=endpoint.interface_name,
        mac_address=endpoint.mac_address,
        addresses=with_prefixes(endpoint, network),
        gateways=[] if network.internal else [_way_out(subnet) for subnet in network.subnets],
        gateway_priority=guest_priority(endpoint, network),
        mtu=network.mtu,
        network_name=_suffix(network),
        dns_servers=_dns_servers(network)[:1],
        name_links=[
            guest.NameLink(alias=alias, target=target)
            for alias, target in endpoint.links
            if not network.default_bridge and dns_name(alias) and dns_name(target)
        ],
        trunk_child=trunk,
    )


def _dns_servers(network: NetworkRecord) -> list[str]:
    """The addresses of the network's DNS server, IPv4 first."""
    if not network.dns_server:
        return []
    own = {4: network.dns_server, 6: DNS_IPV6}
    return [own[subnet.family] for subnet in network.subnets]


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


def helper_network(
    network: NetworkRecord, features: frozenset[int] = frozenset(), upstreams: Sequence[str] = ()
) -> helper.Network:
    """What the helper is to make of a network.

    Args:
        features: what the helper can do; it is told nothing of the rest.
        upstreams: DNS servers for names that no network knows.
    """
    addressing = network.addressing
    message = helper.Network(
        network_id=network.id,
        name=_suffix(network),
        subnets=[subnet.subnet for subnet in network.subnets],
        gateways=[subnet.gateway for subnet in network.subnets],
        gateway_mac=network.gateway_mac,
        internal=network.internal,
        mtu=network.mtu,
        dns_servers=[network.dns_server] if network.dns_server else [],
        dns_mac=network.dns_mac if network.dns_server else "",
        uplink_addresses=list(network.uplink_addresses),
        uplink_mac=network.uplink_mac,
        endpoints_isolated=network.isolated,
        masquerade_disabled=not network.masquerade,
    )
    if network.vlan is not None:
        message.vlan = helper.Vlan(tag=network.vlan.tag, uplink=network.vlan.uplink)
    has_ipv6 = network.subnet(IPV6) is not None
    if helper.HelperFeature.IPV6 in features:
        message.dns_servers = _dns_servers(network)
        message.gateway_mode_ipv4 = addressing.gateway_mode(IPV4)
        message.gateway_mode_ipv6 = addressing.gateway_mode(IPV6)
        if has_ipv6:
            message.router_advertisements = addressing.router_message(message.name, has_dns=bool(network.dns_server))
    if helper.HelperFeature.DHCP in features:
        # A client that is refused a name by the network's own server asks the next.
        own = _dns_servers(network)
        outside = tuple(text for text in upstreams if not network.internal and _is_far(text))
        message.dhcp = addressing.dhcp_message((*own, *outside) if outside else ())
    return message


def needs_of_network(network: NetworkRecord) -> frozenset[helper.HelperFeature]:
    """What a helper must be able to do for the network to be what it is to be."""
    options = network.addressing
    if network.vlan is not None:
        return frozenset({helper.HelperFeature.VLAN, helper.HelperFeature.IPV6})
    plain = all(options.gateway_mode(family) == helper.GatewayMode.UNSPECIFIED for family in (IPV4, IPV6))
    if plain and not any(key.startswith("taploom.ipv6.") for key in network.options) and network.subnet(IPV4):
        return frozenset()
    return frozenset({helper.HelperFeature.IPV6})


def has_dhcp(guest_record: GuestRecord, network: NetworkRecord) -> bool:
    """Whether DHCP answers a guest on a network: unless told otherwise, one that has no agent to set its addresses."""
    choice = network.addressing.dhcp
    return choice == DHCP_ON or (choice == DHCP_AUTO and guest_record.card is not None)


def is_routed(network: NetworkRecord) -> bool:
    """Whether a network's containers are reached at their own addresses from outside, at ports that they publish."""
    return any(network.addressing.mode(subnet.family) == ROUTED for subnet in network.subnets)


def published_ports(config: Mapping[str, Any]) -> list[tuple[str, int]]:
    """What a container publishes, by its record's configuration: (tcp or udp, port)."""
    host, docker = config.get("HostConfig") or {}, config.get("Config") or {}
    specs = set(host.get("PortBindings") or ())
    if host.get("PublishAllPorts"):
        specs |= set(docker.get("ExposedPorts") or ())
    found = {(protocol.lower() or "tcp", number) for number, _, protocol in (spec.partition("/") for spec in specs)}
    return sorted((p, int(n)) for p, n in found if p in {"tcp", "udp"} and n.isdecimal() and 0 < int(n) <= 65535)


def _is_far(text: str) -> bool:
    """True for a server that guests can ask themselves, at the usual port."""
    return _is_server(text) and not ipaddress.ip_address(text).is_loopback and "%" not in text


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
    *,
    open_ports: Sequence[tuple[str, int]] = (),
    qos: helper.Qos | None = None,
) -> helper.Endpoint:
    """What the helper is to make of an endpoint.

    Args:
        open_ports: what the guest publishes, on a network that is routed: (tcp or udp, port).
    """
    return helper.Endpoint(
        endpoint_id=endpoint.id,
        network_id=endpoint.network_id,
        mac_address=endpoint.mac_address,
        addresses=list(endpoint.addresses),
        names=endpoint_names(endpoint, guest_record, network),
        policy=policy,
        dhcp=has_dhcp(guest_record, network),
        open_ports=[
            helper.OpenPort(protocol=helper.PortProtocol[protocol.upper()], port=port) for protocol, port in open_ports
        ],
        qos=qos,
    )


def bridge_endpoint(
    endpoint: EndpointRecord,
    network: NetworkRecord,
    guest_record: GuestRecord,
    *,
    link_up: bool,
    qos: Sequence[bridge.QosRule] = (),
    left_to_guest: str = "",
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
        qos=list(qos),
        left_to_guest=left_to_guest,
    )


def bridge_network(
    network: NetworkRecord, endpoints: Iterable[bridge.Endpoint], qos: Sequence[bridge.QosRule] = ()
) -> bridge.Network:
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
        qos=list(qos),
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
        mac_address=record.settings.card_mac,
    )

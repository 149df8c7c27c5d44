"""The fabric as one value: networks, who is on them, and how they are."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from host_bridge.addressing import ROUTED, Addressing
from host_bridge.model import OPTION_ICC, OPTION_MASQUERADE, parse_bool
from host_bridge.names import clean_text
from host_bridge.view.rates import Rates, rates_between
from host_bridge.vlan import is_carried, place_of

if TYPE_CHECKING:
    from taploom.contracts.taploom.bridge.v1 import (
        BalancerStatus,
        Endpoint,
        Guest,
        Link,
        ListPolicyResponse,
        Network,
        Status,
    )
    from taploom.rpc import Channel

_SWITCHED = "bridge"
_MEASURED_AT_LEAST = 0.1  # s


@dataclass(frozen=True, slots=True)
class Place:
    """A guest's place on a network.

    Attributes:
        addresses: with prefix lengths, IPv4 first.
        problem: why its link is not up; empty when it is.
        groups: the policy groups that it is in.
        rates: what it carries now; None: not measured.
        sent_limit, received_limit: bits per second that it may send and get at most; 0: no limit.
        sent_bytes, received_bytes, drops: since its agent started; drops are frames.
        carried: by another place's link, which counts its frames too.
    """

    id: str
    guest: str
    interface: str
    mac_address: str
    addresses: tuple[str, ...]
    aliases: tuple[str, ...]
    up: bool
    problem: str
    groups: tuple[str, ...]
    rates: Rates | None
    sent_limit: int = 0
    received_limit: int = 0
    sent_bytes: int = 0
    received_bytes: int = 0
    drops: int = 0
    carried: bool = False


@dataclass(frozen=True, slots=True)
class Shared:
    """A load balancer where it is reached on a network.

    Attributes:
        ports: such as 80 or 53/udp.
        backends: the guests that take a share; `down`: those of them that do not answer.
        published: ports of the host that lead to it, such as 127.0.0.1:8080.
    """

    name: str
    addresses: tuple[str, ...]
    ports: tuple[str, ...]
    backends: tuple[str, ...]
    down: tuple[str, ...]
    published: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Net:
    """A network.

    Attributes:
        ways_out: what it has towards the outside, by family (4, 6): nat or routed; none: no way out.
        isolated: its guests do not reach each other.
        policy: what becomes of connections that no rule speaks of: allow, deny, deny-in or deny-out.
        vlan: the VLAN that it is, such as `VLAN 120 on eth1`; empty: none.
    """

    id: str
    name: str
    subnets: tuple[str, ...]
    gateways: tuple[str, ...]
    ways_out: Mapping[int, str]
    internal: bool
    isolated: bool
    policy: str
    mtu: int
    labels: Mapping[str, str]
    places: tuple[Place, ...]
    balancers: tuple[Shared, ...] = ()
    vlan: str = ""


@dataclass(frozen=True, slots=True)
class Part:
    """A component that is not as it should be."""

    name: str
    state: str
    problem: str


@dataclass(frozen=True, slots=True)
class Topology:
    """The fabric at one moment.

    Attributes:
        networks: in order of their names; those that are names only (host, none) are left out.
        unconnected: guests on no network.
        down: guests whose agent does not answer.
        ailing: components that are not well.
        pending: what has not converged, and why.
    """

    time: datetime.datetime
    converged: bool
    networks: tuple[Net, ...]
    unconnected: tuple[str, ...]
    down: tuple[str, ...]
    ailing: tuple[Part, ...]
    pending: tuple[tuple[str, str], ...]

    @property
    def places(self) -> list[Place]:
        """Everybody's places on all networks."""
        return [place for network in self.networks for place in network.places]

    @property
    def guests(self) -> list[str]:
        """The names of all guests."""
        return sorted({place.guest for place in self.places} | set(self.unconnected))


async def gather(channel: Channel, seconds: float) -> Topology:
    """Asks the bridge for everything.

    Args:
        seconds: how long to measure rates; 0: not at all.
    """
    from taploom.contracts.taploom.bridge import v1 as bridge
    from taploom.contracts.taploom.bridge.v1.rpc import (
        BalancerServiceClient,
        GuestServiceClient,
        NetworkServiceClient,
        PolicyServiceClient,
        StatusServiceClient,
    )

    statuses: list[Status] = []
    interval = round(max(seconds, _MEASURED_AT_LEAST) * 1000)
    async with StatusServiceClient(channel).watch_status(bridge.WatchStatusRequest(interval_ms=interval)) as stream:
        async for message in stream:
            assert message.status is not None
            statuses.append(message.status)
            if seconds <= 0 or len(statuses) > 1:
                break
    networks = (await NetworkServiceClient(channel).list_networks(bridge.ListNetworksRequest())).networks
    guests = (await GuestServiceClient(channel).list_guests(bridge.ListGuestsRequest())).guests
    policy = await PolicyServiceClient(channel).list_policy(bridge.ListPolicyRequest())
    balancers = (await BalancerServiceClient(channel).list_balancers(bridge.ListBalancersRequest())).balancers
    before = statuses[0] if len(statuses) > 1 else None
    return topology(networks, guests, policy, statuses[-1], before, balancers=balancers)


def topology(
    networks: Sequence[Network],
    guests: Sequence[Guest],
    policy: ListPolicyResponse,
    now: Status,
    before: Status | None = None,
    *,
    balancers: Sequence[BalancerStatus] = (),
) -> Topology:
    """Puts together what the bridge has answered; with an earlier status, with rates."""
    from taploom.contracts.taploom.bridge.v1 import ComponentState

    rates = {} if before is None else rates_between(before, now)
    links = {link.endpoint.id: link for link in now.links if link.endpoint is not None}
    groups: dict[str, list[str]] = {}
    for group in policy.groups:
        for member in group.members:
            groups.setdefault(member, []).append(group.name)
    defaults = {one.network: (one.default.name or "").lower().replace("_", "-") for one in policy.networks}
    found = []
    for network in sorted(networks, key=lambda one: one.name):
        if (network.driver or _SWITCHED) != _SWITCHED:
            continue
        places = [
            Place(
                id=endpoint.id,
                guest=endpoint.guest_name,
                interface=endpoint.interface_name,
                mac_address=endpoint.mac_address,
                addresses=tuple(endpoint.addresses),
                aliases=tuple(endpoint.aliases),
                up=endpoint.link_up,
                problem="" if endpoint.link_up else _problem(links.get(endpoint.id)),
                groups=tuple(groups.get(f"{endpoint.guest_name}@{network.name}", ())),
                rates=rates.get(endpoint.id),
                carried=is_carried(endpoint.driver_options),
                **_limits(endpoint),
                **_totals(links.get(endpoint.id)),
            )
            for endpoint in network.endpoints
        ]
        found.append(
            Net(
                id=network.id,
                name=network.name,
                subnets=tuple(network.subnets),
                gateways=tuple(network.gateways),
                ways_out=_ways_out(network),
                internal=network.internal,
                isolated=parse_bool(network.options.get(OPTION_ICC, "")) is False,
                policy=defaults.get(network.name, "allow"),
                mtu=network.mtu,
                labels=dict(sorted(network.labels.items())),
                places=tuple(places),
                balancers=tuple(_shared(network.name, one) for one in balancers if _is_on(one, network.name)),
                vlan=str(place_of(network.options) or ""),
            )
        )
    assert now.time is not None
    return Topology(
        time=now.time,
        converged=now.converged,
        networks=tuple(found),
        unconnected=tuple(guest.name for guest in guests if not guest.endpoints),
        down=tuple(guest.name for guest in guests if not guest.connected),
        ailing=tuple(
            Part(one.name, (one.state.name or "unknown").lower(), clean_text(one.problem))
            for one in now.components
            if one.state != ComponentState.OK
        ),
        pending=tuple((clean_text(one.subject), clean_text(one.reason)) for one in now.pending),
    )


def _problem(link: Link | None) -> str:
    return clean_text(link.problem) if link is not None and link.problem else "its link is down"


def _is_on(balancer: BalancerStatus, network: str) -> bool:
    return any(one.network == network for one in balancer.addresses)


def _shared(network: str, status: BalancerStatus) -> Shared:
    from taploom.contracts.taploom.bridge.v1 import BackendHealth

    assert status.balancer is not None
    good = (BackendHealth.UP, BackendHealth.UNSPECIFIED)
    return Shared(
        name=status.balancer.name,
        addresses=tuple(one.address for one in status.addresses if one.network == network),
        ports=tuple(f"{p.port}{'' if p.protocol == 'tcp' else '/' + p.protocol}" for p in status.balancer.ports),
        backends=tuple(sorted({one.guest_name for one in status.backends})),
        down=tuple(sorted({one.guest_name for one in status.backends if one.health not in good})),
        published=tuple(
            f"[{p.host_ip}]:{p.host_port}" if ":" in p.host_ip else f"{p.host_ip}:{p.host_port}"
            for p in status.published
        ),
    )


def _limits(endpoint: Endpoint) -> dict[str, int]:
    from taploom.contracts.taploom.bridge.v1 import QosDirection

    names = {QosDirection.OUT: ("sent_limit",), QosDirection.IN: ("received_limit",)}
    both = ("sent_limit", "received_limit")
    found: dict[str, int] = {}
    for rule in endpoint.qos:
        found |= dict.fromkeys(names.get(rule.direction, both), rule.rate_bits_per_second)
    return found


def _totals(link: Link | None) -> dict[str, int]:
    if link is None:
        return {}
    return {"sent_bytes": link.tx_bytes, "received_bytes": link.rx_bytes, "drops": link.drops}


def _ways_out(network: Network) -> dict[int, str]:
    masquerades = parse_bool(network.options.get(OPTION_MASQUERADE, "")) is not False
    found = {}
    for address in () if network.internal else network.uplink_addresses:
        family = 6 if ":" in address else 4
        routed = Addressing(network.options).mode(family) == ROUTED
        found[family] = "routed" if routed or not masquerades else "nat"
    return found

"""Follows a connection: who it is from and to by what is desired, and its packets by the helper's trace.

What is looked at, in order: who the source is and whether it runs; what the name is for it; by which of its networks it
sends; whether its link is up; what OVN makes of the packet (policy, isolation, address translation, routes); and
whether the link of the one that gets it is up. The first that stops it ends the way.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from host_bridge.addressing import ROUTED
from host_bridge.balancer.publishing import BalancerPorts
from host_bridge.describe import published_ports
from host_bridge.errors import GuestNotFoundError, InvalidError, PreconditionError
from host_bridge.fabric import Fabric
from host_bridge.ipam import is_address
from host_bridge.model import GuestRecord, NetworkRecord
from host_bridge.policy.model import DENY, DENY_IN, DENY_OUT, IN
from host_bridge.ports import PortPublisher
from host_bridge.trace import ways
from host_bridge.trace.question import HOST_WORDS, PROTOCOLS, Question, conclude
from host_bridge.trace.ways import Place
from host_bridge.trace.words import STOPS, UNKNOWN, Teller, step
from taploom.contracts.taploom.bridge.v1 import TracePath, TraceResponse, TraceStep, TraceTopic
from taploom.contracts.taploom.helper import v1 as helper
from taploom.rpc import RpcError

_TIMEOUT = 15.0
# Addresses of a shared name that are followed.
_MOST_PATHS = 8


@dataclass(frozen=True, slots=True)
class _Published:
    """A port of the host that leads to a container, or to a load balancer, at one of `targets`."""

    owner: str
    balanced: bool
    protocol: str
    host_ip: str
    host_port: int
    port: int
    targets: tuple[str, ...]


class ConnectionTracer:
    """Answers questions about one fabric.

    Args:
        fabric: the fabric.
        publisher: tells what containers publish.
        balancer_ports: tells what load balancers publish.
    """

    def __init__(self, fabric: Fabric, publisher: PortPublisher, balancer_ports: BalancerPorts) -> None:
        self._fabric = fabric
        self._store = fabric.desired.store
        self._policies = fabric.desired.policies
        self._publisher = publisher
        self._balancer_ports = balancer_ports
        self._balancers = fabric.desired.balancers

    async def trace(self, asked: Question) -> TraceResponse:
        """Whether and why the connection would pass.

        Raises:
            NotFoundError: there is no such source.
            InvalidError, PreconditionError: it cannot be asked.
        """
        if self._fabric.helper.lacks(helper.HelperFeature.TRACE):
            raise PreconditionError(
                "the helper is too old to follow packets, or has no ovn-trace: update it (Debian: ovn-common)"
            )
        response = TraceResponse()
        source = self._source(asked.source)
        if isinstance(source, TraceStep):
            response.steps.append(source)
        elif source is None:
            await self._from_host(asked, response)
        else:
            guest, own = source
            await self._from_guest(asked, guest, own, response)
        conclude(asked, response)
        return response

    # Who

    def _places(self) -> list[Place]:
        guests = {guest.id: guest for guest in self._store.guests()}
        networks = {network.id: network for network in self._store.networks()}
        return [
            Place(endpoint, guests[endpoint.guest_id], networks[endpoint.network_id])
            for endpoint in self._store.endpoints()
        ]

    def _source(self, text: str) -> tuple[GuestRecord, list[Place]] | TraceStep | None:
        """A guest and its places; a step that says why there is none; None: the host."""
        places = self._places()
        if is_address(text):
            wanted = ipaddress.ip_address(text)
            for place in places:
                if any(ipaddress.ip_address(one) == wanted for one in place.endpoint.addresses):
                    return place.guest, [place]
            raise InvalidError(f"nobody has the address {text}")
        try:
            guest = self._fabric.desired.find_guest(text)
        except GuestNotFoundError:
            stopped = self._stopped(text)
            if stopped:
                return step(TraceTopic.LINK, f"container {stopped} does not run", STOPS)
            if text in HOST_WORDS:
                return None
            raise
        return guest, [place for place in places if place.guest.id == guest.id]

    def _stopped(self, text: str) -> str:
        """The name of a container that is there and has no guest; empty: there is none."""
        guests = {guest.id for guest in self._store.guests()}
        for container in self._store.containers():
            if container.id not in guests and (container.name == text or container.id.startswith(text)):
                return container.name
        return ""

    # From a guest

    async def _from_guest(
        self, asked: Question, guest: GuestRecord, own: Sequence[Place], response: TraceResponse
    ) -> None:
        peer = self._fabric.guests.get(guest.id)
        if peer is not None and not peer.connected:
            text = f"note: the agent of {guest.name} does not answer ({peer.problem}); its links may be up all the same"
            response.steps.append(step(TraceTopic.LINK, text))
        if not own:
            response.steps.append(step(TraceTopic.LINK, f"{guest.name} is on no network", STOPS))
            return
        addresses = self._addresses(asked, guest, own, response.steps)
        for address in addresses[:_MOST_PATHS]:
            response.paths.append(await self._path(asked, guest, own, address))

    def _balanced(self) -> dict[tuple[str, str], list[str]]:
        """The addresses of load balancers, by network id and name in lower case."""
        found: dict[tuple[str, str], list[str]] = {}
        for name, balancer in self._balancers.balancers.items():
            for one in self._balancers.addresses(name):
                network_id = self._store.network_id_of(one.network) or ""
                found.setdefault((network_id, balancer.known_as.lower()), []).append(one.address)
        return found

    def _addresses(
        self, asked: Question, guest: GuestRecord, own: Sequence[Place], steps: list[TraceStep]
    ) -> list[str]:
        """The addresses that the target has for the guest; none, and a step that says why."""
        if is_address(asked.target):
            return [asked.target]
        found = ways.resolve(asked.target, guest, own, self._places(), self._balanced())
        if found is None and asked.target in HOST_WORDS:
            gateways = self._gateways(own)
            text = f"the host is reached at the gateway: {' '.join(gateways)}"
            steps.append(step(TraceTopic.NAME, text))
            return self._of_family(asked, gateways, steps)
        if found is None:
            self._unknown_name(asked.target, guest, own, steps)
            return []
        text = f"{asked.target} is {' '.join(found.addresses) or 'without an address'}: {found.how}"
        steps.append(step(TraceTopic.NAME, text, network=found.network))
        usable = self._of_family(asked, found.addresses, steps)
        # Of a family that the guest has no address of, programs try no address as long as there are others.
        families = {ipaddress.ip_address(a).version for place in own for a in place.endpoint.addresses}
        return [a for a in usable if ipaddress.ip_address(a).version in families] or usable

    @staticmethod
    def _of_family(asked: Question, addresses: Iterable[str], steps: list[TraceStep]) -> list[str]:
        usable = [a for a in addresses if asked.family in (0, ipaddress.ip_address(a).version)]
        if not usable:
            what = f"IPv{asked.family} " if asked.family else ""
            steps.append(step(TraceTopic.NAME, f"{asked.target} has no {what}address", STOPS))
        return usable

    @staticmethod
    def _gateways(own: Sequence[Place]) -> list[str]:
        """The gateways of the network that leads to the outside or, where none does, of all."""
        for somewhere in ("192.0.2.1", "2001:db8::1"):  # set apart for documentation: in nobody's subnet
            found = ways.route(somewhere, own)
            if found is not None:
                return [subnet.gateway for subnet in found.place.network.subnets if found.place.address(subnet.family)]
        return [subnet.gateway for place in own for subnet in place.network.subnets]

    def _unknown_name(self, name: str, guest: GuestRecord, own: Sequence[Place], steps: list[TraceStep]) -> None:
        asked = [place.network.name for place in ways.name_order(own) if place.network.dns_server]
        text = f"no network that {guest.name} is on knows {name} (asked: {' '.join(asked) or 'none'})"
        elsewhere = sorted({p.network.name for p in self._places() if p.guest.name.lower() == name.lower()})
        stopped = self._stopped(name)
        upstreams = guest.settings.dns or tuple(self._fabric.upstreams)
        if elsewhere:
            text += f": guest {name} is on {' and '.join(elsewhere)} only"
        elif stopped:
            text += f": container {stopped} does not run"
        elif any(one.name.lower() == name.lower() for one in self._store.guests()):
            text += f": guest {name} is on no network"
        elif upstreams:
            text += f"; {' '.join(upstreams)} is asked for it: give the address that this answers"
            steps.append(step(TraceTopic.NAME, text, UNKNOWN))
            return
        steps.append(step(TraceTopic.NAME, f"{text}: NXDOMAIN", STOPS))

    async def _path(self, asked: Question, guest: GuestRecord, own: Sequence[Place], address: str) -> TracePath:
        path = TracePath(destination_address=address)
        destination = ipaddress.ip_address(address)
        mine = next((p for p in own if any(ipaddress.ip_address(a) == destination for a in p.endpoint.addresses)), None)
        if mine is not None or destination.is_loopback:
            path.source_address = address
            path.steps.append(
                step(TraceTopic.DELIVERY, f"{address} is {guest.name}'s own: it does not leave the guest")
            )
            return path
        route = ways.route(address, own)
        if route is None:
            text = f"{guest.name} has no route to {address}: {_no_route(own, destination.version)}"
            path.steps.append(step(TraceTopic.ROUTE, text, STOPS))
            return path
        place = route.place
        path.source_address = place.address(destination.version) or ""
        name = place.network.name
        text = f"by {name} ({place.endpoint.interface_name}): {route.why}"
        path.steps.append(step(TraceTopic.ROUTE, text, network=name))
        if not self._link(path, place):
            return path
        text = f"{guest.name} sends from its own {path.source_address}, as port security asks"
        path.steps.append(step(TraceTopic.PORT_SECURITY, text))
        target = self._holder(address, place.network if route.direct else None)
        request = helper.TracePacketRequest(
            endpoint_id=place.endpoint.id,
            destination=address,
            protocol=PROTOCOLS[asked.protocol],
            port=asked.port,
        )
        await self._follow(asked, path, request, place, target)
        return path

    # From outside

    async def _from_host(self, asked: Question, response: TraceResponse) -> None:
        """By a published port: the target is a guest, or an address and port of the host."""
        if asked.protocol == "icmp":
            text = "from outside, nothing but published TCP and UDP ports is reached"
            response.steps.append(step(TraceTopic.NAT, text, STOPS))
            return
        found = self._published(asked)
        if isinstance(found, str):
            response.steps.append(step(TraceTopic.NAT, found, STOPS))
            return
        for one in found:
            # As docker-proxy: over the other family where the container has only that.
            v6 = ":" in one.host_ip
            address = next((a for a in one.targets if (":" in a) == v6), one.targets[0] if one.targets else "")
            known = any(path.destination_address == address for path in response.paths)
            if address and not known and asked.family in (0, ipaddress.ip_address(address).version):
                response.paths.append(await self._published_path(asked, one, address))
        if not response.paths:
            text = "what is published leads to no address of that kind"
            response.steps.append(step(TraceTopic.NAT, text, STOPS))

    def _published(self, asked: Question) -> list[_Published] | str:
        """Published ports that the connection may come by; or why there is none."""
        everything = self._everything()
        found = [one for one in everything if one.protocol == asked.protocol]
        balancer = self._balancers.balancers.get(asked.target)
        who = None if balancer is not None else self._target_guest(asked.target)
        if balancer is None and who is None:
            stopped = self._stopped(asked.target)
            if stopped:
                return f"container {stopped} does not run"
            if asked.target not in (*HOST_WORDS, "localhost") and not is_address(asked.target):
                return f"{asked.target} is no guest, no load balancer and no address of the host"
            found = [one for one in found if one.host_port == asked.port and _listens(one.host_ip, asked.target)]
            return found or f"the host has not published {asked.service} there"
        name = balancer.name if balancer is not None else who.name if who is not None else ""
        own = [one for one in everything if one.owner == name and one.balanced == (balancer is not None)]
        found = [one for one in own if one.protocol == asked.protocol and one.port == asked.port]
        if found:
            return found
        routed = self._routed(who, asked) if who is not None else ""
        if routed:
            return (
                f"{asked.service} of {name} is open to who has a route to {routed}, whose gateway mode is routed; the "
                "host itself publishes nothing of it"
            )
        listed = sorted({f"{one.port}/{one.protocol}" for one in own})
        has = f"it has published {' '.join(listed)}" if listed else "it has published nothing"
        return f"{asked.service} of {name} is not published ({has}): it is not reached from outside the networks"

    def _everything(self) -> list[_Published]:
        """All that is published."""
        found = [
            _Published(
                owner=guest.name,
                balanced=False,
                protocol=port.protocol,
                host_ip=port.host_ip,
                host_port=port.host_port,
                port=port.container_port,
                targets=self._publisher.target(guest.id),
            )
            for guest in self._store.guests()
            for port in self._publisher.published(guest.id)
        ]
        for name, balancer in self._balancers.balancers.items():
            targets = tuple(one.address for one in self._balancers.addresses(name))
            found += [
                _Published(
                    owner=name,
                    balanced=True,
                    protocol=one.protocol,
                    host_ip=one.host_ip or "0.0.0.0",  # noqa: S104 - shown, not bound
                    host_port=one.host_port,
                    port=one.port,
                    targets=targets,
                )
                for one in self._balancer_ports.published(balancer)
            ]
        return found

    def _routed(self, guest: GuestRecord, asked: Question) -> str:
        """The network by which a port of a container is open without being the host's; empty: there is none."""
        container = self._store.container(guest.id)
        if container is None or (asked.protocol, asked.port) not in published_ports(container.config):
            return ""
        for place in self._places():
            network = place.network
            if place.guest.id == guest.id and any(network.addressing.mode(s.family) == ROUTED for s in network.subnets):
                return network.name
        return ""

    def _target_guest(self, text: str) -> GuestRecord | None:
        if is_address(text):
            holder = self._holder(text, None)
            return None if holder is None else holder.guest
        try:
            return self._fabric.desired.find_guest(text)
        except GuestNotFoundError:
            return None

    async def _published_path(self, asked: Question, one: _Published, address: str) -> TracePath:
        path = TracePath(destination_address=address)
        host = f"[{one.host_ip}]" if ":" in one.host_ip else one.host_ip
        holder = self._holder(address, None)
        network = holder.network if holder is not None else self._network_with(one, address)
        where = f" on {network.name}" if network is not None else ""
        text = f"{host}:{one.host_port} of the host is published: it leads to port {one.port} of {one.owner}"
        path.steps.append(step(TraceTopic.NAT, f"{text} at {address}{where}"))
        if network is None:
            path.steps.append(step(TraceTopic.LINK, f"nobody has {address} any more", STOPS))
            return path
        request = helper.TracePacketRequest(
            network_id=network.id, destination=address, protocol=PROTOCOLS[asked.protocol], port=one.port
        )
        await self._follow(asked, path, request, None, holder)
        return path

    def _network_with(self, one: _Published, address: str) -> NetworkRecord | None:
        """The network on which a load balancer has an address."""
        if not one.balanced:
            return None
        places = [place for place in self._balancers.addresses(one.owner) if place.address == address]
        network_id = self._store.network_id_of(places[0].network) if places else None
        return self._store.network(network_id) if network_id is not None else None

    # The packet

    def _holder(self, address: str, network: NetworkRecord | None) -> Place | None:
        """Who has an address, on one network or on any."""
        wanted = ipaddress.ip_address(address)
        for place in self._places():
            if network is not None and place.network.id != network.id:
                continue
            if any(ipaddress.ip_address(one) == wanted for one in place.endpoint.addresses):
                return place
        return None

    def _link(self, path: TracePath, place: Place) -> bool:
        """Says how a place's link is; False when it is not up."""
        carrier = self._fabric.desired.store.carrier_of(place.endpoint)
        link = self._fabric.links.get(place.endpoint.id if carrier is None else carrier.id)
        name, network = place.guest.name, place.network.name
        if link is not None and link.up:
            path.steps.append(step(TraceTopic.LINK, f"the link of {name} on {network} is up", network=network))
            return True
        if link is not None:
            why = link.waits_for()
        else:
            why = self._fabric.helper.waits_for(place.endpoint.id) or "it is just being removed"
        path.steps.append(step(TraceTopic.LINK, f"the link of {name} on {network} is down: {why}", STOPS))
        return False

    async def _follow(
        self,
        asked: Question,
        path: TracePath,
        request: helper.TracePacketRequest,
        source: Place | None,
        target: Place | None,
    ) -> None:
        """Has the helper follow the packet and tells what it met."""
        try:
            found = await self._fabric.helper.trace(request, _TIMEOUT)
        except RpcError as error:
            text = f"the helper cannot say what becomes of it: {error.message or error.code.name}"
            path.steps.append(step(TraceTopic.DELIVERY, text, UNKNOWN))
            return
        pending = self._fabric.policy_pending()
        if pending:
            text = f"note: the policy is not enforced yet as it is recorded: {pending}"
            path.steps.append(step(TraceTopic.POLICY, text))
        if not found.source_up:
            text = "the port of the source is not programmed in the data path yet"
            path.steps.append(step(TraceTopic.LINK, text, STOPS))
        reached = self._reached(found)
        teller = Teller(
            path,
            source,
            reached or target,
            network_name=self._fabric.desired.network_name,
            rule=self._policies.rule_of,
            denied_by=self._denied_by,
        )
        teller.tell(found)
        outcome = helper.TraceOutcome
        if found.outcome == outcome.DELIVERED:
            self._delivered(asked, path, found, reached)
        elif found.outcome == outcome.LEFT:
            self._left(path, found, request, source, target)
        elif found.outcome == outcome.HOST:
            text = f"the host is asked for {asked.service}: what listens there decides"
            path.steps.append(step(TraceTopic.DELIVERY, text))
        elif found.outcome == outcome.ANSWERED:
            path.steps.append(step(TraceTopic.DELIVERY, f"the helper answers for {request.destination}"))
        elif found.outcome == outcome.UNANSWERED:
            where = source.network.name if source is not None else "the network"
            text = f"nobody on {where} has {request.destination}: ARP or neighbour discovery is not answered"
            path.steps.append(step(TraceTopic.DELIVERY, text, STOPS))
        elif found.outcome == outcome.UNSPECIFIED:
            text = "OVN's trace ends in a way that is not known here (--ovn shows it)"
            path.steps.append(step(TraceTopic.DELIVERY, text, UNKNOWN))
        elif not any(one.verdict == STOPS for one in path.steps):
            path.steps.append(step(TraceTopic.DELIVERY, "OVN drops it (--ovn shows where)", STOPS))

    def _reached(self, found: helper.TracePacketResponse) -> Place | None:
        return next((place for place in self._places() if place.endpoint.id == found.endpoint_id), None)

    def _delivered(
        self, asked: Question, path: TracePath, found: helper.TracePacketResponse, reached: Place | None
    ) -> None:
        if reached is None:
            path.steps.append(step(TraceTopic.DELIVERY, "an endpoint gets it that has just gone", STOPS))
            return
        if not self._link(path, reached):
            return
        if not found.destination_up:
            text = f"the port of {reached.guest.name} is not programmed in the data path yet"
            path.steps.append(step(TraceTopic.LINK, text, STOPS))
            return
        peer = self._fabric.guests.get(reached.guest.id)
        if peer is not None and not peer.connected:
            text = f"note: the agent of {reached.guest.name} does not answer ({peer.problem})"
            path.steps.append(step(TraceTopic.LINK, text))
        text = f"{reached.guest.name} gets it on {reached.network.name} ({reached.endpoint.interface_name})"
        more = ": what listens there decides" if asked.port else ""
        path.steps.append(step(TraceTopic.DELIVERY, text + more, network=reached.network.name))

    @staticmethod
    def _left(
        path: TracePath,
        found: helper.TracePacketResponse,
        request: helper.TracePacketRequest,
        source: Place | None,
        target: Place | None,
    ) -> None:
        vlan = None if source is None else source.network.vlan
        if vlan is not None:
            text = f"it leaves by {vlan} for {request.destination}: who is there decides"
            path.steps.append(step(TraceTopic.DELIVERY, text))
            return
        if target is not None:
            text = (
                f"{request.destination} is {target.guest.name}'s on {target.network.name}: networks do not reach one "
                "another"
            )
            path.steps.append(step(TraceTopic.ISOLATION, text, STOPS))
            return
        text = f"it leaves the helper for {request.destination} outside"
        if not any(hop.translation is not None and not hop.translation.destination for hop in found.hops):
            text += " with the guest's own address: answers need a route back"
        path.steps.append(step(TraceTopic.DELIVERY, text))

    def _denied_by(self, place: Place, direction: str) -> list[str]:
        """What denies a place what no rule allows, for people."""
        groups = self._policies.restricting(place.endpoint, place.guest, place.network, direction)
        default = self._policies.default_of(place.network)
        reasons = []
        if groups:
            what = "come in" if direction == IN else "go out"
            many = "groups" if len(groups) > 1 else "group"
            reasons.append(f"{many} {' and '.join(groups)} {'say' if len(groups) > 1 else 'says'} what may {what}")
        if default in (DENY, DENY_IN if direction == IN else DENY_OUT):
            reasons.append(f"network {place.network.name} denies by default")
        return reasons


def _listens(host_ip: str, wanted: str) -> bool:
    """Whether a port published at one address of the host is reached at another, or at any (host)."""
    if wanted in HOST_WORDS:
        return True
    address = ipaddress.ip_address(host_ip)
    if wanted == "localhost":
        return address.is_unspecified or address.is_loopback
    other = ipaddress.ip_address(wanted)
    return address.version == other.version and (address.is_unspecified or address == other)


def _no_route(own: Sequence[Place], family: int) -> str:
    if not any(place.address(family) for place in own):
        return f"it has no IPv{family} address"
    networks = sorted({place.network.name for place in own if place.network.internal})
    if networks:
        return f"{' and '.join(networks)} {'are' if len(networks) > 1 else 'is'} internal, and no network leads there"
    return "no network leads there"

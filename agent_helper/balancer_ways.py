"""Ways from networks to backends that are on another one: computed here, written by `balancer_rows`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from agent_helper.balancer import Around, BalancerSpec, backends_of
from agent_helper.northbound import uplink_port
from agent_helper.spec import Address, Leg, legs

# Above all rules of policies (`policy_rows`): networks do not reach one another whatever these say.
_CLOSED = 32000
# As the rule that lets routers speak with the kernel, above the one that lets them not speak with each other.
_OPEN = 1001


@dataclass(frozen=True)
class Way:
    """From the network `far` to backends on `home`, in one family.

    Attributes:
        places: backends' protocols, addresses and ports.
    """

    far: str
    home: str
    version: int
    far_leg: Leg
    home_leg: Leg
    places: tuple[tuple[str, Address, int], ...]

    @property
    def addresses(self) -> tuple[Address, ...]:
        """The backends' addresses, each once, in order."""
        return tuple(sorted({address for _, address, _ in self.places}, key=int))

    def routes(self, network_id: str) -> list[dict[str, object]]:
        """What a network's router is to know of it."""
        if network_id == self.far:
            length = self.home_leg.subnet.max_prefixlen
            nexthop = str(self.home_leg.address.ip)
            return [{"ip_prefix": f"{address}/{length}", "nexthop": nexthop} for address in self.addresses]
        if network_id == self.home:
            return [{"ip_prefix": str(self.far_leg.subnet), "nexthop": str(self.far_leg.address.ip)}]
        return []

    def inside(self) -> list[dict[str, object]]:
        """The rules on the switch of `far`: backends are reached by way of the load balancer only, and only answer."""
        ip, there = f"ip{self.version}", _set(map(str, self.addresses))
        return [
            # Looked at before the load balancer chooses; later packets of a connection have been translated by then.
            {
                "priority": _CLOSED,
                "direction": "from-lport",
                "match": f"!ct.dnat && {ip}.dst == {there}",
                "action": "drop",
            },
            # Answers pass before any rule: they belong to connections that the load balancer has sent there.
            {"priority": _CLOSED, "direction": "to-lport", "match": f"{ip}.src == {there}", "action": "drop"},
        ]

    def outside(self) -> list[dict[str, object]]:
        """The rules on the uplink's switch: from router to router, connections to backends and their answers."""
        ip, far, home = f"ip{self.version}", uplink_port(self.far), uplink_port(self.home)
        found: list[dict[str, object]] = []
        for protocol, port in sorted({(protocol, port) for protocol, _, port in self.places}):
            at = _set(str(a) for a in self.addresses if (protocol, a, port) in self.places)
            there = f'inport == "{far}" && outport == "{home}" && {ip}.dst == {at} && {protocol}.dst == {port}'
            back = (
                f'inport == "{home}" && outport == "{far}" && {ip}.src == {at} && {ip}.dst == {self.far_leg.subnet}'
                f" && {protocol}.src == {port}"
            )
            found += [
                {"priority": _OPEN, "direction": "to-lport", "match": match, "action": "allow"}
                for match in (there, back)
            ]
        return found


def leads_to(far: str, home: str, version: int, around: Around) -> bool:
    """Whether there can be a way from a network to another, or it is the same."""
    return far == home or _legs(far, home, version, around) is not None


def ways_of(balancers: Iterable[BalancerSpec], around: Around) -> list[Way]:
    """The ways that load balancers need, one for each two networks and family."""
    found: dict[tuple[str, str, int], set[tuple[str, Address, int]]] = {}
    for balancer in balancers:
        for frontend in balancer.frontends:
            if frontend.network_id == balancer.network_id:
                continue
            versions: set[int] = {address.version for address in frontend.addresses}
            for version in sorted(versions):
                places = found.setdefault((frontend.network_id, balancer.network_id, version), set())
                for port in balancer.ports:
                    backends = backends_of(balancer, port.target, version, around)
                    places |= {(port.protocol, backend.address, backend.target) for backend in backends}
    ways: list[Way] = []
    for (far, home, version), places in sorted(found.items()):
        pair = _legs(far, home, version, around)
        if pair is not None and places:
            ways.append(Way(far, home, version, *pair, tuple(sorted(places, key=str))))
    return ways


def _legs(far: str, home: str, version: int, around: Around) -> tuple[Leg, Leg] | None:
    """Where the networks' routers meet in a family."""
    if far not in around.networks or home not in around.networks:
        return None
    found = [
        next((leg for leg in legs(around.networks[one], around.uplink) if leg.subnet.version == version), None)
        for one in (far, home)
    ]
    first, second = found
    return (first, second) if first is not None and second is not None else None


def _set(values: Iterable[str]) -> str:
    return "{" + ", ".join(values) + "}"

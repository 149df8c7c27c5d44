"""Load balancers as values: what a file says, checked, and what the database holds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from host_bridge.selectors import Selector
from host_bridge.values import line_field

TCP, UDP = "tcp", "udp"
PROTOCOLS = (TCP, UDP)

# The label of a container that makes it a backend: this and the load balancer's name.
LABEL = "taploom.lb."


@dataclass(frozen=True, slots=True)
class Port:
    """A port that is connected to, and where backends listen."""

    port: int
    target: int
    protocol: str = TCP
    line: int = line_field()


@dataclass(frozen=True, slots=True)
class Backend:
    """Guests that take a share; they listen at `target` instead of the ports' own unless it is 0."""

    selector: Selector
    target: int = 0
    line: int = line_field()


@dataclass(frozen=True, slots=True)
class HealthCheck:
    """How backends are checked; times are in seconds."""

    interval: int = 5
    timeout: int = 2
    failures: int = 3
    successes: int = 1
    line: int = line_field()


@dataclass(frozen=True, slots=True)
class Publish:
    """A port of the host that leads to a port of the load balancer. `host_port` 0 is any that is free."""

    host_port: int
    port: int
    protocol: str = TCP
    host_ip: str = ""
    line: int = line_field()


@dataclass(frozen=True, slots=True)
class Place:
    """A network by its name, and with an address what the load balancer is to have there."""

    network: str
    address: str = ""
    line: int = line_field()


@dataclass(frozen=True, slots=True)
class Balancer:
    """A load balancer on `network`, where its backends are, and on the networks in `also`."""

    name: str
    network: str
    ports: tuple[Port, ...]
    backends: tuple[Backend, ...] = ()
    addresses: tuple[Place, ...] = ()
    dns_name: str = ""
    affinity: bool = False
    health: HealthCheck | None = None
    publish: tuple[Publish, ...] = ()
    also: tuple[Place, ...] = ()
    line: int = line_field()

    @property
    def networks(self) -> tuple[str, ...]:
        """The networks that it has addresses on: its own, then the others."""
        return (self.network, *(place.network for place in self.also))

    @property
    def known_as(self) -> str:
        """What DNS calls it."""
        return self.dns_name or self.name


def from_json(name: str, text: str) -> Balancer:
    """A load balancer that `values.to_json` wrote."""
    value = json.loads(text)

    def each(key: str, kind: Any) -> tuple[Any, ...]:
        return tuple(kind(**one) for one in value.get(key, ()))

    backends = tuple(Backend(**{**one, "selector": Selector(**one["selector"])}) for one in value.get("backends", ()))
    return Balancer(
        **{
            **value,
            "name": name,
            "ports": each("ports", Port),
            "backends": backends,
            "addresses": each("addresses", Place),
            "health": HealthCheck(**value["health"]) if "health" in value else None,
            "publish": each("publish", Publish),
            "also": each("also", Place),
        }
    )

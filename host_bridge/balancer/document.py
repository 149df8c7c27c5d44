"""Load balancers as people write them: YAML, read strictly (see `host_bridge.documents`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import yaml

from host_bridge.balancer.model import Backend, Balancer, HealthCheck, Place, Port, Publish
from host_bridge.balancer.parts import parse_port, parse_publish, parse_seconds
from host_bridge.documents import (
    DocumentError,
    Fields,
    boolean_of,
    composed,
    line_of,
    list_of,
    number_of,
    scalar_of,
    text_of,
)
from host_bridge.selectors import Selector

T = TypeVar("T")

_KEYS = ("network", "address", "name", "ports", "backends", "affinity", "health", "publish", "also")
_SELECTORS = ("guest", "alias", "label")


def read(text: str) -> tuple[Balancer, ...]:
    """Reads load balancers.

    Raises:
        DocumentError: the first thing that is wrong.
    """
    top = Fields(composed(text, "'balancers:'"), "the file", ("balancers",))
    return tuple(_balancer(key, node) for key, node in top.items("balancers", "names of load balancers"))


def _balancer(key: tuple[str, int], node: yaml.Node) -> Balancer:
    name, line = key
    fields = Fields(node, f"balancer {name}", _KEYS)
    if "network" not in fields:
        raise DocumentError(line, f"balancer {name} has no network: write 'network: NAME'")
    network = fields.get("network", text_of, "")
    nowhere: tuple[tuple[Place, ...], tuple[Place, ...]] = ((), ())
    also, there = fields.get("also", lambda n, k: _also(n), nowhere)
    nothing: tuple[Place, ...] = ()
    return Balancer(
        name,
        network,
        fields.get("ports", lambda n, k: tuple(_port(one) for one in _several(n, k)), ()),
        fields.get("backends", lambda n, k: tuple(_backend(one) for one in list_of(n, k)), ()),
        (*fields.get("address", lambda n, k: _addresses(n, network), nothing), *there),
        fields.get("name", text_of, ""),
        fields.get("affinity", boolean_of, False),
        fields.get("health", lambda n, k: _health(n), None),
        fields.get("publish", lambda n, k: tuple(_publish(one) for one in _several(n, k)), ()),
        also,
        line,
    )


def _several(node: yaml.Node, key: str) -> list[yaml.Node]:
    """One, or a list of them."""
    return list_of(node, key) if isinstance(node, yaml.SequenceNode) else [node]


def _addresses(node: yaml.Node, network: str) -> tuple[Place, ...]:
    return tuple(Place(network, scalar_of(one, "address"), line_of(one)) for one in _several(node, "address"))


def _also(node: yaml.Node) -> tuple[tuple[Place, ...], tuple[Place, ...]]:
    """Other networks, and the addresses that are to be had there."""
    if isinstance(node, yaml.MappingNode):
        fields = Fields(node, "'also' (names of networks)", None)
        places = tuple(Place(name, line=fields.lines[name]) for name in fields)
        return places, tuple(one for name in fields for one in _addresses(fields.node(name), name))
    return tuple(Place(text_of(one, "also"), line=line_of(one)) for one in _several(node, "also")), ()


def _port(node: yaml.Node) -> Port:
    if isinstance(node, yaml.MappingNode):
        fields = Fields(node, "a port", ("port", "target", "protocol"))
        if "port" not in fields:
            raise DocumentError(fields.line, "a port without 'port': write the one that is connected to")
        port = fields.get("port", number_of, 0)
        protocol = fields.get("protocol", text_of, "tcp")
        return Port(port, fields.get("target", number_of, port), protocol, fields.line)
    return _short(node, "ports", parse_port)


def _publish(node: yaml.Node) -> Publish:
    return _short(node, "publish", parse_publish)


def _short(node: yaml.Node, key: str, parse: Callable[[str, int], T]) -> T:
    try:
        return parse(scalar_of(node, key), line_of(node))
    except ValueError as error:
        raise DocumentError(line_of(node), str(error)) from None


def _backend(node: yaml.Node) -> Backend:
    fields = Fields(node, "a backend", (*_SELECTORS, "port"))
    values = {name: fields.get(name, text_of, "") for name in _SELECTORS}
    for name in fields:
        if name != "port" and not values[name]:
            raise DocumentError(fields.lines[name], f"{name!r} is empty: write a name, or leave it out")
    target = fields.get("port", number_of, 0)
    if "port" in fields and not target:
        raise DocumentError(fields.lines["port"], "port 0 is no port: write where the backend listens, or leave it out")
    return Backend(Selector(**values, line=fields.line), target, fields.line)


def _health(node: yaml.Node) -> HealthCheck:
    if isinstance(node, yaml.ScalarNode) and boolean_of(node, "health"):
        return HealthCheck(line=line_of(node))
    if isinstance(node, yaml.ScalarNode):
        raise DocumentError(line_of(node), "'health: false' is said by leaving it out")
    fields = Fields(node, "'health'", ("interval", "timeout", "failures", "successes"))
    default = HealthCheck()

    def seconds(value: yaml.Node, key: str) -> int:
        return _short(value, key, lambda text, line: parse_seconds(text))

    return HealthCheck(
        fields.get("interval", seconds, default.interval),
        fields.get("timeout", seconds, default.timeout),
        fields.get("failures", number_of, default.failures),
        fields.get("successes", number_of, default.successes),
        fields.line,
    )

"""Load balancers as contract messages (`taploom.bridge.v1`), both ways."""

from __future__ import annotations

from host_bridge.balancer.model import Backend, Balancer, HealthCheck, Place, Port, Publish
from host_bridge.selectors import Selector
from taploom.contracts.taploom.bridge import v1 as bridge


def to_message(balancer: Balancer) -> bridge.Balancer:
    """A load balancer."""
    health = balancer.health
    return bridge.Balancer(
        name=balancer.name,
        network=balancer.network,
        addresses=[address_message(place) for place in balancer.addresses],
        dns_name=balancer.dns_name,
        ports=[
            bridge.BalancerPort(port=one.port, target_port=one.target, protocol=one.protocol, line=one.line)
            for one in balancer.ports
        ],
        backends=[
            bridge.BalancerBackend(
                selector=bridge.PolicySelector(**one.selector.given(), line=one.selector.line),
                target_port=one.target,
                line=one.line,
            )
            for one in balancer.backends
        ],
        affinity=balancer.affinity,
        health_check=None
        if health is None
        else bridge.HealthCheck(
            interval_seconds=health.interval,
            timeout_seconds=health.timeout,
            failures=health.failures,
            successes=health.successes,
            line=health.line,
        ),
        publish=[publish_message(one) for one in balancer.publish],
        also=[bridge.BalancerNetwork(network=place.network, line=place.line) for place in balancer.also],
        line=balancer.line,
    )


def address_message(place: Place) -> bridge.BalancerAddress:
    """An address on a network."""
    return bridge.BalancerAddress(network=place.network, address=place.address, line=place.line)


def publish_message(publish: Publish) -> bridge.BalancerPublish:
    """A published port."""
    return bridge.BalancerPublish(
        host_ip=publish.host_ip,
        host_port=publish.host_port,
        port=publish.port,
        protocol=publish.protocol,
        line=publish.line,
    )


def from_message(message: bridge.Balancer) -> Balancer:
    """A load balancer as a caller describes it; `check` looks at what it says."""
    health = message.health_check
    return Balancer(
        name=message.name,
        network=message.network,
        ports=tuple(Port(one.port, one.target_port, one.protocol, one.line) for one in message.ports),
        backends=tuple(_backend(one) for one in message.backends),
        addresses=tuple(Place(one.network, one.address, one.line) for one in message.addresses),
        dns_name=message.dns_name,
        affinity=message.affinity,
        health=None
        if health is None
        else HealthCheck(
            health.interval_seconds, health.timeout_seconds, health.failures, health.successes, health.line
        ),
        publish=tuple(Publish(one.host_port, one.port, one.protocol, one.host_ip, one.line) for one in message.publish),
        also=tuple(Place(one.network, line=one.line) for one in message.also),
        line=message.line,
    )


def _backend(message: bridge.BalancerBackend) -> Backend:
    given = message.selector or bridge.PolicySelector()
    line = given.line or message.line
    selector = Selector(given.guest, given.alias, given.label, given.network, given.group, line)
    return Backend(selector, message.target_port, message.line)

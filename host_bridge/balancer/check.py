"""What load balancers must be: every check that does not depend on how their text was written, nor on what there is.

The first thing that is wrong is an InvalidError whose message begins with the source and the line and says what to do.
"""

from __future__ import annotations

import dataclasses
import ipaddress
from collections.abc import Iterable, Sequence

from host_bridge.balancer.model import PROTOCOLS, Balancer, HealthCheck, Place, Port, Publish
from host_bridge.names import dns_name, shown
from host_bridge.selectors import check_selector
from host_bridge.sources import Source, check_name

MAX_BALANCERS = 500
# Of one load balancer. OVN writes all of one port's backends into one text of the database.
MAX_PORTS = 64
MAX_ITEMS = 256
_MAX_SECONDS = 86_400


def checked_balancers(source: Source, balancers: Iterable[Balancer]) -> dict[str, Balancer]:
    """The load balancers by name, with addresses in their usual form.

    Raises:
        InvalidError
    """
    found: dict[str, Balancer] = {}
    for balancer in balancers:
        check_name(source, balancer.line, "balancer", balancer.name)
        if balancer.name in found:
            raise source.wrong(balancer.line, f"balancer {balancer.name} is given twice: put both into one")
        found[balancer.name] = _checked(source, balancer)
    if len(found) > MAX_BALANCERS:
        raise source.wrong(0, f"{len(found)} load balancers are too many: use at most {MAX_BALANCERS}")
    return found


def _checked(source: Source, balancer: Balancer) -> Balancer:
    name, line = balancer.name, balancer.line
    if not dns_name(balancer.known_as):
        raise source.wrong(
            line,
            f"balancer {name}: {shown(balancer.known_as)} is no name that DNS can carry: give it another, with 'name:'",
        )
    _check_ports(source, balancer)
    _limit(source, balancer, "backends", balancer.backends, MAX_ITEMS)
    for backend in balancer.backends:
        check_selector(source, backend.selector)
        for key in ("group", "network"):
            if getattr(backend.selector, key):
                raise source.wrong(
                    backend.line, f"balancer {name}: a backend has no {key}: give a guest, an alias or a label"
                )
        if backend.target:
            _check_port(source, backend.line or line, backend.target)
    if balancer.health is not None:
        _check_health(source, name, balancer.health, line)
    _check_networks(source, balancer)
    return dataclasses.replace(
        balancer,
        addresses=_checked_addresses(source, balancer),
        publish=tuple(_checked_publish(source, balancer, one) for one in balancer.publish),
    )


def _check_ports(source: Source, balancer: Balancer) -> None:
    name = balancer.name
    if not balancer.ports:
        raise source.wrong(
            balancer.line, f"balancer {name} has no port, so its backends have none: write 'ports: [80:8080]'"
        )
    _limit(source, balancer, "ports", balancer.ports, MAX_PORTS)
    seen: dict[tuple[str, int], Port] = {}
    for port in balancer.ports:
        line = port.line or balancer.line
        if port.protocol not in PROTOCOLS:
            raise source.wrong(line, f"balancer {name}: {shown(port.protocol)} is no protocol: use tcp or udp")
        _check_port(source, line, port.port)
        if not port.target:
            raise source.wrong(
                line, f"balancer {name}: port {port.port} leads to port 0: write where the backends listen"
            )
        _check_port(source, line, port.target)
        first = seen.setdefault((port.protocol, port.port), port)
        if first is not port:
            at = f" (first at line {first.line})" if first.line else ""
            raise source.wrong(line, f"balancer {name}: port {port.port}/{port.protocol} is given twice{at}")


def _check_port(source: Source, line: int, port: int) -> None:
    if not 1 <= port <= 65535:
        raise source.wrong(line, f"port {port} is out of range: use 1 to 65535")


def _check_health(source: Source, name: str, health: HealthCheck, line: int) -> None:
    line = health.line or line
    for what, value in (("interval", health.interval), ("timeout", health.timeout)):
        if not 1 <= value <= _MAX_SECONDS:
            raise source.wrong(line, f"balancer {name}: {what} {value} s is out of range: use 1s to {_MAX_SECONDS}s")
    for what, value in (("failures", health.failures), ("successes", health.successes)):
        if not 1 <= value <= 1000:
            raise source.wrong(line, f"balancer {name}: {what} {value} is out of range: use 1 to 1000")


def _check_networks(source: Source, balancer: Balancer) -> None:
    seen = {balancer.network}
    for place in balancer.also:
        if place.network in seen:
            reason = "is its own" if place.network == balancer.network else "is given twice"
            raise source.wrong(
                place.line or balancer.line,
                f"balancer {balancer.name}: network {shown(place.network)} {reason}: leave it out of 'also'",
            )
        seen.add(place.network)
    _limit(source, balancer, "networks", balancer.also, MAX_PORTS)


def _checked_addresses(source: Source, balancer: Balancer) -> tuple[Place, ...]:
    found: list[Place] = []
    seen: dict[tuple[str, int], str] = {}
    for place in balancer.addresses:
        line = place.line or balancer.line
        try:
            address = ipaddress.ip_address(place.address)
        except ValueError:
            raise source.wrong(
                line, f"{shown(place.address)} is not an address: write it as 10.0.0.100 or fd00::100"
            ) from None
        if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
            raise source.wrong(line, f"{shown(place.address)} has a zone: leave it out")
        if place.network not in balancer.networks:
            raise source.wrong(
                line, f"balancer {balancer.name} is not on network {shown(place.network)}: leave {address} out"
            )
        first = seen.setdefault((place.network, address.version), str(address))
        if len(seen) == len(found):
            raise source.wrong(
                line, f"balancer {balancer.name} has two IPv{address.version} addresses ({first}, {address}): give one"
            )
        found.append(dataclasses.replace(place, address=str(address)))
    return tuple(found)


def _checked_publish(source: Source, balancer: Balancer, publish: Publish) -> Publish:
    line = publish.line or balancer.line
    if publish.protocol not in PROTOCOLS:
        raise source.wrong(line, f"balancer {balancer.name}: {shown(publish.protocol)} is no protocol: use tcp or udp")
    if publish.host_port:
        _check_port(source, line, publish.host_port)
    if (publish.protocol, publish.port) not in {(port.protocol, port.port) for port in balancer.ports}:
        known = ", ".join(f"{port.port}/{port.protocol}" for port in balancer.ports[:10])
        raise source.wrong(
            line,
            f"balancer {balancer.name} has no port {publish.port}/{publish.protocol} to publish: it has {known}",
        )
    if not publish.host_ip:
        return publish
    try:
        host_ip = ipaddress.ip_address(publish.host_ip)
    except ValueError:
        raise source.wrong(line, f"{shown(publish.host_ip)} is not an address of the host") from None
    return dataclasses.replace(publish, host_ip=str(host_ip))


def _limit(source: Source, balancer: Balancer, what: str, items: Sequence[object], most: int) -> None:
    if len(items) > most:
        raise source.wrong(balancer.line, f"balancer {balancer.name} has {len(items)} {what}: use at most {most}")
